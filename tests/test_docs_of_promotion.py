"""The commands in docs/promote.md and docs/schedule.md, one after the other, as a reader would type them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moeflow.recompress import Exit
from tests import running

ROOT = Path(__file__).parents[1]


def commands(page: str) -> list[str]:
    """The commands of a page, each in one line."""
    text = (ROOT / "docs" / page).read_text().replace("\\\n", " ")
    return [line.strip() for line in re.findall(r"^    (moeflow .*)$", text, re.MULTILINE)]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with what the commands name."""
    for name in ("pipelines", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def typed(command: str, here: Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ours = f"moeflow() {{ {shlex.quote(sys.executable)} -c 'from moeflow.cli import main; main()' \"$@\"; }}; {command}"
    return subprocess.run(["bash", "-c", ours], cwd=here, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_command_of_the_page_about_promotion_does_what_it_says(here: Path) -> None:
    wanted = commands("promote.md")
    assert len(wanted) == 9
    done = [typed(command, here) for command in wanted]
    assert [d.returncode for d in done] == [0] * 9, [d.stderr for d in done if d.returncode]
    shown = [d.stdout for d in done]
    assert "production is mixtral@1" in shown[1] and "gate passed, 2 of 2" in shown[2]
    assert "forced past its gate" in shown[5] and "because the smoke test is today" in shown[5]
    assert "production is mixtral@1 again" in shown[8]


@pytest.mark.slow
def test_every_command_of_the_page_about_schedules_does_what_it_says(here: Path) -> None:
    (command,) = commands("schedule.md")
    (here / "gate.yaml").write_text("- kl < 0.5\n- bytes <= 0.9x\n")
    shutil.copytree(running.SMALL, here / "finetunes" / "monday")
    done = typed(command, here)
    assert done.returncode == Exit.PROMOTED, done.stderr
    assert json.loads((here / "notice.json").read_text())["event"] == "promoted"
    assert typed(command, here).returncode == Exit.NOTHING_NEW


def test_the_page_about_schedules_has_every_exit_code() -> None:
    codes = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "schedule.md").read_text(), re.MULTILINE)
    assert [int(code) for code in codes] == sorted(Exit)
