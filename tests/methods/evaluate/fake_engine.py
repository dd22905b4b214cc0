"""A program that speaks as an engine does, and computes nothing: it tells what it was given, or fails as it is told."""

import json
import sys
from pathlib import Path

PROGRAM = """#!{python}
import os, signal, subprocess, sys, time
sys.path.insert(0, {root!r})
if sys.argv[1] == "-c":
    print("vllm 9.9.9")
    sys.exit()
from pathlib import Path
Path({pid!r}).write_text(str(os.getpid()))
TOLD = {told}

class Fake:
    runs = 0

    def load(self, folder, options):
        {load}
        self.told = TOLD[str(os.path.getsize(os.path.join(folder, "config.json")))]
        print("an engine prints to stdout, too", flush=True)
        return {{"engine": "vllm 9.9.9", "way": self.told["way"], "resident": self.told["resident"]}}

    def run(self, prompts, tokens, logs=False):
        Fake.runs += 1
        seconds = self.told["seconds"] * (1 + Fake.runs % 3 / 10)
        written = [w[:tokens] for w in self.told["written"]][:len(prompts)]
        return {{"prefill": seconds, "decode": seconds, "decoded": len(prompts) * (tokens - 1), "memory": 1000 * len(prompts),
                "written": written, "logs": self.told["logs"] if logs else []}}

from moeflow.serve.process import main
main(Fake())
"""
ROOT = str(Path(__file__).parents[3])


def program(folder: Path, told: dict[str, object] | None = None, load: str = "pass") -> Path:
    """The program; `told`: what it says of each checkpoint, by the size of its config.json; `load`: what loading does."""
    path = folder / "engine"
    text = PROGRAM.format(python=sys.executable, root=ROOT, told=json.dumps(told or {}), load=load, pid=str(folder / "pid"))
    path.write_text(text)
    path.chmod(0o755)
    return path
