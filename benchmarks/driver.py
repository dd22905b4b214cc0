"""What the driver costs when there is nothing to compute: a second run, and a plan of 2,000 steps over S3 with latency.

Both are whole commands, from the start of Python to its end. The planned model is a random Mixtral of 400 tiny layers, progressive:
five steps a layer, all of which the bucket lists as stored. S3 is a server on this machine with 30 ms added to every request.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.rows import Row
from moeflow.store import names

ROOT = Path(__file__).parents[1]
LAYERS, LATENCY = 400, 0.03


def command(*words: str) -> tuple[float, str]:
    """Seconds that a command line of moeflow takes, and what it prints."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", "from moeflow.cli import main; main()", *words], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return time.perf_counter() - start, done.stdout


def pretend(bucket: str, prefix: str, keys: Iterable[str]) -> None:
    """Put into a bucket of this process what listings tell of stored steps, past its slow front."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    server = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for i, key in enumerate(keys):
        server.put_object(bucket, f"{prefix}/{names.manifest(key)}", b"{}")
        server.put_object(bucket, f"{prefix}/{names.marker(key, f'-{i:032x}', f'{i:032x}', '0' * 8, i)}", b"")


def main() -> list[Row]:
    from moeflow.store import s3
    from tests import servers, tiny

    os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        small, deep = tiny.write("mixtral", folder / "small"), tiny.write("mixtral", folder / "deep", num_hidden_layers=LAYERS)
        np.save(folder / "tokens.npy", np.random.default_rng(0).integers(3, 96, (4, 16)))
        params = ["-p", f"tokens={folder / 'tokens.npy'}", "-p", "calibration.batch=2"]
        run = ["run", "pipelines/mixtral.py", "-p", f"model={small}", *params, "--store", str(folder / "store"), "--json"]
        command(*run)
        again, output = command(*run)
        if json.loads(output)["steps"]["run"]:
            raise AssertionError(f"a second run computed something: {output}")
        with servers.s3_server() as url, servers.proxy(url) as proxy:
            s3.client(url).create_bucket(Bucket="bench")
            plan = ["plan", "pipelines/mixtral.py", "-p", f"model={deep}", "-p", "search=progressive", *params, "--json"]
            _, output = command(*plan, "--store", f"s3://bench/x?endpoint={url}")
            keys = [row["key"] for row in json.loads(output)["rows"]]
            pretend("bench", "x", keys)
            proxy.latency = LATENCY
            took, output = command(*plan, "--store", f"s3://bench/x?endpoint={proxy.url}")
            steps = json.loads(output)["steps"]["stored"]
            if steps != len(keys):
                raise AssertionError(f"{steps} of {len(keys)} steps were found stored")
    return [
        Row("a second run of a finished pipeline, from start to end", again, "at most", 3.0, "s"),
        Row(
            f"a plan of {steps:,} stored steps on S3 with 30 ms more for every request, from start to end",
            took,
            "at most",
            5.0,
            "s",
        ),
    ]


if __name__ == "__main__":
    for row in main():
        print(row.line())
