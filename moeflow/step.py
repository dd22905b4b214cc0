"""A step is one function, its parameters, and the steps whose output it reads.

Calling a function marked with `@step` computes nothing. It returns a `Step`: a frozen value whose `key` names the output
before the output exists. What is computed goes into the key; where it runs (GPUs, bucket, cluster) never does. This module
does no I/O and knows neither Ray, S3 nor torch.

The signature of a step's function says what it reads: positional parameters are inputs, each one artifact, a tuple of them, or
None if absent; keyword-only parameters are plain values or options (`moeflow.options`).
"""

import hashlib
import inspect
import json
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, wraps
from itertools import islice
from pathlib import Path
from typing import Any, Concatenate, Literal, NoReturn, ParamSpec, Protocol

from moeflow import options
from moeflow.source_digest import source_digest

Arithmetic = Literal["bfloat16", "float16", "float32", "float64", "factors", "text"]
"""What operations are, which decides how fast they are: products of matrices in a precision, eigenvalues and triangular factors,
or bytes of "text" that become tokens."""
P = ParamSpec("P")


class Artifact(Protocol):
    """One input of a running step: a read-only folder whose files are downloaded on first use."""

    @property
    def key(self) -> str:
        """The key of the step that made it."""

    def names(self) -> list[str]:
        """The names of its files, sorted, as paths relative to the folder; reads no file."""

    def size(self, name: str) -> int:
        """The size of one file in bytes; reads no file."""

    def file(self, name: str) -> Path:
        """The path of one whole file on this machine. Raises FileNotFoundError, naming the files that exist."""

    def read(self, name: str, start: int, stop: int) -> bytes | memoryview:
        """The bytes [start, stop) of one file, without downloading the rest; if they are many, maybe as a view of the file's pages,
        which who keeps them copies."""

    def folder(self) -> Path:
        """The path of a folder on this machine with all files."""


class Context(Protocol):
    """What a running step gets besides its inputs."""

    out: Path  # its output folder, empty at the start; in a gang, rank 0's becomes the output
    scratch: Path  # a folder that is deleted when the step ends
    rank: int  # of this process in its gang; 0 outside one
    local_rank: int  # among the gang's processes on this machine, as in LOCAL_RANK; 0 outside one
    processes: int  # of the gang; 1 outside one
    settings: Mapping[str, Any]  # `Resources.settings`
    reads: int  # bytes that it has read from elsewhere than its inputs: it adds to them
    stands_for: Mapping[str, str]  # of an output that is a note of files elsewhere: their SHA-256 by name, for early cutoff

    def progress(self, done: int, total: int, unit: str, detail: str = "") -> None:
        """Report how far the step is, in `unit` ("bytes"). In a gang only rank 0's progress, scalars, notes and links count."""

    def scalars(self, at: int, values: Mapping[str, float]) -> None:
        """Report the numbers behind optimizer step `at`, such as {"loss": 3.2}, to who follows the run; they are kept nowhere."""

    def note(self, text: str) -> None:
        """Add a remark to the run's output and the artifact's record."""

    def link(self, artifact: Artifact, name: str, to: str | None = None) -> None:
        """Put one file of an input into the output, as `to` or under its own name, without copying it."""

    def save(self, folder: Path, at: int = 0) -> None:
        """Save the files of `folder` as this step's partial state, in place of the previous one.

        In a gang every process calls it, with file names that no other process uses and with the same `at` (the optimizer
        step), which must grow from call to call. It copies the files and returns; they are uploaded while the step goes
        on, and replace the previous state once those of all processes are stored. Raises ValueError if `at` does not
        grow, and StoreError, also for the previous call.
        """

    def resume(self) -> Path | None:
        """The folder with the partial state that an interrupted run of this step saved, or None.

        In a gang it has the files of all processes, if they are as many as then. A machine's processes share it: do not write.
        """


@dataclass(frozen=True)
class Resources:
    """What one run of a step, or each process of a gang, may use. Never part of a key. Raises ValueError, TypeError.

    With `processes` a step is a gang: its function runs in that many processes at once, all with the same inputs and parameters.
    The environment gives each its place as torch.distributed reads it: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT. On a cluster torch.distributed is initialised before the function starts.
    """

    cpus: float = 1
    gpus: float = 0  # for a step that computes on a GPU if there is one
    memory: int = 0  # bytes; 0 means what the step's spec says
    processes: int = 0  # of a gang; 0 means one call on one worker
    device: int = 0  # bytes that each process of a gang needs on its device, for plans, as the next three
    exchanged: int = 0  # bytes that each process sends to the others in all
    times: float = 1.0  # how often the operations of its spec are done: more than once where memory is saved so
    repeats: float = 0.0  # the part of its work that is done again, at most, when a process is lost
    settings: Mapping[str, Any] = field(default_factory=dict)  # JSON values that say how or where it runs, as the step sees them

    def __post_init__(self) -> None:
        if self.processes < 0 or self.device < 0:
            raise ValueError(f"processes={self.processes} and device={self.device} must not be negative")
        if (self.device or self.exchanged) and not self.processes:
            raise ValueError(f"device={self.device} and exchanged={self.exchanged} are for gangs; say processes=1 or more")
        if self.processes and self.cpus <= 0:
            raise ValueError(f"cpus={self.cpus}: each process of a gang holds some; say cpus=1")
        object.__setattr__(self, "settings", _plain("resources", "settings", dict(self.settings)))


@dataclass(frozen=True)
class Spec:
    """What is known of a step's output before it exists; the specs of the steps that read it get `output`."""

    output: Any = None
    reads: int = 0  # bytes read from the inputs
    writes: int = 0  # bytes of its output files
    operations: Mapping[Arithmetic, int] = field(default_factory=dict)  # a multiplication and an addition are two
    memory: int = 0  # peak bytes resident, on CPUs
    device: int = 0  # peak bytes on its GPU, if it has one
    notes: tuple[str, ...] = ()
    optional: bool = False  # with less memory than that the step still ends well: it leaves figures out, and says so
    compiles: bool = False  # whether it needs a C++ compiler where it finds no GPU
    packages: tuple[str, ...] = ()  # what it imports that not every installation of moeflow has (`moeflow.extras`)
    parts: Mapping[str, int] = field(default_factory=dict)  # of parts that depend only on the first inputs: on how many, for plans
    figures: tuple[str, ...] = ()  # of a step that reports: those that a gate may name, "bytes", "kl[prose]" where it is of a text


class Promise:
    """An artifact that does not exist yet, as graph functions pass it on; reading it too early raises TypeError."""

    @property
    def key(self) -> str:
        raise NotImplementedError

    def _early(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{self.key} is a promise: its files are there when the graph has run, for the steps that take it as input")

    names = size = file = read = folder = _early


@dataclass(frozen=True, eq=False)
class Part(Promise):
    """The files of a step's output whose names begin with `prefix`, as an input of their own.

    A step that reads only a part is not run again if another part of the same output changes.
    """

    step: "Step"
    prefix: str

    @property
    def key(self) -> str:
        return f"{self.step.key}/{self.prefix}"

    @property
    def spec(self) -> Spec:
        return self.step.spec


Slots = tuple[tuple[str, int | tuple[int, ...] | None], ...]
"""The names of a step's inputs in order, each with its number of artifacts: None for one alone, several for a tuple of tuples."""


@dataclass(frozen=True, eq=False)
class Step(Promise):
    name: str
    version: int
    fn: Callable[..., None]
    inputs: tuple["Step | Part", ...] = ()  # all artifacts in order
    slots: Slots = ()  # the names of the inputs
    params: dict[str, Any] = field(default_factory=dict)  # as in the key
    resources: Resources = field(default_factory=Resources)
    describe: Callable[..., Spec] | None = None
    reports: tuple["Step", ...] = ()
    notes: tuple[str, ...] = ()  # of what a graph left out, which plans show beside those of the spec

    @cached_property
    def key(self) -> str:
        return f"{self.name}-{self._digest([i.key for i in self.inputs])}"

    @cached_property
    def spec(self) -> Spec:
        """The result of the step's `spec` function; raises what that raises if the combination cannot work."""
        if self.describe is None:
            return Spec()
        args, params = arguments(self.fn, self.slots, [i.spec.output for i in self.inputs], self.params)
        return self.describe(*args, **params)

    @property
    def operations(self) -> Mapping[Arithmetic, int]:
        """What one run of it takes; of a gang, each of its processes."""
        part = self.resources.times / max(1, self.resources.processes)
        return {kind: round(n * part) for kind, n in self.spec.operations.items() if n}

    @property
    def source(self) -> str:
        """A digest of the function's source, empty without a file: recorded, compared and warned about, never part of the key."""
        return source_digest(self.fn)

    def content(self, digests: Sequence[str]) -> str:
        """The key of this recipe on inputs with these contents, whatever recipes made them (early cutoff)."""
        return f"{self.name}-{self._digest(list(digests))}"

    def on(self, **resources: Any) -> "Step":
        """The same step with other resources; the key stays."""
        return self._with(resources=Resources(**resources))

    def with_settings(self, **settings: Any) -> "Step":
        """The same step with these settings beside those that it has; the key stays."""
        return self._with(resources=replace(self.resources, settings={**self.resources.settings, **settings}))

    def part(self, prefix: str) -> Part:
        return Part(self, prefix)

    def reporting(self, *steps: "Step") -> "Step":
        """The same step with reports, steps that describe its output and run with it; the key stays."""
        return self._with(reports=self.reports + steps)

    def noting(self, *notes: str) -> "Step":
        """The same step with notes for those who plan and run it; the key stays."""
        return self._with(notes=self.notes + notes)

    def _with(self, **changes: Any) -> "Step":
        """A copy with changes that affect neither key nor spec, which are reused because they are slow to compute."""
        made = replace(self, **changes)
        vars(made).update({name: vars(self)[name] for name in ("key", "spec") if name in vars(self)})
        return made

    def _digest(self, inputs: list[str]) -> str:
        recipe = {"step": self.name, "version": self.version, "params": self.params, "inputs": grouped(self.slots, inputs)}
        return hashlib.sha256(b"moeflow.step/2\n" + canonical(recipe)).hexdigest()[:32]


def step(
    name: str, *, version: int, spec: Callable[..., Spec] | None = None, **resources: Any
) -> Callable[[Callable[Concatenate[Context, P], None]], Callable[P, Step]]:
    """Mark `fn(context, input, ..., *, parameter, ...)` as a step.

    Raise `version` whenever the same arguments must give another output. `spec` has the function's signature without the
    context, and gets the `output` of each input's spec in place of that input. It says what the result will be, raises
    ValueError if the combination cannot work, and is called at once.
    """

    def mark(fn: Callable[Concatenate[Context, P], None]) -> Callable[P, Step]:
        signature, kinds = _declared(fn)

        @wraps(fn)
        def build(*args: P.args, **kwargs: P.kwargs) -> Step:
            try:
                bound = signature.bind(None, *args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{name}: {error}") from None
            bound.apply_defaults()
            inputs, slots, params = [], [], {}
            for at, parameter in enumerate(signature.parameters.values()):
                value = bound.arguments[parameter.name]
                if parameter.kind is parameter.KEYWORD_ONLY:
                    params[parameter.name] = _plain(name, parameter.name, value, kinds.get(parameter.name))
                elif at and (several := _inputs(name, parameter.name, value)):
                    slots.append((parameter.name, _arity(value)))
                    inputs.extend(several)
            made = Step(name, version, fn, tuple(inputs), tuple(slots), params, Resources(**resources), spec)
            _ = made.key, made.spec  # refuse here what cannot work, with the caller's line in the traceback
            return made

        return build

    return mark


@cache
def _declared(fn: Callable[..., None]) -> tuple[inspect.Signature, dict[str, Any]]:
    return inspect.signature(fn), typing.get_type_hints(fn)


def _inputs(name: str, slot: str, value: Any) -> list[Step | Part]:
    """The steps of one input in order; none if it is absent."""
    if isinstance(value, tuple | list):
        return [step for one in value for step in _inputs(name, slot, one)]
    if value is not None and not isinstance(value, Step | Part):
        raise TypeError(f"{name}: the input {slot} is made of steps, parameters go by keyword; got {value!r}")
    return [] if value is None else [value]


def _arity(value: Any) -> int | tuple[int, ...] | None:
    if not isinstance(value, tuple | list):
        return None
    return tuple(map(len, value)) if isinstance(value[0], tuple | list) else len(value)


def grouped(slots: Slots, values: Sequence[Any]) -> dict[str, Any]:
    """Group values, one per artifact in the order of the inputs, by the inputs' names: single ones, tuples, tuples of tuples."""
    rest, groups = iter(values), {}
    for name, count in slots:
        if count is None:
            groups[name] = next(rest)
        elif isinstance(count, int):
            groups[name] = tuple(islice(rest, count))
        else:
            groups[name] = tuple(tuple(islice(rest, n)) for n in count)
    return groups


def arguments(
    fn: Callable[..., None], slots: Slots, inputs: Sequence[Any], params: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The positional and keyword arguments of a step's function (after its context) and of its spec.

    `inputs`: one value for each artifact. Options become values again.
    """
    signature, kinds = _declared(fn)
    by_name = grouped(slots, inputs)
    args: list[Any] = []
    for name, parameter in list(signature.parameters.items())[1:]:
        if parameter.kind is parameter.KEYWORD_ONLY:
            break
        if parameter.kind is parameter.VAR_POSITIONAL:
            args += by_name.get(name, ())
        elif name in by_name:
            args.append(by_name[name])
        else:  # absent
            args.append(() if typing.get_origin(kinds.get(name)) is tuple else None)
    return args, {name: options.restored(value, kinds.get(name)) for name, value in params.items()}


def upstream(targets: Iterable[Step]) -> list[Step]:
    """The targets and every step they need, each once (by key), inputs before the steps that read them."""
    order: dict[str, Step] = {}
    stack = [(t, False) for t in reversed(list(targets))]
    while stack:
        current, expanded = stack.pop()
        if expanded:
            order.setdefault(current.key, current)
        elif current.key not in order:
            stack.append((current, True))
            stack.extend((step_of(i), False) for i in reversed(current.inputs))
    return list(order.values())


def placed(target: Step, place: Callable[[Resources], Resources]) -> Step:
    """The same graph with other resources; all keys stay."""
    made: dict[str, Step] = {}

    def again(promise: Step | Part) -> Step | Part:
        return Part(made[promise.step.key], promise.prefix) if isinstance(promise, Part) else made[promise.key]

    for s in upstream([target, *target.reports]):
        made[s.key] = s._with(inputs=tuple(map(again, s.inputs)), resources=place(s.resources), reports=())
    return made[target.key]._with(reports=tuple(made[r.key] for r in target.reports))


def step_of(promise: Step | Part) -> Step:
    return promise.step if isinstance(promise, Part) else promise


def canonical(value: Any) -> bytes:
    """`value` as JSON, with one spelling for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _plain(name: str, key: str, value: Any, kind: Any = None) -> Any:
    """A parameter as it comes back from JSON, so that the function gets exactly what was hashed."""
    try:
        loaded = json.loads(canonical(options.plain(value, kind)))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: parameter {key}={value!r} has no stable form ({error}); pass plain JSON values: "
            "numbers, strings, lists, dictionaries with string keys, and options made of these"
        ) from None
    if isinstance(value, dict) and any(not isinstance(k, str) for k in value):
        raise TypeError(f"{name}: parameter {key}={value!r} has keys that are no strings; pass a list of pairs instead")
    return loaded
