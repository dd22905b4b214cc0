"""Shards of ZeRO become the checkpoint of the model that was trained, and a scheduled compression takes them."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moeflow.cli import app
from moeflow.recompress import Exit
from moeflow.sources.newest import newest
from moeflow.store import Store, versions
from tests import fine_tuned, tiny

ROOT = Path(__file__).parents[3]


def saved(model: Path, out: Path, stage: int) -> dict[str, str]:
    """Train for a step with ZeRO, leave the shards in `out`; the digests of the trained tensors."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
    script = str(Path(__file__).with_name("zero_saving.py"))
    done = subprocess.run(
        [sys.executable, script, str(model), str(out), str(stage)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    trained: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return trained


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_shards_become_the_model_that_was_trained_and_are_compressed(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = saved(tiny.write("mixtral", tmp_path / "model"), tmp_path / "tunes" / "monday", stage)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    there, _ = newest("tunes")
    assert there and there.kind == "zero"
    words = ["recompress", fine_tuned.__file__, "--source", "tunes", "--store", "store", "--promote", "production"]
    config = tmp_path / "tunes" / "monday" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"kl": 0.01, "keep": [0]}))  # what the toy pipeline reads
    result = CliRunner().invoke(app, [*words, "--settle", "0s"], catch_exceptions=False)
    assert result.exit_code == Exit.PROMOTED, result.output
    (version,) = versions.list(Store.open("store"))
    assert version.record["source"]["kind"] == "zero" and version.record["source"]["uri"].endswith("tunes/monday")
    (folder,) = (w.removeprefix("model=") for w in version.record["given"] if w.startswith("model="))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    made = {n: hashlib.sha256(p.detach().float().contiguous().numpy().tobytes()).hexdigest() for n, p in loaded.named_parameters()}
    assert made == trained
    shutil.rmtree(folder)
