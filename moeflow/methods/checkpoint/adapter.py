"""A LoRA adapter of PEFT beside a model's weights, or in a folder of its own: refused, or planned into each tensor. No torch.

Hu et al., ICLR 2022, arXiv 2106.09685: W + scale B A, with scale = alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA
(Kalajdzievski, arXiv 2312.03732). PEFT's `target_parameters` are the stacks of fused experts, whose factors are stacked, too.
Shapes are suffixes: M outputs and N inputs of a matrix, R rank, E experts.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING, Any, Literal

from moeflow.arch import HEAD, Config, Family, Layout, layer_of
from moeflow.model.header import TensorInfo, read_header
from moeflow.model.json_file import json_object, kind_of
from moeflow.model.layout import experts_in
from moeflow.model_files import ADAPTER_CONFIG, ADAPTERS, named_like
from moeflow.step import Step

if TYPE_CHECKING:
    from moeflow.sources import Source

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the name of every module."""
UNDERSTOOD = (
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "lora_dropout", "fan_in_fan_out", "ensure_weight_tying", "runtime_config",  # of training, or of other kinds of layers
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config",  # of no effect without what they belong to
)  # fmt: skip
"""The entries of adapter_config.json that leave it a plain LoRA; any other that is set makes it another kind (DoRA, aLoRA, ...)."""
STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""The ways to begin a LoRA that leave the model's own weights alone; others (PiSSA, OLoRA, LoftQ, CorDA) subtract from them."""
WAY_OUT = "merge it with PEFT (merge_and_unload, save_pretrained), and give the result"
FACTOR = re.compile(r"(?P<module>.+?)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.default)?(?P<weight>\.weight)?")
SQUARE = (0, 19, 1)
"""The first release of PEFT whose factors of a fused expert multiply to the matrix itself, and not to its transpose."""

Form = Literal["matrix", "embedding", "experts", "transposed experts"]


@dataclass(frozen=True)
class Addition:
    """What an adapter makes of one tensor: it takes another one's place, or gets scale · B A, or both in that order."""

    whole: str = ""
    """The adapter's tensor that takes its place."""
    a: str = ""
    """The adapter's factor A [R, N]; of fused experts, [E · R, N]."""
    b: str = ""
    """Its factor B [M, R]; of fused experts, [M, R · E]."""
    scale: float = 0.0
    form: Form = "matrix"
    """embedding: the tensor gets the product transposed. transposed experts: each expert does."""
    experts: int = 1
    """E, of fused experts."""
    expert: int = 0
    """Which of them this tensor belongs to."""
    rows: tuple[int, int] | None = None
    """The rows of the expert's product that are this tensor's: its gate, or up; none: all."""


@dataclass(frozen=True)
class Merge:
    """An adapter that is merged: its source, its tensors, and what it makes of the checkpoint's."""

    source: "Source"
    held: Mapping[str, TensorInfo]
    additions: Mapping[str, Addition]

    def of(self, names: Iterable[str]) -> dict[str, Addition]:
        """What it makes of those of these tensors that it changes."""
        return {name: self.additions[name] for name in sorted(names) if name in self.additions}

    def moved(self, additions: Mapping[str, Addition]) -> int:
        """The bytes of the adapter's tensors that these need."""
        return sum(self.held[n].nbytes for n in {n for a in additions.values() for n in (a.whole, a.a, a.b) if n})

    def step(self) -> Step:
        """The adapter's tensors, as an input."""
        return self.source.weights(WEIGHTS)

    def note(self) -> str:
        """What is merged, in words."""
        base = _base(_config(self.source)) or "a model that it does not name"
        return f"the adapter at {self.source.uri}, trained on {base}, is merged into {len(self.additions):,} tensors"


def check(source: "Source") -> None:
    """Raise ValueError if there is an adapter at the source that nobody asked to merge, or nothing else."""
    files = [n for n in source.names() if named_like(n, ADAPTERS)]
    if not any(n.endswith(".safetensors") and n not in files for n in source.names()):
        base = _base(_config(source))
        raise ValueError(
            f"{source.uri} holds an adapter of {base or 'a model that it does not name'} and no weights of a model; to merge it: "
            f"-p model={base or 'THAT_MODEL'} -p adapter={source.uri}"
        )
    if files and (source.adapter is None or source.adapter.uri != source.uri):
        raise ValueError(
            f"{source.uri} holds an adapter beside its weights ({files[0]}): merge it (-p adapter=merge), or move it away"
        )


def merge_of(adapter: "Source", config: Config, tensors: dict[str, TensorInfo], layout: Layout) -> Merge:
    """What the adapter makes of each tensor of the checkpoint that it changes.

    `tensors`: those that moeflow works on, one for each matrix of each expert, whatever stacks the checkpoint has in its `layout`.
    Raises ValueError for an adapter that is no plain LoRA, and for one that does not fit the checkpoint.
    """
    about = _checked(_config(adapter), adapter.uri)
    if WEIGHTS not in adapter.names():
        instead = ", only a pickle, which can run code when read" if "adapter_model.bin" in adapter.names() else ""
        raise ValueError(f"{adapter.uri} holds no {WEIGHTS}{instead}; save the adapter again with PEFT's save_pretrained")
    file = adapter.find(WEIGHTS)
    held = read_header(WEIGHTS, file.size, adapter.read)
    planned = _Planned(f"{WEIGHTS} at {adapter.uri}", about, held, Family.of(config), tensors, layout)
    factors: dict[tuple[str, bool], dict[str, str]] = defaultdict(dict)
    for name in sorted(held):
        inside = name.removeprefix(PREFIX)
        match = FACTOR.fullmatch(inside)
        if match is None or bool(match["embedding"]) == bool(match["weight"]):
            planned.replace(name, re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", inside))
        else:
            factors[match["module"], bool(match["embedding"])][match["factor"]] = name
    for (module, embedding), pair in factors.items():
        if missing := {"A", "B"} - {*pair}:
            raise ValueError(f"{planned.where} has only one factor of {module}, no lora_{missing.pop()}; save it again")
        planned.add(module.replace(".base_layer", ""), pair["A"], pair["B"], embedding)
    if not planned.additions:
        raise ValueError(f"{planned.where} changes nothing; save the adapter again")
    return Merge(adapter, held, planned.additions)


@dataclass
class _Planned:
    """The additions so far, and what they are checked against."""

    where: str
    about: dict[str, Any]
    held: dict[str, TensorInfo]
    family: Family
    tensors: dict[str, TensorInfo]
    layout: Layout

    def __post_init__(self) -> None:
        self.additions: dict[str, Addition] = {}

    def replace(self, name: str, inside: str) -> None:
        """The adapter has a tensor whole, as of a module in `modules_to_save`."""
        if "lora_" in inside:
            raise ValueError(f"{self.where} holds {name}, which is no factor of a plain LoRA; {WAY_OUT}")
        target = self._target(inside)
        if target is None:
            raise ValueError(f"{self.where} holds {name}, for which the model has no tensor{self._why(inside)}; {WAY_OUT}")
        if self.held[name].shape != self.tensors[target].shape:
            raise ValueError(
                f"{self.where}: {name} has shape {self.held[name].shape} where the model has {self.tensors[target].shape}; if the "
                f"vocabulary was enlarged, {WAY_OUT}"
            )
        self._put(target, Addition(whole=name))

    def add(self, module: str, a: str, b: str, embedding: bool) -> None:
        """The adapter has two factors for a module: a matrix, the embedding, or fused experts."""
        target = self._target(f"{module}.weight")
        if target is not None:
            (rank, n), (m, rank_too) = self._shapes(a, b)
            product = (n, m) if embedding else (m, n)
            if rank != rank_too or product != self.tensors[target].shape:
                raise self._unfit(a, b, f"{target} {self.tensors[target].shape}")
            scale = self._scale(module, rank, a)
            return self._put(target, Addition(a=a, b=b, scale=scale, form="embedding" if embedding else "matrix"))
        for here in (module, self.layout.here(module)):
            layer = layer_of(f"{here}.weight")
            if layer is not None and here == f"{self.family.prefix(layer)}{self.family.arch.block}.experts":
                return self._add_experts(module, layer, a, b)
        why = self._why(f"{module}.weight")
        raise ValueError(f"{self.where} changes {module}, of which the model has no plain weight{why}; {WAY_OUT}")

    def _add_experts(self, module: str, layer: int, a: str, b: str) -> None:
        """Two stacked factors of all experts of a layer, of gate and up together, or of down; their shapes tell which."""
        # transformers has gate's rows before up's in memory, unless they take turns on disk, too
        if not self.family.gated or any(stack.interleaved for stack in self.layout.stacked):
            kind = self.family.arch.model_type
            raise ValueError(f"{self.where} changes {module}, and moeflow merges no stacked experts of a {kind}; {WAY_OUT}")
        count = experts_in(self.tensors, self.family.config, layer)
        names = [self.family.expert(layer, e) for e in range(count)]
        if not count or names[0][0] not in self.tensors:
            raise ValueError(f"{self.where} changes {module}, whose experts the model does not have as plain matrices; {WAY_OUT}")
        inner, width = self.tensors[names[0][0]].shape
        (stacked, n), (m, stacked_too) = self._shapes(a, b)
        if stacked != stacked_too or stacked % count:
            raise self._unfit(a, b, f"{count} experts")
        sides = {"gate_up_proj": (2 * inner, width), "down_proj": (width, inner)}
        fits = [(p, form) for p, s in sides.items() for form in ("experts", "transposed experts") if self._fits((m, n), s, form)]
        if not fits:
            raise self._unfit(a, b, f"{count} experts with {inner} inner units in a width of {width}")
        stack, form = fits[0]
        scale = self._scale(f"{module}.{stack}", stacked // count, a)
        for e, (gate, up, down) in enumerate(names):
            made = Addition(a=a, b=b, scale=scale, form=form, experts=count, expert=e)  # type: ignore[arg-type]
            if stack == "down_proj":
                self._put(down, made)
            else:
                self._put(gate, replace(made, rows=(0, inner)))
                self._put(up, replace(made, rows=(inner, 2 * inner)))

    def _fits(self, product: tuple[int, int], sides: tuple[int, int], form: str) -> bool:
        """Whether the factors' product is a stack's matrix in this form. For a square one PEFT's version tells."""
        if sides[0] == sides[1] == product[0] == product[1]:
            if self.family.arch.turned:  # and it is not known which way PEFT multiplies them then
                kind = self.family.arch.model_type
                raise ValueError(f"{self.where}: the experts of this {kind} are square, and so could be meant turned; {WAY_OUT}")
            version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(self.about.get("peft_version")))
            if version is None:
                why = f"{ADAPTER_CONFIG} names no peft_version, which tells how factors of square experts multiply"
                raise ValueError(f"{self.where}: {why}; {WAY_OUT}")
            return (tuple(map(int, version.groups())) >= SQUARE) == (form == "experts")
        return product == (sides if form == "experts" else sides[::-1])

    def _shapes(self, a: str, b: str) -> tuple[tuple[int, int], tuple[int, int]]:
        one, two = self.held[a].shape, self.held[b].shape
        if len(one) != 2 or len(two) != 2 or 0 in (*one, *two):
            raise self._unfit(a, b, "a matrix each (a training with ZeRO-3 that did not gather them?)")
        return (one[0], one[1]), (two[0], two[1])

    def _scale(self, module: str, rank: int, a: str) -> float:
        """The scale of a module's product. Raises ValueError if adapter_config.json says another rank than the tensor has."""
        said = _of_pattern(self.about["rank_pattern"], module, self.about["r"])
        if said != rank:
            raise ValueError(f"{self.where}: {a} has rank {rank} where {ADAPTER_CONFIG} says {said}; correct one of them")
        alpha = _of_pattern(self.about["alpha_pattern"], module, self.about["lora_alpha"])
        return float(alpha / (sqrt(rank) if self.about["use_rslora"] else rank))

    def _target(self, inside: str) -> str | None:
        """The name here of a tensor that PEFT calls so, if the checkpoint has that."""
        names = (one for name in (inside, self.layout.here(inside)) for one in (name, self.family.on_disk(name)))
        return next((name for name in names if name in self.tensors), None)

    def _why(self, inside: str) -> str:
        """Why the model has no tensor that PEFT calls so, if that is known."""
        return ", because its head is tied to the embedding" if inside == HEAD else ""

    def _put(self, target: str, addition: Addition) -> None:
        before = self.additions.get(target)
        if self.tensors[target].dtype not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(
                f"{self.where} changes {target}, which is {self.tensors[target].dtype}; dequantize the model to bf16 first"
            )
        if before is not None and (before.a or addition.whole):
            raise ValueError(f"{self.where} changes {target} twice, by {before.a or before.whole} and {addition.a}; save it again")
        self.additions[target] = replace(addition, whole=before.whole) if before else addition

    def _unfit(self, a: str, b: str, what: str) -> ValueError:
        shapes = f"{a} {self.held[a].shape} and {b} {self.held[b].shape}"
        return ValueError(f"{self.where}: {shapes} do not fit {what}; it is of another model")


def _base(config: dict[str, Any]) -> str:
    """The model that an adapter was trained on, as a parameter names one; "" if it does not say."""
    base, revision = (str(config.get(name) or "")[:200] for name in ("base_model_name_or_path", "revision"))
    return f"{base}@{revision}" if base and revision else base


def _config(source: "Source") -> dict[str, Any]:
    if ADAPTER_CONFIG not in source.names():
        raise ValueError(f"{source.uri} holds no adapter: it has no {ADAPTER_CONFIG}; leave -p adapter away, or say where it lies")
    return json_object(source.read(ADAPTER_CONFIG), f"{ADAPTER_CONFIG} at {source.uri}")


def _checked(config: dict[str, Any], uri: str) -> dict[str, Any]:
    """An adapter's configuration with its defaults. Raises ValueError unless it is that of a plain LoRA."""
    where = f"{ADAPTER_CONFIG} at {uri}"
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"{where} is of an adapter of kind {kind_of(kind)}, and moeflow merges LORA; {WAY_OUT}")
    if strange := [n for n, v in config.items() if v and n not in UNDERSTOOD and (n, v) != ("bias", "none")]:
        raise ValueError(f"{where} says {strange[0]}={kind_of(config[strange[0]])}, which is no plain LoRA; {WAY_OUT}")
    if (start := config.get("init_lora_weights")) not in STARTS:
        raise ValueError(f"{where}: init_lora_weights={kind_of(start)} began by changing the model's own weights; {WAY_OUT}")
    made: dict[str, Any] = {"r": 8, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}} | {
        n: v for n, v in config.items() if v is not None
    }
    for name, kinds in (("r", (int,)), ("lora_alpha", (int, float)), ("rank_pattern", (dict,)), ("alpha_pattern", (dict,))):
        every = made[name].values() if isinstance(made[name], dict) else [made[name]]
        if type(made[name]) not in kinds or not all(type(v) in (int, float) and 0 < v < float("inf") for v in every):
            raise ValueError(f"{where}: {name} is {kind_of(made[name])}, which cannot be; correct it, or save the adapter again")
        if isinstance(made[name], dict):
            _compiled(made[name], f"{where}: {name}")
    return made


def _compiled(patterns: dict[str, Any], where: str) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{where} has {pattern!r:.99}, which is no pattern ({error}); correct it") from None


def _of_pattern(patterns: dict[str, Any], module: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, or of its parameter's, as PEFT does it."""
    matches = ((re.match(rf"(.*\.)?({p})$", name), v) for name in (module, f"{module}.weight") for p, v in patterns.items())
    return next((value for match, value in matches if match), otherwise)
