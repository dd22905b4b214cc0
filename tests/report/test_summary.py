"""What `ls` and `show` say first of a version, and last."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from moeflow.report import about
from moeflow.report.figures import Figure
from moeflow.report.words import moved
from moeflow.sizes import bytes_text
from moeflow.store import Store, names, versions
from tests.report.conftest import call


def test_show_begins_with_what_people_ask_and_ends_with_the_hashes(told: Path) -> None:
    lines = call(told, "show", "told_pipeline@1").stdout.splitlines()
    first = [line[:11].strip() for line in lines[: lines.index("")]]
    assert first[0].startswith("told_pipel") and [w for w in first[1:] if w] == ["what", "from", "pipeline", "given", "how good"]
    assert lines[1] == "what       mixtral of 3 layers" and lines[2].endswith("layers 0 to 2: 6 of 8 experts stay")
    assert "licence apache-2.0" in lines[4] and str(told / "model") in lines[3]
    assert any("KL to the original" in line and "95 % interval" in line for line in lines[: lines.index("")])
    (change,) = [line for line in lines if line.startswith("bytes ")]
    assert " %, better" in change and "all weights on disk" in change
    assert [line[:11].strip() for line in lines[-4:]] == ["step", "made", "contents", "key"]


def test_a_speed_whose_quartiles_overlap_is_no_difference() -> None:
    note = "prefill and decode: no difference measured, the quartiles of 7 alternating rounds overlap"
    same = Figure("decode", "decode", "speed", "tokens/s", 46.0, 23.0, better="higher", notes=(note,))
    assert moved(same) == "no difference measured" and moved(replace(same, notes=())) == "-50.0 %"


def test_ls_has_memory_and_divergence_beside_the_bytes(told: Path) -> None:
    six, five, *_ = json.loads(call(told, "ls", "told_pipeline", "--json").stdout)
    assert six["resident"] is None and {*six["kl"]} == {"prose | notes"} and six["bytes"] > five["bytes"]
    head, line, *_ = call(told, "ls", "told_pipeline").stdout.splitlines()
    assert head.split()[-3:] == ["KL", "key", "labels"] and f"{six['kl']['prose | notes']:.3g}" in line.split()
    weights = about.of(Store.open(str(told / "store")), "told_pipeline@1").figure("bytes")
    assert weights is not None and six["weights"] == weights.compressed < six["bytes"], "a config.json is no weight"
    assert bytes_text(six["weights"]) in line


def test_a_version_whose_report_is_damaged_is_listed_without_what_it_says(told: Path, tmp_path: Path) -> None:
    shutil.copytree(told / "store", tmp_path / "store")
    store = Store.open(str(tmp_path / "store"))
    version = versions.resolve(store, "told_pipeline@1")
    assert isinstance(version, versions.Version)
    (judged,) = [key for key in version.reports if key.startswith("evaluate.quality")]
    store.blobs.delete([names.blob(store.manifest(judged).files["report.json"].sha256)])
    listed = call(tmp_path, "ls", "told_pipeline", "--json")
    six, five, *_ = json.loads(listed.stdout)
    assert six["kl"] == {} and five["kl"] != {} and six["bytes"] > 0
    assert "the reports of told_pipeline@1 cannot be read" in listed.stderr and "moeflow verify told_pipeline@1" in listed.stderr
