"""A plan foretells which parts of a step's output will be the same again, where its spec says what each depends on."""

from moeflow.run import in_process, node_kinds
from moeflow.run.forecast import forecast
from moeflow.run.plan import plan
from moeflow.step import Artifact, Context, Spec, Step, step
from moeflow.store import Store
from tests.run import toy


def _spec(layers: tuple[object, ...], *, whole: bool) -> Spec:
    return Spec(parts={f"at-{i}": i + 1 for i in range(len(layers))})


@step("test.stage", version=1, spec=_spec)
def stage(context: Context, layers: tuple[Artifact, ...], *, whole: bool) -> None:
    """What every layer adds to those before it; `whole`: every file has all layers, whatever the spec says."""
    every = [b"".join(layer.file(name).read_bytes() for name in layer.names()) for layer in layers]
    for i in range(len(layers)):
        (context.out / f"at-{i}").write_bytes(b"".join(every if whole else every[: i + 1]))
    (context.out / "end").write_bytes(b"".join(every))


@step("test.decided", version=1)
def decided(context: Context, recorded: Artifact, *, at: int) -> None:
    (context.out / "choice").write_bytes(recorded.file(f"at-{at}").read_bytes()[::-1])


@step("test.all", version=1)
def all_of(context: Context, end: Artifact, choices: tuple[Artifact, ...]) -> None:
    (context.out / "all").write_bytes(b"".join([end.file("end").read_bytes(), *(c.file("choice").read_bytes() for c in choices)]))


def graph(*numbers: int, whole: bool = False) -> Step:
    made = stage(tuple(toy.number(n=n) for n in numbers), whole=whole)
    return all_of(made.part("end"), tuple(decided(made.part(f"at-{i}"), at=i) for i in range(len(numbers))))


def test_what_lies_before_a_changed_layer_is_planned_to_stay_and_stays(store: Store) -> None:
    in_process.run([graph(1, 2, 3, 4)], store)
    in_process.run([toy.number(n=9)], store)
    target = graph(1, 2, 9, 4)
    planned = plan([target], store)
    choices = [row.state for row in planned.rows if row.name == "test.decided"]
    assert choices == ["same content", "same content", "run", "run"]
    simulated = forecast([target], store, planned, node_kinds.here(1 << 34), store.index({r.name for r in planned.rows}))
    assert simulated is not None
    outcome = in_process.run([target], store)
    assert [(s.key, s.state) for s in outcome.steps] == [(r.key, r.state) for r in planned.rows]


def test_a_run_goes_by_what_was_really_made(store: Store) -> None:
    in_process.run([graph(1, 2, whole=True), toy.number(n=9)], store)
    target = graph(1, 9, whole=True)
    assert [r.state for r in plan([target], store).rows if r.name == "test.decided"] == ["same content", "run"]
    outcome = in_process.run([target], store)
    assert [s.state for s in outcome.steps if s.name == "test.decided"] == ["run", "run"]
