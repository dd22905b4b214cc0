"""The HTTP server of vLLM with a compressed checkpoint, and the checkpoint divided over two processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.compressed import compress
from tests.serve import forms

pytest.importorskip("vllm", reason="needs vLLM; `make test-serve` makes an environment with it")
pytestmark = pytest.mark.serve

ROOT = Path(__file__).parents[2]
BIND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # or each process wants a NUMA node for itself
MINUTES = 10
"""How long a server may take to be ready, or a run to end, on a busy machine."""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"} | BIND


@contextmanager
def server(folder: Path, log: Path) -> Iterator[str]:
    """The URL of a server with this checkpoint, once it is ready; it and its processes end behind the `with` statement."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", folder, "--dtype", "float32", "--max-model-len", 128, "--max-num-seqs", 4, "--gpu-memory-utilization", 0.1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", port, "--host", "127.0.0.1", *words]
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(w) for w in command], env=environment(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        for _ in range(MINUTES * 60):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def asked(url: str, **body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60 * MINUTES) as answer:
        return json.load(answer)


def written(folder: Path, prompt: list[int], steps: int) -> list[int]:
    """What transformers writes greedily."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    how = dict(max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **how)[0, len(prompt) :].tolist()


def test_a_server_completes_a_prompt_as_transformers_does(tmp_path: Path) -> None:
    made = compress(forms.original("mixtral", tmp_path / "original"), tmp_path / "made")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(made)
    expected = written(made, [5, 17, 40, 8], 12)
    with server(made, tmp_path / "log") as url:
        body = dict(model=str(made), prompt="w5 w17 w40 w8", max_tokens=12, temperature=0, ignore_eos=True)
        text = asked(f"{url}/v1/completions", **body)["choices"][0]["text"]
    assert text.split() == [f"w{i}" for i in expected]
    assert "runs the native way: its experts are whole or low-rank" in (tmp_path / "log").read_text()


PARALLEL = """
import sys
from tests.serve.engine import agreement, served, told
if __name__ == "__main__":
    with told() as lines, served(sys.argv[1], tensor_parallel_size=2, hf_overrides={"moeflow_way": sys.argv[2]}) as engine:
        print("agreement", *agreement(engine, sys.argv[1]))
    print("settled", *lines)
"""
ALONE = "runs the general way: low-rank experts run the native way in one process alone, and --tensor-parallel-size is 2"


@pytest.mark.parametrize(
    "way, form, says",
    [
        ("auto", "low_rank", ALONE),
        ("auto", "skipping", "runs the general way"),
        ("auto", "vectors", "runs the general way"),
        ("native", "counts", "runs the native way"),
    ],
)
def test_two_processes_share_the_experts(way: str, form: str, says: str, tmp_path: Path) -> None:
    """Each has half of every layer's experts the general way, and half of every expert the native way."""
    family = "olmoe" if form == "vectors" else "mixtral"
    made = forms.FORMS_OF[form](forms.original(family, tmp_path / "original"), tmp_path / form)
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL)
    done = subprocess.run(
        [sys.executable, script, made, way], env=environment(), capture_output=True, text=True, check=False, timeout=60 * MINUTES
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    same, apart = next(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("agreement"))
    assert int(same) == 64 and float(apart) < 5e-4
    assert says in next(line for line in done.stdout.splitlines() if line.startswith("settled"))
