"""The benchmark beside other libraries: what it measures is the process, what it judges is the result, what fails is a row."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from benchmarks import peers
from benchmarks.peer_environments import STAMP, NotMeasured, measured, python_with
from benchmarks.peer_models import HUB, with_hub_names
from benchmarks.peers import FIT, GPTQ, LLM_COMPRESSOR, PRUNING, SIZE, Case, Contest, Peer, Side, Took
from moeflow.run import pipeline
from tests import tiny

ROOT = Path(__file__).parents[1]


def test_the_peak_is_that_of_the_command_and_not_of_whoever_measures(tmp_path: Path) -> None:
    size = 300 << 20
    held = bytearray(size)
    small = measured([sys.executable, "-c", "pass"], tmp_path / "log")
    large = measured([sys.executable, "-c", f"bytearray(b'1') * {size}"], tmp_path / "log")
    assert len(held) == size and small.peak < 100 << 20 and size < large.peak < size + (100 << 20)


def test_a_command_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(NotMeasured, match=r"^does not run: ZeroDivisionError: division by zero$"):
        measured([sys.executable, "-c", "1 / 0"], tmp_path / "log")


@pytest.mark.slow
def test_a_peer_that_does_not_install_says_why_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFLOW_PEERS", str(tmp_path))
    with pytest.raises(NotMeasured, match=r"^does not install: ERROR: .*nowhere.whl"):
        python_with("peer", ("./nowhere.whl",))
    assert not (tmp_path / "peer" / STAMP).exists(), "it is tried again"


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Peer:
    """A peer that is installed, and whose script copies the model."""
    monkeypatch.setenv("MOEFLOW_PEERS", str(tmp_path / "peers"))
    script = tmp_path / "copying.py"
    script.write_text("import shutil, sys\n_, method, model, tokens, out = sys.argv\nshutil.copytree(model, out)\n")
    (tmp_path / "peers" / "copying" / "bin").mkdir(parents=True)
    (tmp_path / "peers" / "copying" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "peers" / "copying" / STAMP).write_text("copying==1")
    return Peer("copying", ("copying==1",), str(script))


def test_an_environment_that_is_there_is_not_made_again(peer: Peer) -> None:
    assert Path(peer.python()).resolve() == Path(sys.executable).resolve()


def test_a_peer_that_does_not_run_is_a_row_with_the_reason(tmp_path: Path, peer: Peer) -> None:
    Path(peer.script).write_text("raise ValueError('no such | layer')")
    case = Case("tiny", lambda folder: tiny.write("mixtral", folder), rounds=1, sequences=1)
    rows, table = peers.beside([case], [Contest(peer, "reap", PRUNING)], np.zeros((2, 16), np.int32))
    assert rows == [] and table.splitlines()[-1].startswith("| tiny | reap | copying | does not run: ValueError: no such / layer |")


def test_experts_get_the_hubs_names_and_everything_else_stays(tmp_path: Path) -> None:
    known = tiny.write("mixtral", tmp_path / "known")
    renamed = tmp_path / "renamed"
    shutil.copytree(known, renamed)
    back = {hub: name for name, hub in HUB.items()}
    tensors = {
        ".".join(back.get(word, word) if "experts" in name else word for word in name.split(".")): tensor
        for name, tensor in load_file(known / "model.safetensors").items()
    }
    save_file(tensors, renamed / "model.safetensors")
    (renamed / "config.json").write_text(json.dumps({"ignore": ["model.layers.0.block_sparse_moe.experts.0.up_proj"]}))
    assert not {*tensors} <= {*load_file(known / "model.safetensors")}
    with_hub_names(renamed)
    expected, now = load_file(known / "model.safetensors"), load_file(renamed / "model.safetensors")
    assert {*now} == {*expected} and all(now[name].equal(tensor) for name, tensor in expected.items())
    assert json.loads((renamed / "config.json").read_text()) == {"ignore": ["model.layers.0.block_sparse_moe.experts.0.w3"]}


@pytest.mark.parametrize(
    ("ours", "published", "words"),
    [
        (PRUNING, "mixtral.py", ["search.seed=0"]),
        (GPTQ, "mixtral_unified.py", ["order=slim", "trim=none", "decompose=none"]),
        (FIT, "fit.py", []),
    ],
)
def test_ours_makes_what_the_published_pipeline_makes(
    ours: tuple[str, ...], published: str, words: list[str], tmp_path: Path
) -> None:
    model = tiny.write("mixtral", tmp_path / "model", hidden_size=64, intermediate_size=64)
    np.save(tmp_path / "tokens.npy", np.full((4, 16), 5))
    here, *options = (word.replace(SIZE, "300KB") for word in ours)
    given = [f"model={model}", f"tokens={tmp_path}/tokens.npy", *options, "calibration.seed=0", "calibration.group=0"]
    given += ["calibration.batch=2", "calibration.shard=4", "calibration.record=64", "calibration.per_expert=0"]
    given = list({word.partition("=")[0]: word for word in given}.values())
    judged = f"heldout={tmp_path}/tokens.npy"
    alone = pipeline.call(pipeline.load(ROOT / here), given)
    whole = pipeline.call(pipeline.load(ROOT / "pipelines" / published), [*given, *words, judged])
    assert alone.key == whole.key and not alone.reports and whole.reports


def test_a_fit_may_take_what_the_peers_result_takes(tmp_path: Path, peer: Peer) -> None:
    bench = peers._Bench(tmp_path, Case("tiny", lambda folder: tiny.write("mixtral", folder), rounds=1, sequences=1), tmp_path)
    assert "budget.bytes=1234" in bench._parameters(Contest(peer, "signround", FIT, "fit"), 1234)


def test_only_reap_has_goals_below_one() -> None:
    side = Side([Took(10, 100)], [], 1000, [0.1, 0.2])
    case = Case("random", lambda folder: folder, rounds=1, sequences=1, seconds=0.7, memory=0.4)
    targets = {m: [r.target for r in peers.claims(case, Contest(LLM_COMPRESSOR, m, GPTQ), side, side)[:2]] for m in ("reap", "awq")}
    assert targets == {"reap": [0.7, 0.4], "awq": [1, 1]}


def test_a_part_of_the_table_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[Case], list[Contest]]] = []
    monkeypatch.setattr(peers, "beside", lambda cases, contests, _: asked.append((cases, contests)) or ([], ""))
    monkeypatch.setattr(peers.peer_models, "tokens", lambda _: np.zeros((2, 16), np.int32))
    peers.main(["mixtral-21m"], ["reap", "gptq"], 3)
    peers.main()
    (cases, contests), (every, all_of_them) = asked
    assert [(c.name, c.rounds) for c in cases] == [("mixtral-21m", 3)] and {c.method for c in contests} == {"reap", "gptq"}
    assert [*every] == [*peers.CASES] and [*all_of_them] == [*peers.CONTESTS]
