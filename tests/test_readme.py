"""The command that README.md gives to somebody who has no model at hand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_shipped_model_is_pruned_by_the_command_in_the_readme(tmp_path: Path) -> None:
    (command,) = re.findall(
        r"    moeflow run (pipelines/mixtral\.py -p model=models/.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL
    )
    words = shlex.split(command.replace("\\\n", " "))
    done = subprocess.run(
        [sys.executable, *words, "--store", str(tmp_path / "store")],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {line.split("  ")[0].strip(): line for line in done.stdout.splitlines()}
    assert any(name.startswith("KL to the original") for name in rows), done.stdout
    assert "8" in rows["experts per layer"] and "6" in rows["experts per layer"]
