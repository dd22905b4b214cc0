"""A real calibration and search on a cluster that loses a worker and its driver, against an undisturbed run in process."""

import json
import signal
import sys
from pathlib import Path

import pytest

from moeflow.run import in_process
from moeflow.sources import pin
from moeflow.step import upstream
from moeflow.store import Store
from tests import prune_pipeline, running, tiny
from tests.run.cluster import PATIENCE, two_nodes, until


@pytest.mark.slow
def test_three_shards_by_three_stages_survive_a_lost_worker_and_a_lost_driver(tmp_path: Path) -> None:
    folder = tiny.write("mixtral", tmp_path / "model", hidden_size=64, intermediate_size=256)
    tokens = running.matrix_of(tmp_path, sequences=12)
    release = tmp_path / "release"
    target = prune_pipeline.build(pin(str(folder), kind="model"), tokens=tokens, until=str(release))
    store, undisturbed = (Store.open(str(tmp_path / n)) for n in ("store", "undisturbed"))
    command = [
        sys.executable, "tests/prune_pipeline.py", "--store", str(tmp_path / "store"), "--name", "survivor", "--json",
        "-p", f"model={folder}", "-p", f"tokens={tokens.spec}", "-p", f"until={release}",
    ]  # fmt: skip
    stages = [s.key for s in upstream([target]) if s.name == "calibrate.observe"]
    assert len(stages) == 9

    def stored() -> int:
        return sum(store.has(k) for k in stages)

    with two_nodes() as nodes:
        driver = nodes.drive(command)
        killed = nodes.kill_worker("toy.gate")
        until(lambda: nodes.workers("toy.gate") not in ([], [killed]), "the lost worker was not replaced")
        until(lambda: stored() == 6, "two stages of three did not go on behind the lost worker")
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert not store.has(target.key)
        release.touch()
        printed, said = nodes.drive(command).communicate(timeout=2 * PATIENCE)
        assert printed, said
    outcome = json.loads(printed.splitlines()[-1])
    assert outcome["key"] == target.key and outcome["version"] == 1
    assert outcome["steps"]["stored"] >= 6

    in_process.run([target], undisturbed)
    keys = [s.key for s in upstream([target])]
    digests = [{k: m.digest for k, m in s.manifests(keys).items()} for s in (store, undisturbed)]
    assert digests[0] == digests[1] and len(digests[0]) == len(keys)
    assert running.choices(store, target) == running.choices(undisturbed, target)
