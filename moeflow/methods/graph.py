"""What graph functions pass to each other: a model, and its calibration. No steps, no torch."""

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from moeflow.arch import Config, Family, Layout
from moeflow.model.layout import ESSENTIAL
from moeflow.model_files import named_like
from moeflow.options import check_choices
from moeflow.step import Context, Part, Step

if TYPE_CHECKING:
    from moeflow.sources import Mtp

REST = "rest.safetensors"
HIDDEN = "hidden.safetensors"
TOKENS, LEARNED = "tokens.npy", "learned.npy"
TOKENIZERS = ("tokenizer*", "*.model", "*.tiktoken")
"""The files of which a checkpoint with a tokenizer has one."""


@dataclass(frozen=True)
class Form:
    """How a checkpoint's files differ from the layer files of its graph, so that a result is written as its source was."""

    whole: Config  # the source's config.json, of which the model's configuration may be a part
    layout: Layout  # of the result
    beside: Step | None = None  # the tensors of a multimodal model beside its text model


@dataclass(frozen=True)
class Model:
    """A checkpoint as a graph: one step per decoder layer, one for the rest, and the configuration, which is known already."""

    config: Config
    rest: Step
    texts: Step | Part  # holds the tokenizer's files
    layers: tuple[Step, ...]
    extra: tuple[Step, ...] = ()  # multi-token-prediction layers, numbered on behind the decoder layers
    choices: tuple[Step, ...] = ()  # the decisions made so far
    form: Form | None = None  # None: as the layer files
    tokenizer_code: str = ""  # the class of its own without which its tokenizer cannot be read
    has_template: bool = False  # whether its tokenizer renders conversations
    mtp: "Mtp" = "drop"  # what becomes of the prediction layers

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can become tokens."""
        return not self.without_tokenizer

    @property
    def without_tokenizer(self) -> str:
        """Why text cannot become tokens, as the beginning of a message; "" if it can."""
        if self.tokenizer_code:
            return f"the model's tokenizer is code of its own ({self.tokenizer_code:.99}), which travels along and is never run"
        files = self.rest.spec.output.files
        return "" if any(named_like(n, TOKENIZERS) for n in files) else "the model has no tokenizer"

    @property
    def essential(self) -> Part:
        """The configuration as an input, reduced to what changes the model's outputs."""
        return self.rest.part(ESSENTIAL)

    @property
    def moe_layers(self) -> list[int]:
        """The decoder layers that have routed experts, or may have them once a run decides."""
        return [i for i in Family.of(self.config).moe_layers if self.layers[i].spec.output.experts]

    @property
    def does_with_fewer(self) -> bool:
        """Whether fewer experts compute a token than the router chooses: skipping, or Compressed Experts."""
        formats = [self.layers[i].spec.output.format for i in self.moe_layers]
        return any(f.skip or f.compressed for f in formats)

    @property
    def prediction_layers(self) -> list[int]:
        """The numbers of its multi-token-prediction layers."""
        return list(range(len(self.layers), len(self.layers) + len(self.extra)))

    def layer(self, number: int) -> Step:
        """A decoder layer or a prediction layer, by its number."""
        return (*self.layers, *self.extra)[number]

    def with_layers(self, layers: dict[int, Step], choices: tuple[Step, ...] = ()) -> "Model":
        """The same model with some layers replaced; each new layer says how many experts it has."""
        changed = [layers.get(i, layer) for i, layer in enumerate((*self.layers, *self.extra))]
        decoder, extra = changed[: len(self.layers)], changed[len(self.layers) :]
        return replace(self, layers=tuple(decoder), extra=tuple(extra), choices=self.choices + choices)

    def check_keep(self, keep: int | None) -> None:
        """Raise ValueError if decoder layers are to get `keep` experts (None: as a run decides) beside prediction layers that stay
        as they are."""
        if self.mtp != "keep":
            return
        for number in self.prediction_layers:
            if (experts := self.layer(number).spec.output.experts) != keep:
                raise ValueError(
                    f"mtp='keep': multi-token-prediction layer {number} has {experts} experts, and the decoder layers are to have "
                    f"{'as many as a run decides' if keep is None else keep}: they load only with the same number; take "
                    "mtp='prune' or mtp='drop'"
                )


@dataclass(frozen=True)
class Sample:
    """How much text is read, and how it is cut into sequences. Raises ValueError for impossible options."""

    sequences: int = 128
    """Sequences in the token matrix."""
    length: int = 2048
    """Tokens per sequence."""
    seed: int = 0
    """The seed that shuffles the documents."""
    bos: bool | None = None
    """A beginning-of-sequence token before each document; none: if the tokenizer has one and does not say add_bos_token=false."""
    eos: bool = False
    """Put an end-of-sequence token after each document."""
    group: int = 0
    """Documents joined at a time; an incomplete sequence at a group's end is dropped (NAEE's code: 1000). 0: all."""

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.length < 2 or self.group < 0:
            raise ValueError(
                f"sequences={self.sequences} of length={self.length}: there must be at least one, of at least two tokens; "
                f"and group={self.group} must not be negative"
            )


@dataclass(frozen=True)
class Pass:
    """How a model is run over text, and what is recorded on the way. Raises ValueError for impossible options."""

    batch: int = 0
    """At most so many sequences run together; 0: as many as the device has room for. What is computed is the same, but for last
    bits."""
    shard: int = 32
    """Sequences per task; 0, which recipes of earlier releases say: 32."""
    stage: int = 8
    """Consecutive layers per task."""
    record: int | None = None
    """Tokens whose MoE inputs are kept, all shards together; none: all."""
    per_expert: int = 0
    """Also keep tokens until every expert has this many in each shard."""
    dtype: Literal["auto", "float64", "float32", "float16", "bfloat16"] = "auto"
    """The precision of the run; auto: the checkpoint's own."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.shard:
            object.__setattr__(self, "shard", 32)
        if self.stage < 1 or self.shard < 1:
            raise ValueError(f"shard={self.shard} sequences and stage={self.stage} layers must be at least 1")
        if min(self.batch, self.record or 0, self.per_expert) < 0:
            raise ValueError(f"batch={self.batch}, record={self.record} and per_expert={self.per_expert} must not be negative")

    def recorded(self, sequences: int, length: int, shard: int) -> int:
        """Of how many tokens of each shard, of all `sequences` in shards of `shard`, the MoE inputs are kept."""
        return shard * length if self.record is None else -(-self.record // -(-sequences // shard))

    def bounded(self, step: Step) -> Step:
        """The same step, running at most `batch` sequences together; the key stays."""
        return step.with_settings(batch=self.batch) if self.batch else step


def at_most(context: Context) -> int:
    """How many sequences a running step takes together at most, as `Pass.bounded` said; 0: as many as there is room for."""
    return int(context.settings.get("batch", 0))


@dataclass(frozen=True)
class Calibrating(Pass, Sample):
    """The text on which a model is calibrated, and how the model is run over it, set as one value."""

    def __post_init__(self) -> None:
        Sample.__post_init__(self)
        Pass.__post_init__(self)

    @property
    def sample(self) -> Sample:
        return Sample(self.sequences, self.length, self.seed, self.bos, self.eos, self.group)

    @property
    def passed(self) -> Pass:
        return Pass(self.batch, self.shard, self.stage, self.record, self.per_expert, self.dtype)


@dataclass(frozen=True)
class Calibration:
    """One pass of a model over a token matrix: what was recorded in each MoE layer, shard by shard, and the last hidden states."""

    model: Model
    tokens: Step
    passed: Pass
    starts: tuple[Step, ...]  # per shard: hidden states before the first layer
    ends: tuple[Step, ...]  # per shard: hidden states behind the last layer
    states: dict[int, tuple[Step, ...]]  # per layer that begins a stage: hidden states before it
    observed: dict[int, tuple[Part, ...]]  # per MoE layer: one part for each shard
    recorded: int  # at most so many tokens of each shard have their MoE inputs kept
    between: tuple[tuple[Part, ...], ...] = ()  # per layer, if asked for: the recorded tokens' hidden states before it
    predicted: Mapping[int, tuple[Part, ...]] = field(default_factory=dict)  # as `observed`, per prediction layer to be pruned
    traffic: Mapping[int, Part] = field(default_factory=dict)  # per MoE layer, if the tokens are an engine's: what it counted
    beside: Mapping[int, tuple[Part, ...]] = field(default_factory=dict)  # per MoE layer, if asked for: what its output is added to

    def of(self, layer: int) -> tuple[Part, Step, tuple[Part, ...]]:
        """What a step reads that decides on one layer: configuration, the layer's file, and what every shard recorded in it."""
        return self.model.essential, self.model.layer(layer), {**self.observed, **self.predicted}[layer]

    def check_states(self, what: str) -> None:
        """Raise ValueError if there are no hidden states, which `what` ("search=reap") needs: only counts of an engine."""
        spec = self.tokens.spec.output
        if not spec.sequences:
            raise ValueError(
                f"{spec.where}, and {what} needs hidden states: give requests with their token ids, other texts (tokens=...), or "
                "what counts alone decide: search=frequency, trim=experts with trim.criterion=frequency"
            )

    def counted(self, layer: int, needs: Collection[str], what: str) -> tuple[Part, ...]:
        """What a score of a layer's experts is computed from: an engine's counts if they have all of `needs`, otherwise what every
        shard recorded. Raises ValueError if `what` ("search=reap") needs more than there is."""
        if layer in self.traffic and self.tokens.spec.output.gives(needs):
            return (self.traffic[layer],)
        self.check_states(what)
        return {**self.observed, **self.predicted}[layer]

    @property
    def dtype(self) -> str:
        return self.passed.dtype


def load(code: str) -> Any:
    """Import and return the function that a row of a table of methods names as "module:function"."""
    module, _, name = code.partition(":")
    return getattr(importlib.import_module(module), name)
