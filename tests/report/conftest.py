"""Two versions of one model, for tests of what is told of them: six experts of eight and five, run once."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from moeflow.cli import app
from tests import running, tiny

PIPELINE = Path(__file__).with_name("told_pipeline.py")
CARD = "---\nlicense: apache-2.0\nlanguage: [en]\nbase_model: org/first\n---\n\n# The source's own card\n"

Cli = Callable[..., Result]


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, the file `tokens.npy`, and `store`, where `told_pipeline@1` keeps six experts and `@2` five."""
    folder = tmp_path_factory.mktemp("told")
    tiny.write("mixtral", folder / "model")
    (folder / "model" / "README.md").write_text(CARD)
    (folder / "model" / "LICENSE").write_text("Do as you like.\n")
    running.matrix_of(folder)
    here = os.getcwd()
    os.chdir(folder)
    try:
        for keep in (6, 5):
            made = call(folder, "run", PIPELINE, "-p", "model=model", "-p", f"tokens={TOKENS}", "-p", f"keep={keep}", "--json")
            assert made.exit_code == 0, made.output
    finally:
        os.chdir(here)
    return folder


TOKENS = "tokens-8-16-0.npy"


def call(folder: Path, *words: object) -> Result:
    """`moeflow WORDS --store STORE`, in this process."""
    return CliRunner().invoke(app, [*map(str, words), "--store", str(folder / "store")], catch_exceptions=False)


def last_json(result: Result) -> dict:
    assert result.exit_code == 0, result.output
    made: dict = json.loads(result.stdout.splitlines()[-1])
    return made
