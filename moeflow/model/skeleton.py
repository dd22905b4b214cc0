"""A causal language model of transformers without weights, whose decoder layers are stubs.

Transformers' own code computes what is around the layers: the hidden states before the first, masks and positions, the logits.
Shapes are suffixes: N sequences, L positions, D model width, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CONFIG_MAPPING, PretrainedConfig

from moeflow.arch import Config
from moeflow.arch.spec import ALIASES
from moeflow.model.text_half import language_model

MOST_OUTPUTS = 4
"""How many values a decoder layer may return."""


@dataclass(frozen=True)
class Carried:
    """Stands, among a layer's arguments, for output number `at` of the layer before it. Number 0 is the hidden states."""

    layer: int
    at: int


@dataclass(frozen=True)
class Arguments:
    """What a model calls one of its decoder layers with, beside the hidden states."""

    positional: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)

    def filled(self, layer: int, carried: Mapping[int, Tensor]) -> "Arguments":
        """The arguments of this layer with the tensors that it is handed by the one before; None where that returned none."""

        def value(argument: Any) -> Any:
            if not isinstance(argument, Carried):
                return argument
            if argument.layer != layer - 1:
                raise ValueError(f"layer {layer} takes what layer {argument.layer} returned, and only neighbours can be streamed")
            return carried.get(argument.at)

        return Arguments(tuple(map(value, self.positional)), {name: value(v) for name, v in self.named.items()})


class Skeleton:
    """A model on the meta device. `layers` are its decoder layers without weights, `outputs` is how many values each returns."""

    def __init__(self, config: PretrainedConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        with torch.device("meta"):
            self.model: Any = language_model(config, dtype=dtype).eval()
        container = container_of(self.model, int(config.num_hidden_layers))
        self.layers = list(self.model.get_submodule(container))
        self._stubs = [_Stub(layer) for layer in self.layers]
        self.model.set_submodule(container, nn.ModuleList(self._stubs))
        self.compute_buffers(self.model)
        self._prefix = container.removesuffix(container.rpartition(".")[2])
        self._base = self.model.get_submodule(self._prefix.removesuffix("."))
        inside = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        self._embedding, self._head = ([f"{n}." for n, m in self.model.named_modules() if m is part] for part in inside)
        self._around = {n: t for n, t in self.model.state_dict().items() if not n.startswith(f"{container}.")}
        self.attention = self.model.config._attn_implementation  # sdpa, or eager where transformers has no other
        self.plan = self.model._get_dtype_plan(dtype)
        self.outputs = self._outputs_expected(int(config.hidden_size))

    def before(self) -> dict[str, Tensor]:
        """What the hidden states before the first layer are computed with, on the meta device, by the names in memory."""
        return {n: t for n, t in self._around.items() if n.startswith(self._prefix) and not n.startswith(tuple(self._head))}

    def behind(self) -> dict[str, Tensor]:
        """What the logits are computed with, on the meta device, by the names in memory."""
        return {n: t for n, t in self._around.items() if not n.startswith(tuple(self._embedding))}

    def tied(self, name: str) -> str | None:
        """The name of the tensor that stands for this one if the checkpoint has none, where config.json ties them; else None."""
        other: str | None = self.model.all_tied_weights_keys.get(name)
        return other

    def embed(self, values: Mapping[str, Tensor], ids_NL: Tensor) -> Tensor:
        """Hidden states before the first layer, computed with the tensors `before`."""
        self._run(self._base, {n.removeprefix(self._prefix): t for n, t in values.items()}, input_ids=ids_NL)
        return self._stubs[0].hidden

    def logits(self, values: Mapping[str, Tensor], hidden_NLD: Tensor) -> Tensor:
        """The logits [N, L, V] of hidden states behind the last layer, computed with the tensors `behind`."""
        with self._returning(hidden_NLD):
            logits: Tensor = self._run(self.model, values, inputs_embeds=hidden_NLD).logits
        return logits

    def arguments(self, hidden_NLD: Tensor) -> list[Arguments]:
        """What each layer is called with, for hidden states of this shape."""
        # the weights around the layers change no argument
        meta = {n: t for n, t in self.before().items() if not n.startswith(tuple(self._embedding))}
        values = {n.removeprefix(self._prefix): torch.zeros_like(t, device=self.device) for n, t in meta.items()}
        self._run(self._base, values, inputs_embeds=hidden_NLD)
        return [stub.arguments for stub in self._stubs]

    def compute_buffers(self, module: nn.Module) -> None:
        """Compute the buffers of a module that no checkpoint has, such as rotary frequencies, as transformers does."""
        for part in module.modules():
            missing = {
                n: b for n, b in part._buffers.items() if n in part._non_persistent_buffers_set and b is not None and b.is_meta
            }
            part._buffers.update({n: torch.empty_like(b, device=self.device) for n, b in missing.items()})
            if missing:
                for parameter in part.parameters():
                    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
                with torch.no_grad():
                    self.model._init_weights(part)

    def _run(self, module: nn.Module, values: Mapping[str, Tensor], **inputs: Any) -> Any:
        with torch.no_grad():
            return functional_call(module, dict(values), (), {**inputs, "use_cache": False})

    @contextmanager
    def _returning(self, hidden_NLD: Tensor) -> Iterator[None]:
        """The last layer returns these hidden states inside the `with` statement."""
        self._stubs[-1].given = hidden_NLD
        try:
            yield
        finally:
            self._stubs[-1].given = None

    def _outputs_expected(self, width: int) -> int:
        """How many values the model expects each layer to return, found by trying."""
        for outputs in range(1, MOST_OUTPUTS + 1):
            for at, stub in enumerate(self._stubs):
                stub.extra = tuple(Carried(at, i) for i in range(1, outputs))
            hidden = torch.zeros(1, 2, width, device=self.device, dtype=self.model.dtype)
            try:
                self.arguments(hidden.as_subclass(_Undivided) if outputs == 1 else hidden)
            except _Divided:
                continue
            except ValueError as error:
                if "to unpack" not in str(error):
                    raise
                continue
            return outputs
        raise ValueError(f"a {self.model.config.model_type} calls its layers in a way that is not known")


class _Stub(nn.Module):
    """Replaces a decoder layer: remembers what it is called with, and hands the hidden states on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # hidden from torch
        self.arguments = Arguments()
        self.hidden = torch.empty(0)
        self.given: Tensor | None = None
        self.extra: tuple[Carried, ...] = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)  # the model asks a layer of its kind

    def forward(self, hidden_states: Tensor, *positional: Any, **named: Any) -> Any:
        self.arguments, self.hidden = Arguments(positional, named), hidden_states
        out = hidden_states if self.given is None else self.given
        return (out, *self.extra) if self.extra else out


class _Divided(Exception):
    """The model takes apart what a layer returned."""


class _Undivided(Tensor):
    """Hidden states that cannot be mistaken for several outputs."""

    def __iter__(self) -> Any:
        raise _Divided

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, int):
            raise _Divided
        return super().__getitem__(at)


def config_of(config: Config) -> PretrainedConfig:
    """The configuration of transformers for a config.json, whose infinities are written in transformers' own way."""
    named = str(config["model_type"])
    model_type = ALIASES.get(named, named)
    made: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(_numbers(dict(config) | {"model_type": model_type}))
    return made


def _numbers(value: Any) -> Any:
    """The value with its objects {"__float__": "Infinity"} as numbers."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if set(value) == {"__float__"} else {k: _numbers(v) for k, v in value.items()}
    return [_numbers(v) for v in value] if isinstance(value, list) else value


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have parameters in this precision, unless their class says otherwise, as when transformers loads them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def layers_of(model: Any) -> Any:
    """The decoder layers of a model of transformers, a list of modules."""
    return model.get_submodule(container_of(model, int(model.config.num_hidden_layers)))


def container_of(model: nn.Module, layers: int) -> str:
    """The name of the list of decoder layers. Raises ValueError if there is none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return name
    raise ValueError(f"{type(model).__name__} has no list of {layers} decoder layers")
