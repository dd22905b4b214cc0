"""How words become the parameters of a pipeline's build()."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

from moeflow.options import check_choices, plain
from moeflow.run.pipeline import call, load, page
from moeflow.sources import Source, Texts
from moeflow.step import Step
from moeflow.store import Store
from tests.run import toy


def received(build: Callable[..., Step], *words: str) -> dict[str, Any]:
    """What build() received, by way of the step it made."""
    return call(build, words).params


def build(
    first: str = "a",
    *,
    keep: int = 6,
    rate: float = 0.5,
    on: bool = False,
    maybe: int | None = None,
    search: Literal["layerwise", "progressive"] = "layerwise",
    layers: list[int] | None = None,
    untyped=3,
) -> Step:
    return toy.shards(values=[first, keep, rate, on, maybe, search, layers, untyped])


def test_defaults_stand() -> None:
    assert received(build)["values"] == ["a", 6, 0.5, False, None, "layerwise", None, 3]


def test_words_are_read_as_annotations_and_defaults_say() -> None:
    words = ["keep=4", "rate=1e-3", "on=true", "maybe=7", "search=progressive", "layers=[1, 2]", "untyped=9", "first=b=c"]
    assert received(build, *words)["values"] == ["b=c", 4, 0.001, True, 7, "progressive", [1, 2], 9]
    assert received(build, "maybe=none")["values"][4] is None


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("keeep=4", "no parameter 'keeep'; did you mean 'keep'?"),
        ("zzz=4", "no parameter 'zzz'; it has first, keep, rate"),
        ("keep", "write -p name=value"),
        ("keep=four", "must be a whole number"),
        ("rate=fast", "must be a number"),
        ("on=perhaps", "true or false"),
        ("search=random", "choose one of layerwise, progressive"),
        ("layers=1,2", "JSON"),
    ],
)
def test_words_that_do_not_fit_are_refused_with_the_way_out(word: str, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        call(build, [word])


def test_a_parameter_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="given twice"):
        call(build, ["keep=4", "keep=5"])


def test_what_has_no_default_is_asked_for() -> None:
    def needs(*, model: str, tokens: str, keep: int = 6) -> Step:
        raise AssertionError("never built")

    with pytest.raises(ValueError, match=r"needs -p model=\.\.\. -p tokens=\.\.\."):
        call(needs, ["keep=4"])


def test_a_source_is_pinned_and_texts_are_kept_for_later(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    got: dict[str, Any] = {}

    def takes(model: Source, *, tokens: Texts, heldout: Texts | None = None, tuned: Source | None = None) -> Step:
        got.update(model=model, tokens=tokens, heldout=heldout, tuned=tuned)
        return toy.number(n=1)

    call(takes, [f"model={tmp_path / 'model'}", "tokens=hf://datasets/nobody/nothing#text"])
    assert isinstance(got["model"], Source) and "config.json" in [f.name for f in got["model"].files]
    assert got["tokens"] == Texts("hf://datasets/nobody/nothing#text"), "nobody was asked for it"
    assert (got["heldout"], got["tuned"]) == (None, None)


def test_a_default_that_names_a_source_is_pinned_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    got: list[object] = []

    def takes(model: Source | str = str(tmp_path)) -> Step:
        got.append(model)
        return toy.number(n=1)

    call(takes, [])
    assert isinstance(got[0], Source)


def test_annotations_may_be_strings(tmp_path: Path) -> None:
    path = tmp_path / "postponed.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from moeflow.step import Step\n"
        "from tests.run import toy\n"
        "def build(*, keep: int = 6) -> Step:\n"
        "    return toy.number(n=keep)\n"
    )
    assert call(load(path), ["keep=4"]).params["n"] == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def bild(): ...", "defines no function `build`"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("def build(:", "SyntaxError"),
    ],
)
def test_a_file_that_is_no_pipeline_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        load(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.py"):
        load(tmp_path / "missing.py")


def test_a_pipeline_returns_a_step() -> None:
    def returns() -> Step:
        return json  # type: ignore[return-value]

    with pytest.raises(ValueError, match="returned module"):
        call(returns, [])


def test_steps_defined_in_the_pipeline_run_on_both_runners(run: Callable, store: Store, tmp_path: Path) -> None:
    path = tmp_path / "own_steps.py"
    path.write_text(
        "from moeflow.step import step\n"
        "def helper(): return 'made by a helper'\n"
        "@step('own.make', version=1)\n"
        "def make(context): (context.out / 'n').write_text(helper())\n"
        "def build(): return make()\n"
    )
    target = call(load(path), [])
    run([target], store)
    assert store.artifact(target.key).file("n").read_text() == "made by a helper"


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded. More is said below."""

    method: Literal["nearest", "gptq"] = "nearest"
    """Which point of the grid a weight takes."""
    bits: int = 4
    """Bits of a weight."""
    damp: float = 0.01
    """Added to the diagonal, as a part of its mean."""

    def __post_init__(self) -> None:
        check_choices(self)


def rounded(*, weights: Rounding = Rounding(), again: Rounding | None = None, bits: int = 3) -> Step:
    return toy.shards(values=[plain(weights), plain(again), bits])


def test_a_field_of_options_is_a_parameter_of_its_own() -> None:
    assert received(rounded)["values"] == [{}, None, 3]
    assert received(rounded, "weights.bits=8", "weights.damp=1")["values"] == [{"bits": 8, "damp": 1.0}, None, 3]
    assert received(rounded, "weights=gptq", "weights.bits=2")["values"] == [{"method": "gptq", "bits": 2}, None, 3]
    assert received(rounded, "again.bits=8")["values"] == [{}, {"bits": 8}, 3]
    assert received(partial(rounded, again=Rounding(bits=2)), "again=none")["values"] == [{}, None, 3]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("weights.bitz=8", "-p weights has no 'bitz'; did you mean 'bits'?"),
        ("weights.bits=many", "-p weights.bits=many: it must be a whole number"),
        ("weights.method=awq", "-p weights.method=awq: choose one of nearest, gptq"),
        ("weights=awq", "-p weights.method=awq: choose one of nearest, gptq"),
        ("weights=none", "weights cannot be absent"),
        ("damp=0.1", "no parameter 'damp'; did you mean weights.damp or again.damp?"),
        ("bits.more=1", "bits has no fields; write -p bits=value"),
    ],
)
def test_fields_that_do_not_fit_are_refused_with_the_way_out(word: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        call(rounded, [word])


def test_a_page_lists_every_field_with_its_type_default_choices_and_documentation() -> None:
    text = page(partial(rounded, weights=Rounding(bits=2)))
    lines = text.splitlines()
    (at,) = (n for n, line in enumerate(lines) if "weights.bits" in line)
    assert lines[at].split() == ["weights.bits", "int", "2"] and lines[at + 1].strip() == "Bits of a weight."
    (at,) = (n for n, line in enumerate(lines) if "again.method" in line)
    assert lines[at].split() == ["again.method", "choice", "nearest"] and lines[at + 1].endswith("One of nearest, gptq.")
    assert "How weights are rounded" in text and "More is said" not in text


@dataclass(frozen=True)
class Quantizing:
    """How a matrix is quantized."""

    group: int = 64
    """Weights that share a scale."""
    rounding: Rounding | None = None
    """How its weights are rounded."""


def quantized(*, how: Quantizing = Quantizing(), bits: int = 3) -> Step:
    return toy.shards(values=[plain(how), bits])


def test_options_within_options_are_named_like_parameters_or_within_their_own() -> None:
    whole = [{"group": 8, "rounding": {"method": "gptq", "bits": 2}}, 3]
    assert received(quantized, "how.group=8", "rounding=gptq", "rounding.bits=2")["values"] == whole
    assert received(quantized, "how=8", "how.rounding=gptq", "how.rounding.bits=2")["values"] == whole
    assert received(quantized)["values"] == received(quantized, "rounding=none")["values"] == [{}, 3]
    with_rounding = partial(quantized, how=Quantizing(rounding=Rounding(bits=2)))
    assert received(with_rounding, "rounding.damp=1")["values"] == [{"rounding": {"bits": 2, "damp": 1.0}}, 3]
    assert received(with_rounding, "rounding=none")["values"] == [{}, 3]
    lines = page(quantized).splitlines()
    (at,) = (n for n, line in enumerate(lines) if "rounding.bits" in line)
    assert lines[at].split() == ["rounding.bits", "int", "4"] and lines[at + 1].strip() == "Bits of a weight."


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rounding.bitz=8"], "-p how.rounding has no 'bitz'; did you mean 'bits'?"),
        (["rounding=none", "rounding.bits=8"], "-p how.rounding=none: how.rounding cannot be absent and have fields"),
        (["rounding=gptq", "how.rounding=gptq"], "-p how.rounding is given twice"),
        (["damp=0.1"], "no parameter 'damp'; did you mean rounding.damp?"),
        (["how.group.more=1"], "-p how.group has no fields"),
        (["rounding.bits.more=1"], "-p how.rounding.bits has no fields"),
    ],
)
def test_words_for_options_within_options_that_do_not_fit_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        call(quantized, words)


PIPELINES = sorted((Path(__file__).parents[2] / "pipelines").glob("*.py"))


@pytest.mark.parametrize("path", PIPELINES, ids=lambda p: p.stem)
def test_every_pipeline_says_that_weights_may_be_copied_or_referred_to(path: Path) -> None:
    shown = " ".join(page(load(path)).split())
    assert "source choice" in shown and "One of copy, refer." in shown


def test_whether_a_source_is_copied_is_a_parameter_of_every_pipeline_with_one(tmp_path: Path) -> None:
    def of_model(model: Source) -> Step:
        return toy.shards(values=[model.refer])

    def own(model: Source, *, source: str = "mine") -> Step:
        return toy.shards(values=[model.refer, source])

    folder = tiny_source(tmp_path)
    assert [received(of_model, f"model={folder}", *more)["values"] for more in ([], ["source=refer"], ["source=copy"])] == [
        [True], [True], [False],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="-p source=link: choose one of copy, refer"):
        call(of_model, [f"model={folder}", "source=link"])
    with pytest.raises(ValueError, match="-p source.x=1: source has no fields"):
        call(of_model, [f"model={folder}", "source.x=1"])
    with pytest.raises(ValueError, match="the pipeline has no parameter 'source'"):
        call(build, ["source=copy"])
    assert received(own, f"model={folder}", "source=theirs")["values"] == [True, "theirs"]
    assert "One of copy, refer" not in page(build) + page(own)


def test_the_layout_of_a_result_is_a_parameter_of_every_pipeline_with_a_source(tmp_path: Path) -> None:
    def of_model(model: Source) -> Step:
        values: list[Any] = [model.layout]
        return toy.shards(values=values)

    folder = tiny_source(tmp_path)
    assert received(of_model, f"model={folder}")["values"] == ["source"]
    assert received(of_model, f"model={folder}", "layout=per_expert")["values"] == ["per_expert"]
    with pytest.raises(ValueError, match="-p layout=fused: choose one of source, per_expert"):
        call(of_model, [f"model={folder}", "layout=fused"])
    assert "How the result has its experts on disk" in page(of_model)
    assert "How the result has its experts on disk" not in page(build)


def tiny_source(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder
