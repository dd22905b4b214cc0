"""Compare a compressed model with its original: every report of `moeflow.methods.evaluate`, on each held-out text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moeflow.engines import engine_of
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint.steps import counted, lasting, text_model_of
from moeflow.methods.data import steps as data
from moeflow.methods.evaluate.engine import version
from moeflow.methods.evaluate.options import Serving
from moeflow.methods.evaluate.steps import experts_per_token, here, layers, quality, serving, size, speed
from moeflow.methods.graph import Model, Pass, Sample
from moeflow.methods.judge import steps as judge
from moeflow.methods.judge.options import Prompts, Tasks
from moeflow.options import only
from moeflow.sources import NamesFiles, Source, Texts
from moeflow.sources.steps import files_read
from moeflow.sources.texts import WEIGHT
from moeflow.step import Step


@dataclass(frozen=True)
class HeldOut(NamesFiles):
    """The text, the tasks, the prompts and the engine with which a compressed model and its original are compared."""

    texts: str
    """URI[#column[+column]], or a ready-made .npy matrix; several joined by commas, each gets its own report."""
    sequences: int = 64
    """Sequences of each text."""
    length: int = 2048
    """Tokens of a sequence."""
    bos: bool | None = None
    """A beginning-of-sequence token before each document; none: as of `Sample`."""
    tasks: Tasks | None = None
    """Tasks with a right answer."""
    prompts: Prompts | None = None
    """Prompts that both models go on from."""
    serving: Serving | None = None
    """An engine in which both models are measured (docs/serve.md)."""

    def check_files(self) -> None:
        if self.texts:
            Texts(self.texts).check_local()
        for more in (self.tasks, self.prompts):
            if more is not None:
                more.check_files()


SEEN = "the compression was calibrated on {}, too: its divergence there says little of text that it has not seen"
NO_TOKENIZER = "held-out text is left out, the loss on the token matrix stands for it"


def reports(
    original: Model, compressed: Model, heldout: HeldOut, passed: Pass, *, tokens: Step | None = None, engine: str = ""
) -> tuple[Step, ...]:
    """Report on `compressed` beside `original`: size, quality on each held-out text, tasks and prompts, speed, serving.

    `passed`: the pass of the calibration, of which batch size and precision are taken; 64 sequences go to a task, and nothing is
    recorded. Where a text is no ready-made matrix, a model without a tokenizer is evaluated on the matrix `tokens` instead, and the
    report says so; it also says of a text that `tokens` was made of, too. `engine`: what is to load the result, whose resident
    bytes are told. Raises ValueError if that matrix is missing.
    """
    passed = Pass(passed.batch, 64, dtype=passed.dtype)
    seen = set() if tokens is None else files_read(tokens)
    if original.has_tokenizer or (heldout.texts and all(text.is_tokens for text in Texts(heldout.texts).each())):
        texts, sample = Texts(heldout.texts), Sample(heldout.sequences, heldout.length, bos=heldout.bos)
        named = zip(_names(texts), texts.each(), strict=True)
        matrices = [
            (name, data.tokens(text, original, sample), SEEN.format(name) if text.files & seen else "") for name, text in named
        ]
    elif tokens is not None and tokens.spec.output.sequences:
        matrices = [("token matrix", tokens, f"{original.without_tokenizer}: {NO_TOKENIZER}")]
    else:
        why = original.without_tokenizer
        raise ValueError(
            f"{why}, so held-out text cannot become tokens; pass a ready-made matrix or traffic with token ids (tokens=...), or a "
            "matrix as held-out text (FILE.npy)"
        )
    result = lasting(compressed)
    both = counted(original), counted(result)
    chosen = tuple(c for c in compressed.choices if "layer" in c.spec.output and c.spec.output.get("measured", True))
    zeros = sorted({s.slimmed_by for layer in compressed.layers if (s := layer.spec.output).sparse})
    reports = [size(*both, zeros=zeros), *([layers(chosen)] if chosen else [])]
    for name, matrix, note in matrices:
        states = calibrate.hidden_states(original, matrix, passed)
        run = calibrate.run(compressed, matrix, passed, inputs=False) if compressed.does_with_fewer else None
        compressed_states = run.ends if run else calibrate.hidden_states(compressed, matrix, passed)
        heads = original.rest, compressed.rest
        told = quality(*heads, matrix, states, compressed_states, name=name, note=note, dtype=passed.dtype)
        reports.append(told.noting(*[note] * bool(note)))
        if run:
            observed = tuple(run.observed.values())
            reports.append(experts_per_token(original.essential, observed, layers=list(run.observed), name=name))
    whole = text_model_of(original), text_model_of(result)
    judged = judge.Judged(*whole, passed.dtype, original.without_tokenizer, original.has_template)
    keeps = engine if engine and not engine_of(engine).unpacks else ""
    reports.append(speed(*whole, machine=here(), length=heldout.length, engine=keeps))
    if heldout.serving is not None:
        reports.append(_served(*whole, matrices[0][1], heldout.serving))
    answers = judge.reports(judged, heldout.tasks, heldout.prompts)
    _check_named_apart(reports, answers)
    return (*reports, *answers)


def _served(original: Step, compressed: Step, matrix: Step, how: Serving) -> Step:
    """Both models measured in the engine, which is found where it is on this machine: its version is part of what is measured."""
    if not how.python:
        raise ValueError("serving.python names no engine; write the Python of an environment with vLLM, or none for no serving")
    engine = version(how.program)
    what = only(how, "requests", "prompt", "tokens", "rounds", "dtype", "options", "again")
    made = serving(original, compressed, matrix, how=what, machine=here() | {"engine": engine})
    made = made.on(gpus=how.parallel, settings={"python": how.program, "minutes": how.minutes})
    lacks = f"serving.python={how.program} is no Python with vLLM on this machine; where the step's worker has none either, "
    return made if engine else made.noting(f"{lacks}the figures of serving are left out")


def _check_named_apart(reports: Sequence[Step], answers: Sequence[Step]) -> None:
    """Raise ValueError if a task has the name of a figure that is measured in any case, so that a gate's word would mean both."""
    known = {word.partition("[")[0] for step in reports for word in step.spec.figures}
    if same := next((word for step in answers for word in step.spec.figures if word in known), None):
        raise ValueError(f"a task is named {same}, as a figure is that every report has; give it another name")


def _names(texts: Texts) -> list[str]:
    """The name of each text in reports: its file, with its columns, or the words that it was given by, if two would be equal.

    Raises ValueError if a text is there twice.
    """
    entries, given = texts.entries(), [WEIGHT.sub("", text.spec) for text in texts.each()]
    names = [_name(e.source) for e in entries]
    for more in ([f" ({'+'.join(e.columns)})" * bool(e.columns) for e in entries], [f" ({words})" for words in given]):
        names = [f"{name}{m}" if names.count(name) > 1 else name for name, m in zip(names, more, strict=True)]
    if twice := next((words for words in given if given.count(words) > 1), None):
        raise ValueError(f"heldout.texts names {twice} twice; leave one out")
    return names


def _name(source: Source) -> str:
    """The name of a text's file, with its folder if that says more ("wikitext-2-raw-v1/test")."""
    path = (source.files[0].name if len(source.files) == 1 else source.uri).rstrip("/").removeprefix("python:")
    stem = re.sub(r"-\d+-of-\d+$", "", path.rsplit("/", 1)[-1].split("?")[0].split(".")[0])
    return f"{path.split('/')[-2]}/{stem}" if stem in ("train", "test", "validation") and "/" in path else stem
