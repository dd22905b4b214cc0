"""moeflow recompress on the small trained model: an adapter alone, and a fine-tune that left most layers alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moeflow.recompress import Exit
from moeflow.store import Store, versions
from tests import running

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def recompressed(here: Path, *words: str) -> tuple[dict[str, Any], str]:
    """One call on the folder `tunes`: its result, and what it said on the way."""
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-c", "from moeflow.cli import main; main()", "recompress", str(ROOT / "pipelines" / "mixtral.py"),
        "--source", "tunes", "--store", "store", "--promote", "production", "--settle", "0s", "--json",
        "-p", "tokens=python:stdlib/a*.py", "-p", "heldout=python:stdlib/t*.py", "-p", "calibration.sequences=16",
        "-p", "calibration.length=64", "-p", "calibration.batch=4", "-p", "heldout.sequences=4", "-p", "heldout.length=64", *words,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == Exit.PROMOTED, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_an_adapter_alone_is_merged_into_its_base_and_the_lineage_says_so(tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(running.SMALL), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "tunes" / "monday")
    recompressed(tmp_path)
    store = Store.open(str(tmp_path / "store"))
    (version,) = versions.list(store)
    assert version.record["source"]["kind"] == "adapter" and version.record["source"]["base"] == str(running.SMALL)
    steps = {m.step for m in versions.lineage(store, version.key).values()}
    assert "checkpoint.merged_layer" in steps


@pytest.mark.parametrize("stage", [1, 8])  # a stage of several layers runs again if one of them is another
def test_a_fine_tune_of_the_last_layer_alone_computes_little_and_the_plan_knows_it(stage: int, tmp_path: Path) -> None:
    shutil.copytree(running.SMALL, tmp_path / "tunes" / "monday")
    by_layer = ("-p", f"calibration.stage={stage}")
    first, _ = recompressed(tmp_path, *by_layer)
    tuesday = tmp_path / "tunes" / "tuesday"
    shutil.copytree(running.SMALL, tuesday)
    index = json.loads((tuesday / "model.safetensors.index.json").read_text())["weight_map"]
    last = max(int(n.split(".")[2]) for n in index if n.startswith("model.layers."))
    for path in tuesday.glob("*.safetensors"):
        tensors = load_file(path)
        changed = {n: t * 1.001 if n.startswith(f"model.layers.{last}.") and ".w2." in n else t for n, t in tensors.items()}
        save_file(changed, path, {"format": "pt"})
    second, said = recompressed(tmp_path, *by_layer)
    assert second["version"] == "mixtral@2" and second["was"] == first["version"]
    planned = int(said.partition(" are to run")[0].rsplit(" ", 1)[1])
    assert planned == second["steps"]["run"] < second["steps"]["most"] / 2, (planned, second["steps"])
    assert len(second["layers"]) == last + 1 and all(one["overlap"] == 1 for one in second["layers"][:-1])
