"""The scheduled loop, played through: a real S3 server, a Ray head, and a folder into which somebody fine-tunes twice.

The first fine-tune is good, the second is broken; a scheduler asks again and again, and the label moves once.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeflow.recompress import Exit
from moeflow.report.figures import read_figures
from moeflow.store import Store, labels, s3, versions
from tests import running, servers
from tests.run import cluster

ROOT = Path(__file__).parents[1]
GATE = """bounds:
  - kl < 0.5                     # to what was fine-tuned
  - perplexity <= 1.5x promoted  # and what was fine-tuned must not be worse than what is served
  - bytes <= 0.9x
"""


def fine_tune(rate: float, to: Path) -> Path:
    """The small model after a few steps on one of Python's own files, with this learning rate."""
    model = AutoModelForCausalLM.from_pretrained(running.SMALL)
    tokenizer = AutoTokenizer.from_pretrained(running.SMALL)
    ids = tokenizer(Path(json.__file__).read_text(), return_tensors="pt").input_ids[:, :512].view(8, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(4):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


def put(client: Any, bucket: str, folder: Path, name: str) -> None:
    for path in sorted(folder.iterdir(), key=lambda p: p.suffix == ".safetensors"):  # the weights last, as a slow upload may
        client.upload_file(str(path), bucket, f"tunes/{name}/{path.name}")


@pytest.mark.slow
def test_of_two_fine_tunes_the_good_one_is_served_and_the_broken_one_is_not(
    server: servers.Proxy, bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "gate.yaml").write_text(GATE)
    client, where = s3.client(server.url), f"?endpoint={server.url}"
    words = [
        "recompress", "pipelines/mixtral.py", "--source", f"s3://{bucket}/tunes{where}", "--store", f"s3://{bucket}/store{where}",
        "--gate", str(tmp_path / "gate.yaml"), "--promote", "production", "--keep", "3", "--settle", "1s",
        "--notify", f"tee -a {tmp_path}/notices.jsonl", "--json",
        "-p", "tokens=python:stdlib/a*.py", "-p", "heldout=python:stdlib/t*.py",
        "-p", "calibration.sequences=16", "-p", "calibration.length=64", "-p", "calibration.batch=4",
        "-p", "heldout.sequences=8", "-p", "heldout.length=64",
    ]  # fmt: skip

    def scheduled(address: str) -> tuple[int, dict[str, Any]]:
        """One call of the scheduler."""
        env = os.environ | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", "from moeflow.cli import main; main()", *words]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        print(f"$ moeflow {shlex.join(words)}\n{done.stderr}{done.stdout}exit code {done.returncode}\n")  # for `pytest -s`
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout.splitlines()[-1])

    with tempfile.TemporaryDirectory(prefix="mf") as short, cluster.head(Path(short)) as (address, _):
        good = fine_tune(1e-4, tmp_path / "good")
        client.upload_file(str(good / "config.json"), bucket, "tunes/monday/config.json")
        assert scheduled(address)[0] == Exit.LATER, "half of it has arrived"
        put(client, bucket, good, "monday")
        code, told = scheduled(address)
        assert code == Exit.PROMOTED and told["version"] == "mixtral@1", told
        assert scheduled(address)[0] == Exit.NOTHING_NEW

        put(client, bucket, fine_tune(0.05, tmp_path / "broken"), "tuesday")
        code, told = scheduled(address)
        assert code == Exit.REFUSED and told["version"] == "mixtral@2" and told["was"] == "mixtral@1", told
        assert [d["bound"] for d in told["gate"] if d["state"] != "holds"], told["gate"]
        assert scheduled(address)[0] == Exit.NOTHING_NEW

    store = Store.open(f"s3://{bucket}/store{where}")
    (move,) = labels.history(store, "production")
    assert move.ref == "mixtral@1" and all(d["state"] == "holds" for d in move.about["gate"])
    figures = {f.word: f for v in versions.list(store) for f in read_figures(store, v.reports) if v.n == 1 and f.figure}
    assert any(word.startswith("kl[") for word in figures) and "bytes" in figures
    notices = [json.loads(line) for line in (tmp_path / "notices.jsonl").read_text().replace("}{", "}\n{").splitlines()]
    assert [n["event"] for n in notices] == ["promoted", "refused"]
    assert len(notices[1]["layers"]) > 0 and all(0 <= one["overlap"] <= 1 for one in notices[1]["layers"])
