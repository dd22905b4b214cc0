"""A family bound to one config.json: its numbers, and the names of its tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moeflow.arch.found import arch_of
from moeflow.arch.spec import ARCH, EXPERT_COUNT_KEYS, LAYERS, MAIN, MATRICES, Arch, Config, is_number, layer_of

Kind = Literal["attention", "router", "experts", "shared", "dense", "compressed", "fixed", "norm", "rest"]
"""What a tensor is part of. "attention": also what a hybrid has in its place; "compressed": the vectors of Compressed Experts;
"fixed": what has no gradient, the threshold of skipping and the router's bias; "norm": a norm of a decoder layer; "rest":
embedding, final norm and head."""

DENSE = ("mlp", "feed_forward", "ffn")
"""Parts of the names of dense networks that lie beside the MoE block."""

LISTS = ("layers_block_type", "layer_types", LAYERS)
"""Keys of config.json for lists with an entry for each decoder layer."""


@dataclass(frozen=True)
class Family:
    """An `Arch` and the configuration of one of its models. The names of tensors depend on the `Arch` alone."""

    arch: Arch
    config: Config

    @staticmethod
    def of(config: Config) -> "Family":
        """The family of the model with this config.json, compressed by moeflow or not, whose `Arch` it has (`ARCH`).

        Where it has none, as in a stranger's checkpoint, its model type is looked at. Raises ValueError if it is not understood.
        """
        if config.get(ARCH) is not None:
            return Family(Arch.from_json(config[ARCH]), config)
        return Family(arch_of(config), config)

    # Numbers of the model

    def size(self, key: str) -> int | None:
        """A size of config.json; None where it is left to the defaults of transformers."""
        value = self.config.get(key)
        return None if value is None else int(value)

    @property
    def expert_size(self) -> int | None:
        """The inner units of a routed expert, F; None where config.json leaves it to the defaults of transformers."""
        if self.arch.expert_width is not None:
            return self.arch.expert_width
        size = self.size("moe_intermediate_size")
        return self.size("intermediate_size") if size is None else size

    @property
    def num_layers(self) -> int:
        if self.config.get("num_hidden_layers") is None:  # hybrids may have a list of their layers' kinds instead
            listed = next((self.config[key] for key in LISTS if self.config.get(key)), None)
            if listed is None:
                raise ValueError(f"config.json of a {self.arch.model_type} lacks num_hidden_layers; fetch the checkpoint again")
            return len(listed)
        return int(self.config["num_hidden_layers"])

    @property
    def moe_layers(self) -> list[int]:
        """The decoder layers that have routed experts, ascending."""
        if self.arch.moe is not None:
            return list(self.arch.moe)
        dense = set(self.config.get("mlp_only_layers") or ()) | set(range(self.config.get("first_k_dense_replace") or 0))
        every = self.config.get("decoder_sparse_step") or 1
        return [i for i in range(self.num_layers) if i not in dense and (i + 1) % every == 0]

    @property
    def experts_key(self) -> str:
        """The key of this config.json for the number of routed experts. Raises ValueError if it has none."""
        keys = (self.arch.experts_key,) if self.arch.experts_key else EXPERT_COUNT_KEYS
        for key in keys:
            if self.config.get(key) is not None:
                return key
        raise ValueError(
            f"config.json of a {self.arch.model_type} names no number of experts ({' or '.join(keys)}); fetch it again"
        )

    @property
    def num_experts(self) -> int:
        """The number of routed experts in an MoE layer; the largest where layers differ."""
        return int(self.config[self.experts_key])

    @property
    def top_k(self) -> int:
        return int(self.config[self.arch.top_k_key])

    @property
    def main_experts(self) -> int:
        """How many of a token's top-k experts are computed: fewer than top k if Compressed Experts replace the others."""
        return int(self.config.get(MAIN) or self.top_k)

    @property
    def group_limit(self) -> tuple[int, int]:
        """(number of groups, number of groups a token may choose from); (1, 1) if the router has no groups."""
        if not self.arch.groups or self.config.get("topk_method") == "greedy":
            return 1, 1
        return int(self.config.get("n_group") or 1), int(self.config.get("topk_group") or 1)

    @property
    def normalizes(self) -> bool:
        """Whether a token's routing weights are divided by their sum."""
        if self.arch.normalize == "norm_topk_prob":
            return bool(self.config.get("norm_topk_prob", False))
        return self.arch.normalize == "always"

    def experts_per_token(self, experts: int) -> int:
        """How many experts a token gets in a layer of `experts`: top k, or all it can choose from if they are fewer."""
        n_group, topk_group = self.group_limit
        return min(self.top_k, experts // n_group * topk_group)

    def with_experts(self, experts: int) -> Config:
        """The configuration of the same model with `experts` routed experts in every MoE layer."""
        keys = (*EXPERT_COUNT_KEYS, self.arch.experts_key)
        counts = {k: experts for k in keys if self.config.get(k) is not None}
        return self.config | counts | {self.arch.top_k_key: self.experts_per_token(experts)}

    @property
    def scale(self) -> float:
        """What all routing weights are multiplied with."""
        key = self.arch.scale_key or ("routed_scaling_factor" if self.arch.groups else "")
        return float(self.config.get(key) or 1.0) if key else 1.0

    @property
    def gated(self) -> bool:
        """Whether an expert has a gate beside its up and down matrices."""
        return len(self.arch.experts) == len(MATRICES)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of an expert's matrices, in the order of `Arch.experts`: `MATRICES`, without a gate if it has none."""
        return MATRICES if self.gated else MATRICES[1:]

    def handed_on(self, length: int) -> int:
        """How many numbers of 4 bytes, beside hidden states, a layer hands on to the next for each of a sequence's tokens."""
        return min(int(self.config[self.arch.handed_on]), length) if self.arch.handed_on else 0

    # How many experts may stay

    def fewest(self, experts: int) -> int:
        """The smallest number that passes `check_router` for a layer of `experts`."""
        return next(n for n in range(1, experts + 1) if _passes(self.check_router, n, experts))

    def legal_counts(self, experts: int) -> list[int]:
        """The numbers `keep` that pass `check_keep` for a layer of `experts`, ascending."""
        return [n for n in range(1, experts + 1) if _passes(self.check_keep, n, experts)]

    def check_keep(self, keep: int, experts: int) -> None:
        """Raise ValueError if a router with `keep` of a layer's `experts` cannot give a token its top k."""
        top_k = self.top_k
        if not top_k <= keep <= experts:
            raise ValueError(f"keep={keep} must lie between top_k={top_k} and the layer's {experts} experts")
        self.check_router(keep, experts)
        n_group, topk_group = self.group_limit
        if (each := keep // n_group) * topk_group < top_k:
            need = max(self._least(), -(-top_k // topk_group)) * n_group
            raise ValueError(
                f"keep={keep} leaves {each} experts in each of {n_group} groups, and a token that may choose from {topk_group} "
                f"of them cannot reach its top_k={top_k}; keep at least {need}"
            )

    def check_router(self, keep: int, experts: int) -> None:
        """Raise ValueError if the router cannot work with `keep` of a layer's `experts`, even for a token that gets fewer than
        top k."""
        n_group, _ = self.group_limit
        if not 1 <= keep <= experts:
            raise ValueError(f"keep={keep} must lie between 1 and the layer's {experts} experts")
        if self.arch.score == "sparsemixer" and keep < 2:
            raise ValueError(f"keep={keep}: a {self.arch.model_type} weighs two experts against each other; keep at least 2")
        if keep % n_group:
            raise ValueError(
                f"keep={keep} must be a multiple of the router's {n_group} groups, or no whole number is left in each; "
                f"nearest: {keep - keep % n_group} or {keep - keep % n_group + n_group}"
            )
        if keep // n_group < self._least():
            raise ValueError(
                f"keep={keep} leaves {keep // n_group} experts in each of {n_group} groups, which are ranked by their best "
                f"{self._least()}; keep at least {self._least() * n_group}"
            )

    def _least(self) -> int:
        """How many experts a group needs to be ranked."""
        return 2 if self.arch.groups and self.arch.group_score == "top2" else 1

    def check_weighs_outputs(self, what: str) -> None:
        """Raise ValueError if routing weights multiply the inputs of experts, for which there are none of `what`."""
        if self.arch.weighs_input:
            raise ValueError(
                f"a {self.arch.model_type} multiplies the inputs of its experts with their routing weights, for which there are no "
                f"{what}; prune, trim or slim it instead"
            )

    # Names on disk

    def prefix(self, layer: int) -> str:
        """The beginning of the names of all tensors of a decoder layer."""
        return f"model.layers.{layer}."

    def norm(self, layer: int) -> str:
        """The beginning of the names of the norm before a layer's MoE block."""
        return f"{self.prefix(layer)}{self.arch.norm}."

    def moe(self, layer: int) -> str:
        """The beginning of the names of a layer's MoE block."""
        return self.experts(layer).rsplit(".", 2)[0] + "."

    def experts(self, layer: int) -> str:
        """The beginning of the names of a layer's routed experts, and of what moeflow stores beside them."""
        return self.arch.experts[0].format(layer=layer, expert="\0").partition("\0")[0]

    def expert(self, layer: int, expert: int | str) -> tuple[str, ...]:
        """The names of one expert's gate, up and down matrices; of up and down if it has no gate (`matrices`)."""
        return tuple(name.format(layer=layer, expert=expert) for name in self.arch.experts)

    def expert_biases(self, layer: int, expert: int | str) -> tuple[str, ...]:
        """The names of the biases of the same matrices, in the same order; empty if the family has none."""
        return tuple(name.format(layer=layer, expert=expert) for name in self.arch.expert_biases)

    def of_expert(self, name: str, layer: int) -> bool:
        """Whether the tensor with this name on disk is part of one of the layer's routed experts."""
        stem = self.experts(layer)
        return name.startswith(stem) and is_number(name.removeprefix(stem).split(".")[0])

    def factors(self, name: str) -> tuple[str, str]:
        """The names of the two factors, [M, R] and [R, N], that replace the matrix `name` [M, N] if it has rank R."""
        stem = name.removesuffix(".weight")
        return f"{stem}.factor_out", f"{stem}.factor_in"

    def router(self, layer: int) -> str:
        return self.arch.router.format(layer=layer)

    def router_bias(self, layer: int) -> str | None:
        """The name of the bias [E] that is added for the choice of experts only; None if the family has none."""
        return None if self.arch.router_bias is None else self.arch.router_bias.format(layer=layer)

    def router_offset(self, layer: int) -> str | None:
        """The name of the bias [E] that is added to the router's logits; None if the family has none."""
        return None if self.arch.router_offset is None else self.arch.router_offset.format(layer=layer)

    def router_tensors(self, layer: int) -> list[str]:
        """The names of the router's tensors; each has one row per expert, or one column if it has a single row."""
        names = (self.router(layer), self.router_bias(layer), self.router_offset(layer))
        return [name for name in names if name is not None]

    def shared(self, layer: int) -> tuple[str, ...]:
        """The names of the shared expert's gate, up and down matrices; empty if the family has no shared expert."""
        return tuple(name.format(layer=layer) for name in self.arch.shared)

    def shared_gate(self, layer: int) -> str | None:
        """The name of the matrix [1, D] that weighs the shared expert's output; None if the family has none."""
        return None if self.arch.shared_gate is None else self.arch.shared_gate.format(layer=layer)

    def gate_beside(self, name: str) -> str | None:
        """The name of the same expert's gate, or up if it has no gate, if `name` is a down matrix, else None."""
        gate, *_, down = (template.split(".")[-2] for template in self.arch.experts)
        stem, _, matrix = name.removesuffix(".weight").rpartition(".")
        return f"{stem}.{gate}.weight" if matrix == down else None

    def kind(self, name: str) -> Kind:
        """What the tensor with this name on disk is part of. A stack of fused experts counts as experts."""
        layer = layer_of(name)
        if layer is None:
            return "rest"
        experts, inside = self.experts(layer), name.removeprefix(self.prefix(layer))
        if name.startswith(f"{experts}compressed."):
            return "compressed"
        if name.startswith(f"{experts}skip.") or name == self.router_bias(layer):
            return "fixed"
        if name.startswith(experts):
            return "experts"
        if name in (self.router(layer), self.router_offset(layer)):
            return "router"
        if name in (*self.shared(layer), self.shared_gate(layer)):
            return "shared"
        return self._kind_beside(inside, layer)

    def _kind_beside(self, inside: str, layer: int) -> Kind:
        """The kind of a tensor that is of no expert or router, by its name inside its layer.

        Hybrids have Mamba, linear attention or convolutions in the attention's place, under a name of their own, or, in the layers
        without experts, under that of the block.
        """
        module, block, attention = inside.split(".")[0], self.arch.block, self.arch.attention
        if module == block:
            of_mlp = layer in self.moe_layers or any(inside.split(".")[1] == name.split(".")[-2] for name in self.arch.experts)
            return "dense" if block != attention or of_mlp else "attention"
        if module != attention and "norm" in module:
            return "norm"
        return "dense" if module != attention and any(word in module for word in DENSE) else "attention"

    def in_expert(self, name: str) -> bool:
        """Whether the tensor with this name on disk is part of an expert, routed or shared."""
        return self.kind(name) in ("experts", "shared")

    # Names in memory

    def on_disk(self, name: str) -> str:
        """The name on disk of a tensor that is called `name` in memory; of a stack of fused experts, which is not on disk, the name
        that it would have among them."""
        layer = layer_of(name)
        if layer is not None:
            inside = name.removeprefix(self.prefix(layer))
            for disk, memory in self.arch.memory:
                if inside.startswith(memory):
                    return self.prefix(layer) + disk + inside.removeprefix(memory)
            fused = f"{self.arch.block}.experts."
            return self.experts(layer) + inside.removeprefix(fused) if inside.startswith(fused) else name
        for disk, memory in self.arch.rest:
            if name.startswith(memory):
                return disk + name.removeprefix(memory)
        return name

    def in_memory(self, inside: str) -> str:
        """The name in memory of a tensor that is called `inside` on disk; both are names inside a decoder layer."""
        for disk, memory in self.arch.memory:
            if inside.startswith(disk):
                return memory + inside.removeprefix(disk)
        return inside

    def rest_in_memory(self, name: str) -> str:
        """The name in memory of a tensor outside the decoder layers that is called `name` on disk."""
        for disk, memory in self.arch.rest:
            if name.startswith(disk):
                return memory + name.removeprefix(disk)
        return name

    @property
    def shared_modules(self) -> tuple[str, ...]:
        """The modules inside the MoE block that are left without routed experts: the shared expert, and its gate if it has one."""
        gate = self.shared_gate(0)
        names = (*self.shared(0)[:1], *([gate] if gate else ()))
        return tuple(name.removeprefix(self.moe(0)).split(".")[0] for name in names)

    def experts_pattern(self, layer: int) -> str:
        """A target of a quantization_config: the experts of one layer, by their names on disk and in memory."""
        where = "[.]".join(self.prefix(layer).split(".")[-3:])  # "layers[.]3[.]": what is before it may differ in memory
        inside = self.experts(layer).removeprefix(self.moe(layer))
        return f"re:.*{where}{self._block(layer)}{inside}[0-9].*"  # and not experts.act_fn

    def _block(self, layer: int) -> str:
        """A pattern of the MoE block's name, on disk and in memory."""
        block = self.moe(layer).removeprefix(self.prefix(layer))
        return block if block == f"{self.arch.block}." else f"({block[:-1]}|{self.arch.block})."

    def pattern(self, module: str) -> str:
        """An entry of `ignore` in a quantization_config for a module with this name on disk.

        It matches the name in memory, too, and the same module of other layers where they are alike.
        """
        layer = layer_of(module)
        if layer is None:
            return module
        inside, block = module.removeprefix(self.prefix(layer)), self.moe(layer).removeprefix(self.prefix(layer))
        if inside.startswith(f"{self.arch.attention}.") and self.arch.attention != self.arch.block:
            return f"re:.*{self.arch.attention}.*"
        either = self._block(layer)
        if inside.startswith(block):
            inside = either + inside.removeprefix(block)
        if module + ".weight" == self.router(layer):
            return f"re:.*{either[:-1]}[.](gate|router)$"
        return f"re:.*[.]{inside}$" if layer in self.moe_layers else module


def _passes(check: Callable[[int, int], None], keep: int, experts: int) -> bool:
    try:
        check(keep, experts)
    except ValueError:
        return False
    return True
