"""The program that hurts runs sees what it must see, and a short round of every kind ends well."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from moeflow.store import Store
from tests.chaos import faults
from tests.chaos.driver import ROOT, Ended, Program
from tests.chaos.places import Place
from tests.chaos.scene import Scene
from tests.chaos.tally import Round, sound, summary, table
from tests.chaos.truth import Truth
from tests.making import commit, key


class Shell(Program):
    def command(self, words: list[str]) -> list[str]:
        return ["sh", "-c", *words]


@pytest.fixture
def truth(tmp_path: Path) -> Truth:
    """One artifact is the whole of an undisturbed run."""
    store = Store.open(str(tmp_path / "undisturbed"))
    made = commit(store, tmp_path / "right", "k", x="right")
    return Truth((), store.url, {6: key("k")}, {key("k"): made.digest}, {6: {"x": "0" * 64}}, 1.0)


@pytest.fixture
def scene(truth: Truth, tmp_path: Path) -> Scene:
    place = Place("folder", lambda word: str(tmp_path / word))
    own = tmp_path / "round"
    return Scene(place, truth, Random(0), Round("driver", "folder", "0/driver/folder/0"), own, place.new("store"), own / "cache")


def test_other_bytes_under_a_key_are_a_mismatch_whatever_the_exit_code(scene: Scene, tmp_path: Path) -> None:
    commit(Store.open(scene.url), tmp_path / "wrong", "k", x="wrong")
    for code in (0, 1):
        line = "echo '{\"exit\": 1}'; echo 'error: x' >&2; " if code else ""
        assert scene.ended(Shell([f"{line}exit {code}"], tmp_path / "said"), may=(0, 1)) == code
    assert len(scene.round.mismatches) == 2 and not scene.round.wrong and not sound([scene.round])


def test_a_result_that_is_missing_after_exit_code_0_is_a_mismatch(scene: Scene, tmp_path: Path) -> None:
    scene.ended(Shell(["exit 0"], tmp_path / "said"))
    (line,) = scene.round.mismatches
    assert line == f"{key('k')} is not stored after exit code 0"


def test_a_pulled_file_that_is_other_missing_or_too_many_is_told(truth: Truth, tmp_path: Path) -> None:
    (tmp_path / "pulled").mkdir()
    assert len(truth.pulled_differs(tmp_path / "pulled", 6)) == 1
    (tmp_path / "pulled" / "x").write_text("other")
    (tmp_path / "pulled" / "y").touch()
    assert len(truth.pulled_differs(tmp_path / "pulled", 6)) == 2


def test_a_command_that_does_not_end_is_killed_and_counts_as_a_hang(scene: Scene, tmp_path: Path) -> None:
    running = Shell(["exec sleep 60"], tmp_path / "said")
    scene.ended(running, limit=0.1)
    assert not running.lives() and len(scene.round.hangs) == 1 and not sound([scene.round])


def test_an_exit_code_or_last_words_that_ought_to_be_others_are_told(scene: Scene, tmp_path: Path) -> None:
    for script in ("exit 2", "echo Traceback >&2; exit 1", "exit 1"):
        scene.ended(Shell([script], tmp_path / "said"), may=(0, 1))
    assert len(scene.round.wrong) == 3 and scene.round.ends == {"2": 1, "1": 2}
    assert Ended(1, '{"error": "x", "exit": 1}\n', "error: x\n", as_json=True).improper == ""
    assert Ended(1, "", "error: x\n").improper == "" != Ended(1, "", "error: x\n", as_json=True).improper


def test_a_flipped_bit_changes_one_bit_and_neither_size_nor_time(truth: Truth) -> None:
    store = Store.open(truth.url)
    (name,) = faults.blobs_of(store)
    path = store.blobs.local(name)
    assert path is not None
    before, about = path.read_bytes(), path.stat()
    faults.flip(store, name, Random(1))
    after = path.read_bytes()
    assert sum((a ^ b).bit_count() for a, b in zip(before, after, strict=True)) == 1
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (about.st_size, about.st_mtime_ns)


def test_rounds_are_counted_by_kind_and_store_and_nothing_tried_is_not_sound() -> None:
    good, bad = Round("pair", "moto", "1"), Round("pair", "moto", "2", hangs=["it hung"])
    for one in (good, bad):
        one.injected["kills"] += 2
        one.ends["0"] += 1
    assert "| pair | moto | 2 | 4 kills | 2 | 0 | 0 | 0 | 0 | 0 | 1 | 0 |" in table([good, bad])
    assert [r["name"] for r in summary([good, bad])["unsound"]] == ["2"]
    assert sound([good]) and not sound([good, bad]) and not sound([])


def hurt(*words: str) -> dict[str, Any]:
    """What the program counted, which must have ended well."""
    command = [sys.executable, "-m", "tests.chaos", "--rounds", "1", "--minutes", "20", "--seed", "1", "--json", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counted: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return counted


@pytest.mark.slow
def test_one_round_of_every_kind_without_a_ray_head_ends_well() -> None:
    counted = hurt("--without-ray", "--store", "folder", "--store", "moto")
    assert {k.partition(" ")[0] for k in counted["kinds"]} | {*counted["absent"]} == {
        "driver", "faults", "outage", "flips", "cache", "pair", "gc", "disk", "limit", "storm"
    }  # fmt: skip
    assert {"kills", "faults", "outages", "flips", "overlapping pairs", "collections", "limits"} <= {*counted["injected"]}


@pytest.mark.slow
def test_one_round_of_every_kind_on_a_ray_head_ends_well() -> None:
    counted = hurt("--only", "worker", "--only", "driver-on-ray", "--only", "head", "--store", "folder")
    assert counted["rounds"] == 3 and counted["injected"]["kills"] >= 2
