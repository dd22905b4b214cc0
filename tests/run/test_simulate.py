"""A simulated run obeys what a real one does: inputs first, no more on a node than it has; and it learns from finished steps."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeflow.cli import app
from moeflow.run import StepFailed, in_process, node_kinds, simulate
from moeflow.run.devices import GPUS, is_kind
from moeflow.run.durations import BUCKET, DISK, GANG, Durations, Finished, finished, work_of
from moeflow.run.forecast import forecast, forecast_lines, told
from moeflow.run.node_kinds import NodeKind, NodeKinds
from moeflow.run.plan import plan
from moeflow.run.simulate import BOOT, LIBRARIES, Simulation
from moeflow.run.words import many
from moeflow.step import Artifact, Context, Spec, Step, step, upstream
from moeflow.store import Record, Store
from tests import running
from tests.pipelines import words as sizes
from tests.run.test_node_kinds import cluster

TERA = 10**12
TEXTS = ["tokens=python:stdlib/a*.py", "heldout=python:stdlib/t*.py", "offers.group=16", *sizes.SMALL]
HOUR = 3600 * 989 * TERA * 0.35  # operations of an hour on an H100


@step(
    "toy.compute",
    version=1,
    spec=lambda before, n, operations, memory: Spec(operations={"bfloat16": operations}, memory=memory),
    gpus=1,
)
def compute(context: Context, before: tuple[Artifact, ...], *, n: int, operations: int, memory: int) -> None:
    (context.out / "n").write_text(str(n))


def computing(n: int, *before: Step, hours: float = 1.0, memory: int = 1) -> Step:
    return compute(before, n=n, operations=int(hours * HOUR), memory=memory)


def simulated(store: Store, nodes: NodeKinds, *targets: Step) -> Simulation:
    index = store.index({s.name for s in upstream(targets)})
    result = forecast(targets, store, plan(targets, store, index=index, nodes=nodes), nodes, index)
    assert result is not None
    return result


def h100s(n: int) -> NodeKinds:
    return node_kinds.of_gpus("h100", n)


def test_steps_that_need_not_wait_for_each_other_share_the_gpus_and_a_chain_does_not(store: Store) -> None:
    apart = [computing(n) for n in range(64)]
    one, sixteen = (simulated(store, h100s(n), *apart) for n in (1, 16))
    assert one.seconds == pytest.approx(64 * 3600, rel=0.05) and sixteen.seconds == pytest.approx(4 * 3600, rel=0.2)
    assert sixteen.busy <= sixteen.held and 0.8 < sixteen.utilisation <= 1
    chain = computing(0)
    for n in range(1, 6):
        chain = computing(n, chain)
    alone = simulated(store, h100s(16), chain)
    assert alone.seconds == pytest.approx(6 * 3600, rel=0.2) and alone.chain.names == ("toy.compute",) * 6
    assert alone.chain.seconds <= alone.seconds <= alone.chain.seconds + LIBRARIES + 1


def test_a_node_never_holds_more_than_it_has(store: Store) -> None:
    memory = h100s(8).kinds[0].memory
    wide = [computing(n, memory=int(0.6 * memory)) for n in range(4)]
    assert simulated(store, h100s(8), *wide).seconds == pytest.approx(4 * 3600, rel=0.2), "two of them have no room"
    assert forecast([computing(0, memory=2 * memory)], store, plan([computing(0, memory=2 * memory)], store), h100s(8),
                    store.index(["toy.compute"])) is None  # fmt: skip


def test_what_is_stored_takes_no_time(store: Store) -> None:
    first = computing(1)
    in_process.run([first], store)
    assert simulated(store, h100s(1), computing(2, first)).steps == 1
    index = store.index(["toy.compute"])
    assert forecast([first], store, plan([first], store), h100s(1), index) is None


def test_a_gang_waits_until_all_its_processes_have_room_and_shares_its_work(store: Store) -> None:
    gang = computing(0, hours=8).on(gpus=1, processes=8, exchanged=int(100 * GPUS["h100"].links), repeats=0.25)
    alone = simulated(store, h100s(8), gang)
    assert alone.seconds == pytest.approx(3600 + 100 + GANG + LIBRARIES, rel=0.01)
    assert list(alone.lost.values()) == [pytest.approx(0.25 * (3600 + 100 + GANG), rel=0.01)]
    wide = gang.on(processes=12, gpus=1, exchanged=10**13)
    apart = simulated(store, h100s(16), wide)
    assert list(apart.gangs.values()) == [pytest.approx(8 / 12 * 3600 + 10**13 / GPUS["h100"].network + GANG, rel=0.01)]
    beside = simulated(store, h100s(8), computing(1, hours=0.5), gang)
    assert beside.seconds > alone.seconds + 1000
    (line,) = (text for text in forecast_lines(alone, h100s(8)) if "lost" in text)
    assert line.startswith("toy.compute: 62 min; a process that is lost costs 16 min at most")


def record(seconds: float, device: str, operations: float = HOUR, *, loaded: bool = False) -> Record:
    machine = {"gpu": device, "threads": 1, "loaded": loaded}
    return Record(step="toy.compute", version=1, seconds=seconds, operations={"bfloat16": int(operations)}, machine=machine)


def test_finished_steps_of_like_size_on_such_a_device_tell_how_long_others_take(store: Store, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    def put(*records: Record) -> None:
        for one in records:
            store.commit(f"toy.compute-{len([*store.blobs.list('manifests/')]):032x}", tmp_path / "out", record=one)

    put(record(1, "NVIDIA L40S"), record(1, ""), record(5e6, "NVIDIA H100 80GB HBM3", HOUR * 1000))
    put(record(9, "NVIDIA H100 80GB HBM3", loaded=True))
    assert simulated(store, h100s(1), computing(1)).known == 0, "of other devices, of another size, or mostly loading libraries"
    put(*(record(2 * 3600, "NVIDIA H100 80GB HBM3") for _ in range(3)))
    slow = simulated(store, h100s(1), computing(1), computing(2, hours=2))
    assert slow.known == 2 and slow.seconds == pytest.approx(6 * 3600, rel=0.2)


def test_a_run_records_what_a_forecast_needs(store: Store) -> None:
    target = computing(1)
    in_process.run([target], store)
    (of_one,) = finished([target], store, store.index(["toy.compute"]))["toy.compute"]
    assert of_one.work.operations == target.spec.operations and of_one.device == "" and of_one.seconds > 0
    assert Durations({"toy.compute": (of_one,)}).of(target, None).known


def test_an_l4_is_no_l40s_and_a_100_no_a10() -> None:
    assert is_kind("NVIDIA L4", "l4") and not is_kind("NVIDIA L40S", "l4") and is_kind("Tesla T4", "t4")
    assert is_kind("NVIDIA A100-SXM4-80GB", "a100") and not is_kind("NVIDIA A10G", "a100") and is_kind("", "cpu")


def test_nodes_that_must_be_started_come_later_and_cost_what_their_label_says(store: Store, tmp_path: Path) -> None:
    labelled = ', labels: {dollars-per-hour: "10.5"}'
    nodes = node_kinds.read(cluster(tmp_path, more=labelled))
    result = simulated(store, nodes, computing(1))
    assert result.seconds > BOOT and result.gpus == 4 and result.dollars is None, "the head's price is not said"
    path = cluster(tmp_path, more=labelled)
    path.write_text(path.read_text().replace("resources: {}}", 'resources: {}, labels: {dollars-per-hour: "1"}}'))
    nodes = node_kinds.read(path)
    result = simulated(store, nodes, computing(1))
    assert result.dollars == pytest.approx((1 + 10.5) * result.seconds / 3600)
    assert f"{result.dollars:,.2f} dollars" in forecast_lines(result, nodes)[0]


def test_more_nodes_than_steps_are_not_simulated(store: Store, tmp_path: Path) -> None:
    path = cluster(tmp_path, workers="1000000000")
    path.write_text(path.read_text().replace("max_workers: 2", "max_workers: 1000000000"))
    assert simulated(store, node_kinds.read(path), computing(1)).gpus == 4


SEVERAL = """
max_workers: {workers}
head_node_type: head
available_node_types:
  head: {{node_config: {{InstanceType: m6i.4xlarge}}, labels: {{dollars-per-hour: "1"}}}}
  small: {{node_config: {{InstanceType: g6.2xlarge}}, labels: {{dollars-per-hour: 1e0}}{small}}}
  big: {{node_config: {{InstanceType: p5.48xlarge}}, labels: {{dollars-per-hour: "50"}}{big}}}
"""


def several(folder: Path, workers: int = 2, small: str = "", big: str = "", file: str = SEVERAL) -> NodeKinds:
    path = folder / "several.yaml"
    path.write_text(file.format(workers=workers, small=small, big=big))
    return node_kinds.read(path)


def test_nodes_that_are_there_from_the_start_are_taken_before_others_are_started(store: Store, tmp_path: Path) -> None:
    result = simulated(store, several(tmp_path, big=", min_workers: 2"), *(computing(n) for n in range(20)))
    assert dict(result.nodes) == {"head": 1, "big": 2} and result.seconds < 2.5 * 3600, "nobody waits for a node"
    assert result.dollars == pytest.approx((1 + 2 * 50) * result.seconds / 3600)


def test_a_kind_on_which_a_step_has_room_is_started_though_another_comes_first_in_the_file(store: Store, tmp_path: Path) -> None:
    wide = computing(0, memory=60 << 30)  # more than a small one has
    nodes = several(tmp_path)
    apart = simulated(store, nodes, wide, *(computing(n) for n in range(1, 9)))
    assert dict(apart.nodes)["big"] == 1
    gang = computing(0, memory=60 << 30).on(gpus=1, processes=9)
    assert dict(simulated(store, nodes, gang).nodes)["big"] == 2
    one = several(tmp_path, workers=1, file=SEVERAL.replace("p5.48xlarge", "r6i.8xlarge"))
    both = [computing(0), computing(1, memory=60 << 30).on(gpus=0)]
    planned = plan(both, store, nodes=one)
    assert planned.problems == () and forecast(both, store, planned, one, store.index(["toy.compute"])) is None
    assert told(None, planned, one)[0].startswith("not simulated: ") and "max_workers" in told(None, planned, one)[0]


def test_a_gang_on_nodes_of_two_kinds_is_as_slow_as_the_slower(store: Store, tmp_path: Path) -> None:
    gang = computing(0, hours=9).on(gpus=1, processes=9)
    small, big = SEVERAL.split("\n")[-3:-1]
    swapped = SEVERAL.replace(f"{small}\n{big}", f"{big}\n{small}")
    files = (SEVERAL, swapped)
    one, other = (simulated(store, several(tmp_path, big=", max_workers: 1", file=file), gang).seconds for file in files)
    assert one == pytest.approx(other, rel=0.01) and one > 3 * 3600, "an L4 is slower than an H100"


def test_kinds_of_which_there_is_never_a_node_count_for_nothing(store: Store, tmp_path: Path) -> None:
    never = several(tmp_path, small=", max_workers: 0", big=", max_workers: 0")
    assert [kind.name for kind in never.kinds] == ["head"] and never.unknown == ""
    (problem,) = plan([computing(0, memory=60 << 30)], store, nodes=never).problems
    assert "p5" not in problem and "big" not in problem
    with pytest.raises(ValueError, match="available_node_types.big: min_workers=3 is more than the 2 that max_workers allows"):
        several(tmp_path, big=", min_workers: 3")
    with pytest.raises(ValueError, match=r"head_node_type=\['head'\] is none of available_node_types"):
        several(tmp_path, file=SEVERAL.replace("head_node_type: head", "head_node_type: [head]"))


@step("toy.moved", version=1, spec=lambda before, n: Spec(reads=10**10 if before else 0, writes=10**10))
def moved(context: Context, before: tuple[Artifact, ...], *, n: int) -> None:
    """A step that only reads and writes."""


def in_bucket(store: Store, monkeypatch: pytest.MonkeyPatch, *targets: Step, **finished: Finished) -> Simulation:
    index, nodes = store.index({s.name for s in upstream(targets)}), h100s(8)
    planned, known = plan(targets, store, index=index, nodes=nodes), {f"toy.{name}": (one,) for name, one in finished.items()}
    monkeypatch.setattr(simulate, "LocalBlobs", type(None))
    result = simulate.simulate(targets, store, planned, nodes, Durations(known), index=index)
    assert result is not None
    return result


def test_the_longest_chain_has_what_goes_to_a_bucket_in_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    last = moved((), n=0)
    for n in range(1, 4):
        last = moved((last,), n=n)
    result = in_bucket(store, monkeypatch, last)
    assert result.chain.seconds == pytest.approx(result.seconds, rel=0.01) and result.seconds > 4 * 10**10 / BUCKET


def test_what_a_finished_step_fetched_while_it_was_timed_is_not_charged_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = moved((), n=0)
    in_process.run([first], store)
    took = Finished(work_of(moved((first,), n=1)), 40.0, "")
    result = in_bucket(store, monkeypatch, moved((first,), n=1), moved=took)
    taken = Durations({"toy.moved": (took,)}).of(moved((first,), n=1), None)
    assert taken.seconds == pytest.approx(40 + 10**10 / DISK) and taken.known
    assert result.seconds == pytest.approx(taken.skewed + 10**10 / BUCKET, rel=0.01), "and what it writes goes there"


def test_a_gang_is_not_charged_for_what_it_sends_where_a_finished_one_tells(store: Store) -> None:
    gang = computing(0).on(gpus=1, processes=8, exchanged=int(1800 * GPUS["h100"].links))
    modelled = Durations().of(gang, GPUS["h100"]).seconds
    took = Finished(work_of(gang), modelled - GANG, "NVIDIA H100 80GB HBM3")
    assert Durations({"toy.compute": (took,)}).of(gang, GPUS["h100"]).seconds == pytest.approx(modelled, rel=1e-6)


@step("toy.resumed", version=1)
def resumed(context: Context, *, n: int) -> None:
    if context.resume() is None:
        context.save(context.scratch)
        raise RuntimeError("lost")


def test_steps_that_went_on_from_a_saved_state_tell_nothing(store: Store) -> None:
    target = resumed(n=1)
    with pytest.raises(StepFailed):
        in_process.run([target], store)
    in_process.run([target], store)
    assert store.manifest(target.key).machine["resumed"] is True
    assert not finished([target], store, store.index(["toy.resumed"]))


def test_large_numbers_are_rounded_before_their_unit_is_chosen() -> None:
    assert [many(n) for n in (0, 0.5, 1, 999, 999.6, 999_499, 999_999, 10**9 - 1, 10**12, 3.14e15)] == [
        "", "0.5", "1", "999", "1 k", "999 k", "1 M", "1 G", "1 T", "3.14 P",
    ]  # fmt: skip


def test_gpus_of_an_unknown_kind_are_asked_for(store: Store, tmp_path: Path) -> None:
    own = ', resources: {CPU: 64, memory: 500000000000, GPU: 8}, labels: {gpu-memory-gib: "141"'
    nodes = node_kinds.read(cluster(tmp_path, "{}", own + "}"))
    assert "labels: {gpu-kind: h100}" in nodes.unknown
    assert node_kinds.read(cluster(tmp_path, "{}", own + ", gpu-kind: h200}")).unknown == ""
    with pytest.raises(ValueError, match="available_node_types.gpu.labels.gpu-kind='h9' is no known kind of GPU; say one of t4, "):
        node_kinds.read(cluster(tmp_path, "{}", own + ", gpu-kind: h9}"))
    with pytest.raises(ValueError, match="available_node_types.gpu.labels.dollars-per-hour='much' must be a number"):
        node_kinds.read(cluster(tmp_path, more=", labels: {dollars-per-hour: much}"))


def test_gpus_are_divided_into_machines_of_their_kind() -> None:
    twenty = h100s(20)
    assert [(kind.gpus, kind.most) for kind in twenty.kinds] == [(8, 2), (4, 1)] and len(twenty.all([])) == 3
    assert {node_kinds.of_gpus(kind, 8).kinds[0].gpu for kind in GPUS} == set(GPUS)


def test_a_serial_run_takes_one_step_after_another(store: Store) -> None:
    here = NodeKinds("here", (NodeKind("here", 64, 1 << 40, 0, 0, 1, 1),), 1, "", serial=True)
    steps = [computing(n, hours=1e-6) for n in range(8)]
    result = simulated(store, here, *steps)
    assert result.seconds == pytest.approx(LIBRARIES + sum(Durations().of(s, None).skewed for s in steps), rel=0.01)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpu-kind", "h9", "--gpus", "8"], "--gpu-kind='h9' is no known kind of GPU; say one of t4, "),
        (["--gpu-kind", "h100"], "--gpu-kind h100 needs --gpus, how many of them there are"),
        (["--gpu-kind", "h100", "--gpus", "2.5"], "as a whole number from 1 to 65,536; it is 2.5"),
        (["--gpu-kind", "h100", "--gpus", "1e12"], "from 1 to 65,536; it is 1000000000000.0"),
        (["--gpu-kind", "h100", "--gpus", "inf"], "from 1 to 65,536; it is inf"),
        (["--gpu-kind", "h100", "--gpus", "8", "--on", "ray_cluster.yaml"], "give one of them"),
    ],
)
def test_nodes_that_cannot_be_are_refused(words: list[str], told: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", "tests/toy_pipeline.py", "--store", str(tmp_path / "store"), *words])
    assert result.exit_code == 2 and told in result.output and result.output.count("\n") == 1


@pytest.mark.parametrize("where", [["--gpu-kind", "h100", "--gpus", "8"], ["--on", "ray_cluster.yaml"]])
def test_a_fit_is_planned_for_other_nodes_and_not_run_as_if_it_had_them(where: list[str], tmp_path: Path) -> None:
    model = [str(running.SMALL), "--ratio", "0.25", "--store", str(tmp_path / "store")]
    refused = CliRunner().invoke(app, ["fit", *model, *where])
    assert refused.exit_code == 2 and "which nodes to plan for; add --plan" in refused.output
    texts = [w for p in TEXTS for w in ("-p", p)]
    shown = CliRunner().invoke(app, ["fit", *model, *where, "--plan", *texts])
    assert shown.exit_code == 0 and "longest chain: " in shown.output and "simulated on " in shown.output


def test_the_command_shows_and_prints_the_simulation(tmp_path: Path) -> None:
    words = ["plan", "tests/toy_pipeline.py", "--store", str(tmp_path / "store"), "--gpu-kind", "H100", "--gpus", "8"]
    shown = CliRunner().invoke(app, words).output
    assert "simulated on --gpus 8 --gpu-kind H100: " in shown and "longest chain: " in shown
    assert json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["simulated"]["gpus"] == 8
