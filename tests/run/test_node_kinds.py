"""A plan against a cluster file: what none of its nodes could run is refused before anything starts."""

from pathlib import Path

import pytest
from moto.ec2.models.instance_types import INSTANCE_TYPES

from moeflow.run import node_kinds
from moeflow.run.machines import machine
from moeflow.run.plan import Plan, plan
from moeflow.run.plan_table import plan_lines
from moeflow.run.ray.nodes import demand, too_large
from moeflow.step import Context, Spec, Step, step
from moeflow.store import Store

GIB = 1 << 30


@step(
    "toy.model",
    version=1,
    spec=lambda memory, device, optional: Spec(reads=7, memory=memory, device=device, optional=optional),
    gpus=1,
)
def toy_model(context: Context, *, memory: int, device: int, optional: bool) -> None:
    """A step that computes with a model, of which only the spec is wanted."""


def asking(memory: int = 0, device: int = 0, *, optional: bool = False) -> Step:
    """A step that takes so many GiB."""
    return toy_model(memory=memory * GIB, device=device * GIB, optional=optional)


def cluster(folder: Path, gpu: str = "{InstanceType: g6e.12xlarge}", more: str = "", workers: str = "4") -> Path:
    path = folder / "cluster.yaml"
    path.write_text(f"""
max_workers: {workers}
head_node_type: head
available_node_types:
  head: {{node_config: {{InstanceType: m6i.4xlarge}}, resources: {{}}}}
  gpu: {{node_config: {gpu}, max_workers: 2{more}}}
""")
    return path


def planned(target: Step, store: Store, path: Path) -> Plan:
    return plan([target], store, nodes=node_kinds.read(path))


def test_a_step_that_a_gpu_of_the_cluster_holds_is_fine_and_a_larger_one_is_refused(store: Store, tmp_path: Path) -> None:
    path = cluster(tmp_path)
    assert planned(asking(200, 44), store, path).problems == ()
    for larger, asked in ((asking(1, 45), "45.0 GiB"), (asking(300), "300.0 GiB")):
        (problem,) = planned(larger, store, path).problems
        assert asked in problem and "cluster.yaml" in problem and "4 GPUs of 44.7 GiB" in problem and "\n" not in problem


def test_half_a_gpu_has_half_of_its_memory(store: Store, tmp_path: Path) -> None:
    assert planned(asking(1, 22).on(gpus=0.5), store, cluster(tmp_path)).problems == ()
    assert planned(asking(1, 23).on(gpus=0.5), store, cluster(tmp_path)).problems != ()


def test_a_gang_needs_room_for_all_its_processes_on_as_many_nodes_as_there_may_be(store: Store, tmp_path: Path) -> None:
    gang = {"gpus": 1, "device": 40 * GIB, "memory": 10 * GIB}
    assert planned(asking().on(processes=8, **gang), store, cluster(tmp_path)).problems == ()
    (problem,) = planned(asking().on(processes=9, **gang), store, cluster(tmp_path)).problems
    assert "9 processes" in problem and "room for 8" in problem and "max_workers" in problem
    (problem,) = planned(asking().on(processes=8, **gang), store, cluster(tmp_path, workers="1")).problems
    assert "room for 4" in problem


def test_on_a_cluster_without_gpus_steps_compute_on_cpus_and_take_main_memory(store: Store, tmp_path: Path) -> None:
    path = cluster(tmp_path, "{InstanceType: r6i.4xlarge}")
    assert planned(asking(80, 500), store, path).problems == ()
    assert planned(asking(100, 1), store, path).problems != (), "Ray gives steps 70 % of 128 GiB"


def test_a_step_that_can_do_with_less_is_warned_about_and_never_waits_for_a_node_that_does_not_come(
    store: Store, tmp_path: Path
) -> None:
    speed = asking(300, 300, optional=True)
    result = planned(speed, store, cluster(tmp_path))
    assert result.problems == () and "leaves its figures out" in "".join(result.warnings)
    assert result.reads == 0 and plan([speed], store).reads == 7, "it reads nothing where it has no room"
    assert plan([speed], store, memory=GIB).problems == ()
    nodes = [{"CPU": 4.0, "memory": 8.0 * GIB}, {"CPU": 4.0, "memory": 16.0 * GIB}]
    assert too_large(speed, nodes, gpus=False) == "" != too_large(asking(300), nodes, gpus=False)
    assert demand(speed, gpus=False, most=16 * GIB) == {"CPU": 1, "memory": 16 * GIB}


def test_a_plan_says_the_gpu_memory_of_every_step(store: Store) -> None:
    result = plan([asking(2, 40), asking(1, 3)], store)
    assert [row["device"] for row in result.json()["rows"]] == [40 * GIB, 3 * GIB] and result.json()["device"] == 40 * GIB
    assert "at most 2.0 GiB of memory and 40.0 GiB of a GPU's in one step" in plan_lines(result)[0]
    assert plan([asking(2, 40).on(gpus=0)], store).device == 0


@pytest.mark.parametrize(
    ("gpu", "more", "told"),
    [
        (
            "{InstanceType: x9z.huge}",
            "",
            "available_node_types.gpu: the machine 'x9z.huge' is not known; say what it has, as resources",
        ),
        ("{}", "", "available_node_types.gpu: no InstanceType is named"),
        ("[]", "", "available_node_types.gpu: no InstanceType is named"),
        ("[1]", "", r"available_node_types.gpu.node_config must hold names and values, and is \[1\]"),
        ("{}", ", resources: {CPU: 8, memory: 64000, GPU: 1}", "available_node_types.gpu: the memory of its GPUs is not known"),
        ("{}", ", resources: {CPU: many, memory: 64000}", "available_node_types.gpu.resources.CPU='many' must be a number"),
        ("{}", ", resources: {CPU: 8, memory: -1}", "available_node_types.gpu.resources.memory=-1 must be a number"),
        (
            "{InstanceType: g5.xlarge}",
            ", labels: {gpu-memory-gib: all}",
            "available_node_types.gpu.labels.gpu-memory-gib='all' must",
        ),
    ],
)
def test_a_cluster_file_that_says_too_little_is_refused_by_its_field(gpu: str, more: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told) as refused:
        node_kinds.read(cluster(tmp_path, gpu, more))
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "is no YAML"),
        ("", "available_node_types names no kind of node"),
        ("[]", "available_node_types names no kind of node"),
        ("available_node_types: {}", "available_node_types names no kind of node"),
        ("available_node_types: {a: }", "head_node_type=None is none of available_node_types"),
        ("{available_node_types: {a: }, head_node_type: a}", "available_node_types.a must say node_config and resources"),
        ("{available_node_types: {a: {}}, head_node_type: a, max_workers: x}", "max_workers='x' must be a number of nodes"),
        ("\x00", "is no YAML"),
    ],
)
def test_what_is_no_cluster_file_is_refused(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=told) as refused:
        node_kinds.read(path)
    assert "\n" not in str(refused.value)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        node_kinds.read(tmp_path / "none.yaml")


def test_a_machine_of_ones_own_says_what_it_has(tmp_path: Path) -> None:
    more = ', resources: {CPU: 64, memory: 500000000000, GPU: 8}, labels: {gpu-memory-gib: "141"}'
    _, kind = node_kinds.read(cluster(tmp_path, "{}", more)).kinds
    assert (kind.cpus, kind.memory, kind.gpus, kind.device, kind.most) == (64, 500 * 10**9, 8, 141 * GIB, 2)


def test_machines_are_what_ec2_says_that_they_are() -> None:
    told = {
        name: (
            about["VCpuInfo"]["DefaultVCpus"],
            about["MemoryInfo"]["SizeInMiB"] << 20,
            about.get("GpuInfo", {}).get("Gpus", [{}])[0].get("Count", 0),
            about.get("GpuInfo", {}).get("Gpus", [{}])[0].get("MemoryInfo", {}).get("SizeInMiB", 0) << 20,
        )
        for name, about in INSTANCE_TYPES.items()
    }
    ours = {name: known for name in told if (known := machine(name))}
    assert {name: (m.cpus, m.memory, m.gpus, m.device) for name, m in ours.items()} == {name: told[name] for name in ours}
    assert len(ours) > 100 and {"g6e.12xlarge", "p5.48xlarge", "p4d.24xlarge", "m6i.4xlarge"} <= ours.keys()
