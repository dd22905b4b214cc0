"""The commands of docs/read-a-report.md, in their order, on two versions."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeflow.cli import app
from moeflow.store import Store, versions

PAGE = Path(__file__).parents[2] / "docs" / "read-a-report.md"
COMMANDS = re.findall(r"^    (moeflow .*?)(?: +#.*)?$", PAGE.read_text(), re.MULTILINE)


def test_every_command_of_the_page_works_as_it_stands(told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(COMMANDS) == 8
    shutil.copytree(told / "store", tmp_path / ".moeflow" / "store")
    monkeypatch.chdir(tmp_path)
    store = Store.open(".moeflow/store")
    for ref in ("told_pipeline@2", "told_pipeline@1"):
        one = versions.resolve(store, ref)
        assert isinstance(one, versions.Version)
        versions.publish(store, "mixtral", one.key, record=one.record, reports=one.reports)
    for command in COMMANDS:
        done = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
        assert done.exit_code == 0, f"{command}: {done.output}"
        if "--json" in command:
            assert {*json.loads(done.stdout)} >= {"figures", "paired", "layers", "options", "lineage"}
    assert {"README.md", "recipe.yaml", "config.json"} <= {path.name for path in Path("DIR").iterdir()}
    assert Path("report.html").read_text().startswith("<!doctype html>")
    five, six, again = (v.key for v in versions.list(store, "mixtral"))
    assert five == again != six, "the recipe made what was pulled, which was there; with keep=5 it made the other"
