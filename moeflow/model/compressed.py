"""The classes that transformers loads a compressed checkpoint with.

Each family has a configuration class, whose `moeflow_layers` has the format of each layer, and a causal language model. Its MoE
blocks are the family's own, with the layer's number of experts. If a layer has low-rank experts, skips experts or has Compressed
Experts, its fused experts are `RoutedExperts`. If it has lost its experts or the whole block, `trimmed` replaces them. The classes
are made when transformers asks for them, which `import moeflow` arranges (`autoload`). Names on disk are the family's, with two
factors instead of a low-rank matrix. Before anything is loaded, the checkpoint is compared with its configuration, so that no
parameter is left at random.
"""

import copy
import functools
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file

from moeflow.arch import ARCH, COMPRESSED, LAYERS, MAIN, Arch, Family
from moeflow.arch.prediction import prediction_layers
from moeflow.arch.spec import EXPERT_COUNT_KEYS
from moeflow.model.factors import Stack, all_stacks, expert_shapes, form_of, sizes_of
from moeflow.model.fewer_active import CompressedExperts
from moeflow.model.formats import CLASSES, Format, check_tensors, layer_formats, some, without_added
from moeflow.model.header import read_header
from moeflow.model.layout import Folder
from moeflow.model.packed import BESIDE, PACKED, check_added, check_zeros, logical, packed_shapes, parts_of, unpack
from moeflow.model.routed_experts import experts_of
from moeflow.model.skeleton import layers_of
from moeflow.model.text_half import language_class
from moeflow.model.trimmed import take_out

HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""The options of `from_pretrained` that say where the checkpoint comes from."""

SPLIT = ("tp_plan", "tp_size", "distributed_config", "device_mesh")
"""The options of `from_pretrained` that split experts between devices, by plans written for the families' own modules."""

VECTORS = ".experts.compressed."
"""A part of the name of every vector of Compressed Experts, on disk and in memory."""


UNPACK = {"transformers": "5.23", "compressed-tensors": "0.20"}
"""The releases since which packed experts are unpacked while they are loaded; 5.17 loads some to other numbers without a word."""

_loading = Lock()  # the names that transformers looks up are this process's, not a model's


class Compressed:
    """The mixin for a family's causal language model: layers of different formats, and loading that checks every tensor."""

    _can_compile_fullgraph = False  # rows are counted per expert
    _keep_in_fp32_modules_strict = frozenset({"skip"})  # a threshold is compared with weights in fp32

    def __init__(self, config: Any, *args: Any, **fields: Any) -> None:
        super().__init__(config, *args, **fields)  # type: ignore[call-arg]
        family = Family.of(config.to_dict())
        if COMPRESSED + family.arch.model_type not in _converted:
            _convert(family.arch)
        behind = range(family.num_layers, family.num_layers + prediction_layers(family.config))
        ignored = getattr(self, "_keys_to_ignore_on_load_unexpected", None) or ()
        # transformers looks there for the layers of multi-token prediction, too
        self._keys_to_ignore_on_load_unexpected = [*ignored, *(re.escape(family.prefix(i)) for i in behind)]
        for layer, format in zip(layers_of(self), layer_formats(config.to_dict()), strict=True):
            if format is not None and format.gone:
                take_out(layer, family, format)
            elif format is not None:
                layer.set_submodule(family.arch.block, _block(layer.get_submodule(family.arch.block), config, format))
        self.post_init()  # type: ignore[attr-defined]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As in transformers, but Compressed Experts that the checkpoint lacks are set so that they change nothing."""
        super().initialize_weights()  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, CompressedExperts):
                for vector in module.parameters():
                    init.zeros_(vector)  # does not touch what was loaded

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, config: Any = None, **options: Any) -> Any:
        """As in transformers, but raises ValueError for a tensor that is missing, left over or of the wrong shape.

        Only Compressed Experts may be missing, and then all of them: if config.json asks for them and the checkpoint has none,
        they change nothing. Packed experts are unpacked, in the model's precision; the model is then one that was never packed, and
        is saved as such.
        """
        if split := [k for k in SPLIT if options.get(k) is not None]:
            raise ValueError(f"{split[0]}= splits a family's own experts, and knows none of another form; load without it")
        hub = {k: v for k, v in options.items() if k in HUB}
        asked = config
        if not isinstance(config, PreTrainedConfig):
            asked = cls.config_class.from_pretrained(config or name, **hub)  # type: ignore[attr-defined]
        state = options.get("state_dict")
        stored = shapes_of(files_of(name, options.get("variant"), hub)) if state is None else {n: t.shape for n, t in state.items()}
        packed = check_checkpoint(asked, stored, str(name))
        if packed:
            check_unpacks(str(name))
        wanted = options.pop("output_loading_info", False)
        with _names_of(Family.of(asked.to_dict()).arch, packed=packed):
            model, info = super().from_pretrained(name, *args, config=config, output_loading_info=True, **options)  # type: ignore[misc]
        left = sorted(str(k) for what in ("missing_keys", "unexpected_keys", "mismatched_keys") for k in info[what])
        if left := [k for k in left if VECTORS not in k]:
            raise ValueError(f"{name} was not loaded whole: {some(left)}; its tensors and its config.json do not fit each other")
        if packed and getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.remove_quantization_config(model)
            model.config.moeflow_layers = [without_added(value) for value in model.config.moeflow_layers]
            model._weight_conversions = None  # or saving would reverse the unpacking; so it takes the class's own conversions
        return (model, info) if wanted else model


def check_unpacks(name: str) -> None:
    """Raise ValueError if transformers or compressed-tensors is too old to unpack experts whole and to the right numbers."""
    here = {package: Version(version(package)) for package in UNPACK}
    if old := [f"{package} {here[package]}" for package, least in UNPACK.items() if here[package] < Version(least)]:
        wanted = " ".join(f"'{package}>={least}'" for package, least in UNPACK.items())
        raise ValueError(f"{name} has packed experts, which {' and '.join(old)} cannot unpack; pip install {wanted}")


def _block(standard: Any, config: Any, format: Format) -> nn.Module:
    own, family = copy.copy(config), Family.of(config.to_dict())
    for key in (*EXPERT_COUNT_KEYS, family.arch.experts_key):
        if key and getattr(config, key, None) is not None:
            setattr(own, key, format.experts)
    setattr(own, family.arch.top_k_key, family.experts_per_token(format.experts))
    block = type(standard)(own)
    block.experts = experts_of(block.experts, format, config.to_dict())
    if not format.own:
        block.experts.config = config  # it looks up the implementation here, which may be set for the whole model later
    return block


class _Load(ConversionOps):
    """Makes one stack of fused experts from its pieces on disk."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], full_layer_name: str = "",
        model: Any = None, **_: Any,
    ) -> dict[str, Any]:  # fmt: skip
        names = [p for p in source_patterns if p in input_dict and not p.endswith(BESIDE)]
        form = form_of(model.get_submodule(full_layer_name.rpartition(".")[0]))
        stack_EMN = self.stack.stacked([_unpacked(input_dict, name) for name in names], form)
        return {target_patterns[0]: stack_EMN.to(model.get_parameter(full_layer_name).dtype)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Save(self.stack)


def _unpacked(tensors: dict[str, Any], name: str) -> Any:
    """The matrices of one name, of all experts. Transformers would round whole matrices to the precision of their scales."""
    parts = parts_of(name.removesuffix(PACKED), tensors)
    if len(parts) < 2:
        return tensors.pop(name)
    every = zip(*(tensors.pop(n) for n in parts.values()), strict=True)
    return [unpack(dict(zip(parts, one, strict=True))) for one in every]


class _Save(_Load):
    """Makes the pieces on disk from one stack of fused experts, without the padding."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], full_layer_name: str = "",
        model: Any = None, config: Any = None, **_: Any,
    ) -> dict[str, Any]:  # fmt: skip
        (stack_EMN,) = next(iter(input_dict.values()))
        layer = int(re.search(r"layers\.(\d+)\.", full_layer_name)[1])  # type: ignore[index]
        family = Family.of(config.to_dict())
        format = layer_formats(config.to_dict())[layer]
        form = form_of(layers_of(model)[layer].get_submodule(family.arch.block).experts)
        return {
            self.stack.on_disk(family, layer, matrix, expert): piece_MN.contiguous()
            for matrix, expert, piece_MN in self.stack.pieces(stack_EMN, format, form)  # type: ignore[arg-type]
        }

    @property
    def reverse_op(self) -> ConversionOps:
        return _Load(self.stack)


@contextmanager
def _names_of(arch: Arch, *, packed: bool) -> Iterator[None]:
    """Load a checkpoint inside. Names of packed matrices are known only then: beside them transformers would leave FP8 as it is."""
    with _loading:
        _convert(arch, packed=packed)
        try:
            yield
        finally:
            _convert(arch)


def _convert(arch: Arch, *, packed: bool = False) -> None:
    """Tell transformers how the names on disk of this family become those in memory."""
    name = COMPRESSED + arch.model_type
    register_checkpoint_conversion_mapping(name, _conversions(arch, packed=packed), overwrite=True)
    _converted.add(name)


def _conversions(arch: Arch, *, packed: bool = False) -> list[Any]:
    """How the names on disk become those in memory: the family's renamings, and one converter for each stack."""
    family, converters = Family(arch, {}), []
    stem = family.experts(0).removeprefix(family.prefix(0))
    inside = [*arch.memory, (stem, f"{arch.block}.experts.")] if family.in_memory(stem) == stem else arch.memory
    renamings = [WeightRenaming(rf"\.{re.escape(disk)}", f".{memory}") for disk, memory in inside if disk != memory]
    renamings += [WeightRenaming(f"^{re.escape(disk)}", memory) for disk, memory in arch.rest]
    here = f"{arch.block}.experts"  # with the block, or shared experts would match
    for stack in all_stacks(gated=family.gated, biased=bool(arch.expert_biases)):
        names = [stack.on_disk(family, 0, matrix, "*").partition(".experts.")[2] for matrix in stack.matrices]
        ends = ("", PACKED, *BESIDE) if packed or stack.kind != "whole" else ("",)
        stored = [f"{here}.{n}{end}" for n in names for end in ends]
        converters.append(WeightConverter(stored, f"{here}.{stack.name}", [_Load(stack)]))
    return [*renamings, *converters]


def check_checkpoint(config: Any, stored: Mapping[str, Sequence[int]], where: str) -> bool:
    """Whether the tensors with these shapes are packed. Raises ValueError if they are not those that the configuration asks for.

    `stored` are the shapes by the names on disk, `where` is the checkpoint's name in the message.
    """
    said = config.to_dict()
    packed = packed_shapes(stored, said) if getattr(config, "quantization_config", None) else {}
    _compare(MODELS[config.model_type], config, {n: packed.get(n, stored.get(n, ())) for n in logical(stored)}, where)
    check_zeros(stored, (n for n in packed if n + PACKED in stored), said, where)
    check_added(stored, said)
    return bool(packed)


def _compare(model_class: Any, config: Any, stored: Mapping[str, Sequence[int]], where: str) -> None:
    asked, tied, ignored = _asked(model_class, config)
    vectors = {n for n in asked if VECTORS in n}
    optional = tied if vectors & set(stored) else tied | vectors
    check_tensors(
        where,
        {n: shape for n, shape in asked.items() if n in stored or n not in optional},
        {n: shape for n, shape in stored.items() if n in asked or not any(re.search(p, n) for p in ignored)},
    )


def _asked(model_class: Any, config: Any) -> tuple[dict[str, Sequence[int]], set[str], Iterable[str]]:
    """The shapes of the tensors on disk that a configuration asks for, the names of tied ones, and patterns of names to ignore."""
    plain = config.to_dict()
    family = Family.of(plain)
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    asked: dict[str, Sequence[int]] = {}
    for name, tensor in model.state_dict().items():
        if f".{family.arch.block}.experts." not in name:
            asked[family.on_disk(name)] = tuple(tensor.shape)
    for layer, format in enumerate(layer_formats(plain)):
        if format is not None and format.experts:
            experts = layers_of(model)[layer].get_submodule(family.arch.block).experts
            asked |= expert_shapes(family, format, layer, *sizes_of(experts, form_of(experts)))
    return asked, set(model.all_tied_weights_keys), model._keys_to_ignore_on_load_unexpected


def files_of(name: Any, variant: str | None, hub: Mapping[str, Any]) -> list[Path]:
    """A checkpoint's safetensors files, from a folder or the hub. `hub` is what `HUB` names. Raises ValueError if one is absent."""

    def find(file: str) -> Path | None:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)
        return None if path is None else Path(path)

    dotted = f".{variant}" if variant else ""
    if single := find(f"model{dotted}.safetensors"):
        return [single]
    index = find(f"model.safetensors.index{dotted}.json")
    if index is None:
        raise ValueError(f"{name} has no model{dotted}.safetensors; a compressed checkpoint is kept in that format only")
    parts = {n: find(n) for n in sorted(set(json.loads(index.read_text())["weight_map"].values()))}
    if absent := [n for n, path in parts.items() if path is None]:
        raise ValueError(f"{name} has no {some(absent)}, which its index names; the checkpoint is incomplete")
    return [path for path in parts.values() if path is not None]


def shapes_of(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in safetensors files, of which only the headers are read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        tensors = read_header(path.name, path.stat().st_size, Folder(path.parent).read)
        shapes |= {n: t.shape for n, t in tensors.items()}
    return shapes


def _balancing(family: Any) -> Callable[..., Any]:
    """The family's forward. If layers differ in their number of experts, its load-balancing loss is that of each layer, averaged
    (Switch Transformer, arXiv 2101.03961, 2.2). The family's own adds up counts over layers, expert by expert.
    """
    loss_of: Any = getattr(importlib.import_module(family.__module__), "load_balancing_loss_func", None)
    signature = inspect.signature(family.forward)

    @functools.wraps(family.forward)
    def forward(self: Any, *args: Any, **fields: Any) -> Any:
        arguments = signature.bind(self, *args, **fields).arguments
        asked = arguments.get("output_router_logits")
        asked = getattr(self.config, "output_router_logits", False) if asked is None else asked
        if not asked:
            return family.forward(self, *args, **fields)
        config = self.config.to_dict()
        arch, counts = Family.of(config).arch, [f.experts for f in layer_formats(config) if f is not None and f.experts]
        if len(set(counts)) == 1:
            return family.forward(self, *args, **fields)
        routers = [m for n, m in self.named_modules() if n.endswith(f".{arch.block}.{arch.block_router}")]
        logits: list[Tensor] = []
        hooks = [r.register_forward_hook(lambda _, __, out: logits.append(out[0])) for r in routers]
        try:
            rest = {k: v for k, v in arguments.items() if k not in ("self", "kwargs")} | arguments.get("kwargs", {})
            out = family.forward(self, **(rest | {"output_router_logits": False, "return_dict": True}))
        finally:
            for hook in hooks:
                hook.remove()
        mask, top_k = arguments.get("attention_mask"), self.num_experts_per_tok
        each = [loss_of((layer,), n, top_k, mask).to(out.logits.device) for layer, n in zip(logits, counts, strict=True)]
        out.aux_loss, out.router_logits = torch.stack(each).mean(), tuple(logits)
        if out.loss is not None:
            out.loss = out.loss + self.router_aux_loss_coef * out.aux_loss.to(out.loss.device)
        return out if fields.get("return_dict", self.config.return_dict) else out.to_tuple()

    return forward if loss_of is not None else family.forward


def _register(model_type: str) -> Any:
    """Register the classes of a family with transformers. Returns the configuration class."""
    family_config: Any = CONFIG_MAPPING[model_type]
    family: Any = language_class(family_config)
    here = {"__module__": __name__}
    types = {LAYERS: list[dict[str, Any]] | None, MAIN: int | None, ARCH: dict[str, Any] | None}
    own = {"model_type": COMPRESSED + model_type, "__annotations__": types} | dict.fromkeys(types)
    config: Any = type(CLASSES + family_config.__name__, (family_config,), here | own)
    model: Any = type(
        CLASSES + family.__name__, (Compressed, family), here | {"config_class": config, "forward": _balancing(family)}
    )
    AutoConfig.register(COMPRESSED + model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model)
    CONFIGS[config.model_type], MODELS[config.model_type] = config, model
    globals().update({config.__name__: config, model.__name__: model})  # pickle looks for them here
    return config


CONFIGS: dict[str, Any] = {}
"""The configuration classes, such as MoeflowMixtralConfig, by `model_type`, as far as they were needed."""
MODELS: dict[str, Any] = {}
"""The model classes, such as MoeflowMixtralForCausalLM, by `model_type`."""
_converted: set[str] = set()
"""The model types of which transformers has been told how names on disk become those in memory."""


def config_class(model_type: str) -> Any:
    """The configuration class of compressed checkpoints of this type, registered on first use."""
    return CONFIGS.get(model_type) or _register(model_type.removeprefix(COMPRESSED))


def __getattr__(name: str) -> Any:
    """A class that was not needed yet, where another process has pickled an object of it."""
    for known in (CONFIG_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if name.startswith(CLASSES) else ():
        for model_type in (t for t, of in known.items() if CLASSES + of == name and COMPRESSED + t not in CONFIGS):
            _register(model_type)
            if name in globals():
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
