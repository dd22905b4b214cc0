"""Where a family of checkpoints keeps its experts on disk, and how its router chooses. Data only, without torch."""

import re
from dataclasses import dataclass
from typing import Any, Literal

Config = dict[str, Any]  # a config.json

EXPERT_COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What config.json may call the number of routed experts. transformers 5 writes other names than the hub had."""


COMPRESSED = "moeflow_"
"""Begins the model_type of a checkpoint whose layers differ or have low-rank experts; the family's own follows."""

LAYERS = "moeflow_layers"
"""The key of such a checkpoint's config.json under which each decoder layer's format stands."""

MAIN = "moeflow_main_experts"
"""The key of a config.json under which stands how many of a token's experts are computed; the others only weigh vectors."""

MATRICES = ("gate", "up", "down")
"""The matrices of an expert, in the order in which `Arch.expert` names them."""


WITHOUT_EFFECT = (
    "transformers_version", "_name_or_path", "architectures", "use_cache", "auto_map", "torchscript", "quantization_config",
)  # fmt: skip
"""What config.json says without changing what a layer computes: another of these must not make anything run again."""


def essential(config: Config) -> Config:
    """The configuration as far as it changes what the model computes; what a layer's own tensors tell is left to them."""
    plain = {k: v for k, v in config.items() if k not in (*WITHOUT_EFFECT, LAYERS)}
    return plain | ({"model_type": str(config["model_type"]).removeprefix(COMPRESSED)} if "model_type" in config else {})


@dataclass(frozen=True, kw_only=True)
class Arch:
    """Names are templates over {layer} and {expert}.

    The tensors on disk are the contract. Module attributes are needed only to run a decoder layer of transformers, whose
    experts are fused in memory: `memory` says what a name begins with there.
    """

    model_type: str
    router: str  # [E, D]: one row per expert
    router_bias: str | None = None  # [E]: added for the choice only
    gate: str  # [F, D]
    up: str  # [F, D]
    down: str  # [D, F]
    shared: tuple[str, str, str] | None = None  # gate, up and down of the expert that sees every token
    shared_gate: str | None = None  # [1, D]: its output times the sigmoid of this
    score: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    normalize: Literal["always", "never", "norm_topk_prob"] = "norm_topk_prob"
    groups: bool = False  # n_group and topk_group limit the choice
    group_score: Literal["max", "top2"] = "max"
    router_fp32: bool = False  # router logits are computed in fp32, whatever the model's precision
    drop_score: Literal["all", "chosen"] = "all"  # Expert Drop's mean score: of all tokens, or of those that chose the expert
    memory: tuple[tuple[str, str], ...] = ()  # (on disk, in memory) beginnings of names inside a decoder layer
    block: str = "mlp"  # the MoE block inside a decoder layer in memory
    block_router: str = "gate"  # the router inside that block in memory

    def num_layers(self, config: Config) -> int:
        return int(config["num_hidden_layers"])

    def moe_layers(self, config: Config) -> list[int]:
        """The decoder layers that have routed experts, ascending."""
        dense = set(config.get("mlp_only_layers") or ()) | set(range(config.get("first_k_dense_replace") or 0))
        every = config.get("decoder_sparse_step") or 1
        return [i for i in range(self.num_layers(config)) if i not in dense and (i + 1) % every == 0]

    def num_experts(self, config: Config) -> int:
        return int(config[self.experts_key(config)])

    def experts_key(self, config: Config) -> str:
        """The name that this config.json gives to the number of routed experts."""
        found = [k for k in EXPERT_COUNT_KEYS if config.get(k) is not None]
        if not found:
            raise ValueError(f"config.json of a {self.model_type} names no number of experts; it needs one of {EXPERT_COUNT_KEYS}")
        return found[0]

    def with_experts(self, config: Config, experts: int) -> Config:
        """The configuration of the same model with `experts` routed experts in every MoE layer, of which a token can reach its
        top k, or all that it can where they are fewer."""
        counts = {k: experts for k in EXPERT_COUNT_KEYS if config.get(k) is not None}
        return config | counts | {"num_experts_per_tok": self.reach(config, experts)}

    def top_k(self, config: Config) -> int:
        return int(config["num_experts_per_tok"])

    def reach(self, config: Config, experts: int) -> int:
        """How many experts a token gets in a layer of `experts`: its top k, or all that it can reach where those are fewer."""
        n_group, topk_group = self.group_limit(config)
        return min(self.top_k(config), experts // n_group * topk_group)

    def computed(self, config: Config) -> int:
        """How many of a token's top-k experts are computed: fewer where Compressed Experts stand for the others."""
        return int(config.get(MAIN) or self.top_k(config))

    def group_limit(self, config: Config) -> tuple[int, int]:
        """(number of groups, groups a token may choose from): (1, 1) where the router knows no groups."""
        if not self.groups or config.get("topk_method") == "greedy":
            return 1, 1
        return int(config.get("n_group") or 1), int(config.get("topk_group") or 1)

    def normalizes(self, config: Config) -> bool:
        if self.normalize == "norm_topk_prob":
            return bool(config.get("norm_topk_prob", False))
        return self.normalize == "always"

    def prefix(self, layer: int) -> str:
        return f"model.layers.{layer}."

    def expert(self, layer: int, expert: int) -> tuple[str, str, str]:
        """The names of one expert's gate, up and down matrices."""
        return tuple(t.format(layer=layer, expert=expert) for t in (self.gate, self.up, self.down))  # type: ignore[return-value]

    def experts(self, layer: int) -> str:
        """What the names of a layer's routed experts begin with, and of what stands beside them."""
        return self.gate.format(layer=layer, expert="\0").partition("\0")[0]

    def factors(self, name: str) -> tuple[str, str]:
        """What stands in place of the matrix `name` [M, N] where it has rank R: [M, R] and [R, N], to be multiplied."""
        stem = name.removesuffix(".weight")
        return f"{stem}.factor_out", f"{stem}.factor_in"

    def on_disk(self, name: str) -> str:
        """The name on disk of what has this name in memory and is no fused expert."""
        if found := re.match(r"(model\.layers\.\d+\.)(.*)", name):
            for disk, memory in self.memory:
                if found[2].startswith(memory):
                    return found[1] + disk + found[2].removeprefix(memory)
        return name

    def norm(self, layer: int) -> str:
        """What the names of the norm before a layer's MoE block begin with."""
        return self.prefix(layer) + "post_attention_layernorm."

    def moe(self, layer: int) -> str:
        """What the names of a layer's MoE block begin with on disk."""
        return self.router.format(layer=layer).rsplit(".", 2)[0] + "."

    def router_tensors(self, layer: int) -> list[str]:
        """The names of the tensors that hold one row per expert."""
        return [t.format(layer=layer) for t in (self.router, self.router_bias) if t is not None]

    def legal_counts(self, config: Config, experts: int) -> list[int]:
        """How many of a layer's `experts` may stay so that the router still works, ascending."""
        found = []
        for keep in range(1, experts + 1):
            try:
                self.check_keep(config, keep, experts)
            except ValueError:
                continue
            found.append(keep)
        return found

    def check_keep(self, config: Config, keep: int, experts: int | None = None) -> None:
        """Raise ValueError where keeping `keep` of a layer's `experts` (all that the family has) cannot serve this router."""
        experts, top_k = experts or self.num_experts(config), self.top_k(config)
        if not top_k <= keep <= experts:
            raise ValueError(f"keep={keep} must lie between top_k={top_k} and the layer's {experts} experts")
        self.check_left(config, keep, experts)
        n_group, topk_group = self.group_limit(config)
        if (each := keep // n_group) * topk_group < top_k:
            need = max(self._least(), -(-top_k // topk_group)) * n_group
            raise ValueError(
                f"keep={keep} leaves {each} experts in each of {n_group} groups, and a token that may choose from {topk_group} "
                f"of them cannot reach its top_k={top_k}; keep at least {need}"
            )

    def check_left(self, config: Config, keep: int, experts: int) -> None:
        """Raise ValueError where no router of this kind can do with `keep` of a layer's `experts`, however few a token gets."""
        n_group, _ = self.group_limit(config)
        if not 1 <= keep <= experts:
            raise ValueError(f"keep={keep} must lie between 1 and the layer's {experts} experts")
        if self.score == "sparsemixer" and keep < 2:
            raise ValueError(f"keep={keep}: a {self.model_type} weighs two experts against each other; keep at least 2")
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
        return 2 if self.groups and self.group_score == "top2" else 1
