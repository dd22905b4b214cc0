"""What a key is made of, and what is refused while a graph is built."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moeflow import source_digest
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Sample
from moeflow.methods.recipes import naee, pretrained
from moeflow.sources import Texts
from moeflow.step import Artifact, Context, Spec, Step, arguments, step, upstream


@step("test.source", version=1)
def source(context: Context, *, seed: int = 0) -> None: ...


@step("test.join", version=1)
def join(context: Context, a: Artifact, b: Artifact, *, rate: float) -> None: ...


def at_most_ten(*sizes: int, size: int) -> Spec:
    if size > 10:
        raise ValueError(f"size={size} is over 10; make it smaller")
    return Spec(size, reads=sum(sizes), writes=size, notes=("small",) if size < 3 else ())


@step("test.sized", version=1, spec=at_most_ten)
def sized(context: Context, *inputs: Artifact, size: int) -> None: ...


@step("test.several", version=1)
def several(context: Context, one: Artifact, many: tuple[Artifact, ...], maybe: Artifact | None = None, *, rate: float) -> None: ...


def test_inputs_have_names_and_arity() -> None:
    a, b, c = (source(seed=n) for n in range(3))
    made = several(a, (b, c), rate=1)
    assert made.slots == (("one", None), ("many", 2)) and made.inputs == (a, b, c)
    assert several(a, (b, c), None, rate=1.0).key == made.key
    others = [several(a, (b,), c, rate=1), several(a, (b, c, c), rate=1), several(a, (), b, rate=1), several(a, (), rate=1)]
    assert len({made.key, *(o.key for o in others)}) == 5
    args, params = arguments(made.fn, made.slots, ["A", "B", "C"], made.params)
    assert (args, params) == (["A", ("B", "C"), None], {"rate": 1.0})
    assert arguments(made.fn, several(a, (), b, rate=1).slots, ["A", "B"], {"rate": 2})[0] == ["A", (), "B"]


@step("test.by_layer", version=1)
def by_layer(context: Context, shards: tuple[tuple[Artifact, ...], ...] = (), ends: tuple[Artifact, ...] = ()) -> None: ...


def test_inputs_may_be_tuples_of_tuples() -> None:
    a, b, c, d = (source(seed=n) for n in range(4))
    made = by_layer(((a, b), (), (c,)), (d,))
    assert made.slots == (("shards", (2, 0, 1)), ("ends", 1)) and made.inputs == (a, b, c, d)
    assert arguments(made.fn, made.slots, "abcd", {})[0] == [(("a", "b"), (), ("c",)), ("d",)]
    assert len({made.key, by_layer(((a,), (b,), (c,)), (d,)).key, by_layer(((a, b), (c,)), (d,)).key}) == 3
    assert by_layer(((), ())).key == by_layer().key and arguments(by_layer().fn, (), "", {})[0] == [(), ()]
    with pytest.raises(TypeError, match="the input shards is made of steps"):
        by_layer(((a, 1),))  # type: ignore[arg-type]


def test_a_step_that_has_not_run_cannot_be_read() -> None:
    with pytest.raises(TypeError, match=r"test.source-.* is a promise: its files are there when the graph has run"):
        source().file("config.json")
    with pytest.raises(TypeError, match="is a promise"):
        source().part("a").names()


def test_keys_are_pinned() -> None:
    """A change here re-addresses every artifact ever stored. Mean it, or undo it."""
    assert source().key == "test.source-8b72d4723ad84498cc61694375e05ef2"
    assert join(source(), source(seed=1), rate=0.5).key == "test.join-493d1d98206a227f93c9b0324657c172"


def test_where_a_step_runs_is_not_what_it_is() -> None:
    assert source().on(gpus=8, cpus=4, memory=1 << 30).key == source().key


def test_how_many_processes_run_a_step_and_how_is_not_what_it_is() -> None:
    gang = source().on(processes=8, device=80 << 30, settings={"zero": 3, "micro": 1})
    assert gang.key == source().key and gang.content([]) == source().content([])
    assert join(gang, source(seed=1), rate=0.5).key == join(source(), source(seed=1), rate=0.5).key


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"processes": -1}, "processes=-1 .* must not be negative"),
        ({"processes": 1, "device": -1}, "device=-1 must not be negative"),
        ({"device": 1}, "are for gangs; say processes=1 or more"),
        ({"processes": 2, "cpus": 0}, "cpus=0: each process of a gang holds some"),
    ],
)
def test_resources_that_cannot_be_are_refused(wrong: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        source().on(**wrong)
    with pytest.raises(TypeError, match="has no stable form"):
        source().on(processes=1, settings={"x": object()})


def test_reports_are_not_part_of_what_they_describe() -> None:
    assert source().reporting(sized(size=1)).key == source().key


@pytest.mark.parametrize(
    "other",
    [
        join(source(seed=2), source(seed=1), rate=0.5),
        join(source(seed=1), source(), rate=0.5),
        join(source(), source(seed=1), rate=0.25),
        join(source().part("a"), source(seed=1), rate=0.5),
    ],
)
def test_what_a_step_reads_and_is_told_makes_its_key(other: Step) -> None:
    assert other.key != join(source(), source(seed=1), rate=0.5).key


def test_a_spelled_out_default_is_the_default() -> None:
    assert source(seed=0).key == source().key


def test_equal_contents_under_other_recipes_give_one_content_key() -> None:
    one, two = join(source(), source(seed=1), rate=0.5), join(source(seed=3), source(seed=4), rate=0.5)
    assert one.content(["x", "y"]) == two.content(["x", "y"]) != one.content(["y", "x"])
    assert join(source(), source(), rate=0.1).content(["x", "y"]) != one.content(["x", "y"])


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda: join(source(), rate=0.5), "missing a required argument"),
        (lambda: join(source(), "s3://bucket/model", rate=0.5), "the input b is made of steps"),
        (lambda: join(source(), source(), rate=float("nan")), "rate=nan has no stable form"),
        (lambda: source(seed=object()), "has no stable form .* pass plain JSON values"),
        (lambda: source(seed={1: 2}), "keys that are no strings"),
        (lambda: source(sed=1), "unexpected keyword argument 'sed'"),
    ],
)
def test_a_wrong_call_fails_when_the_graph_is_built(wrong: Callable[[], Step], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        wrong()


def test_a_spec_sees_its_inputs_and_refuses_while_the_graph_is_built() -> None:
    made = sized(sized(size=4), sized(size=2).part("x"), size=9)
    assert (made.spec.output, made.spec.reads, made.spec.writes) == (9, 6, 9)
    with pytest.raises(ValueError, match="size=11 is over 10"):
        sized(made, size=11)


def test_everything_upstream_comes_once_and_before_what_reads_it() -> None:
    a, b = source(), source(seed=1)
    both = join(a, b.part("x"), rate=1.0)
    order = upstream([join(both, source(), rate=2.0), both])
    assert [s.key for s in order].index(both.key) > max([s.key for s in order].index(k.key) for k in (a, b))
    assert len(order) == len({s.key for s in order}) == 4


def test_a_chain_of_thousands_of_steps_is_no_recursion() -> None:
    made = sized(size=1)
    for _ in range(3000):
        made = sized(made, size=1)
    assert len(upstream([made])) == 3001


def test_the_recorded_source_covers_the_modules_that_a_step_imports_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what those import, and what a table names as code, but not `step.py` itself."""
    text = Texts("python:stdlib/abc.py")
    model = pretrained.mixtral(text)
    observed = calibrate.run(model, data.tokens(text, model, Sample(8, 16)))
    choice = naee.prune(observed, keep=6).choices[0]

    def source_where_one_file_differs(changed: str) -> str:
        file = Path(source_digest.__file__).parent / changed
        assert file.is_file()
        monkeypatch.setattr(source_digest, "_text", lambda f: f.read_text() + "# changed\n" * (f == file))
        source_digest.source_digest.cache_clear()
        return choice.source

    try:
        as_it_is = source_where_one_file_differs("cli/common.py")
        assert len(as_it_is) == 64 and source_where_one_file_differs("step.py") == as_it_is
        for changed in ("methods/prune/enumeration.py", "model/moe.py", "methods/prune/genetic.py"):
            assert source_where_one_file_differs(changed) != as_it_is
    finally:
        source_digest.source_digest.cache_clear()


def test_a_graph_placed_elsewhere_keeps_every_key() -> None:
    from dataclasses import replace

    from moeflow.step import placed

    report = sized(sized(size=2), size=3)
    target = join(sized(size=2), sized(size=1).part("x"), rate=1.0).reporting(report)
    target = target.on(processes=3, settings={"zero": 1})
    there = placed(target, lambda asked: replace(asked, cpus=7, gpus=2))
    assert (there.resources.processes, there.resources.settings) == (3, {"zero": 1})
    assert [s.key for s in upstream([there, *there.reports])] == [s.key for s in upstream([target, *target.reports])]
    assert {s.resources.cpus for s in upstream([there, *there.reports])} == {7}
    assert there.reports[0].spec.output == 3
