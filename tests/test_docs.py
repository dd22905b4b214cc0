"""The pages of the documentation: each cited command is one, each name of the library exists, each link leads somewhere."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

import moeflow
from infra.site import frontier
from moeflow.cli import app
from moeflow.run import pipeline
from moeflow.run.opening import pipeline_file, shipped

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.compile(r"(?:^(?:    .*)?\n)+", re.MULTILINE)
COMMANDS: Any = typer.main.get_command(app)


def blocks(page: Path) -> list[str]:
    return [textwrap.dedent(block) for block in BLOCKS.findall(page.read_text()) if block.strip()]


def commands(page: Path) -> list[str]:
    """The lines that begin with `moeflow`; a page's synopsis, with what may be left out in brackets, is no command."""
    lines = "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("moeflow ") and not re.search(r"[|\[]|\.\.\.", line)]


CITED = [(page.name, line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), CITED, ids=[f"{page}: {line[:60]}" for page, line in CITED])
def test_a_cited_command_is_one_that_moeflow_takes(page: str, line: str) -> None:
    """Its options, and the parameters of its pipeline: it is parsed as it would be, and nothing is run."""
    name, *words = shlex.split(line, comments=True)[1:]
    if name.startswith("--"):
        assert any(name in one.opts for one in COMMANDS.params), f"{page} cites {name}"
        return
    if "--help" in words:
        words.remove("--help")
    context = COMMANDS.commands[name].make_context(name, words)
    file = str(context.params.get("file", "fit" if name == "fit" else ""))
    if file in shipped() or (Path(file).suffix == ".py" and Path(file).is_file()):
        given = [f"model={context.params['model']}", "budget.ratio=0.1"] if name == "fit" else ["model=MODEL"]
        asked = {word.partition("=")[0] for word in context.params["param"]}
        build = pipeline.load(pipeline_file(file))
        pipeline.values(build, [*(w for w in given if w.partition("=")[0] not in asked), *context.params["param"]])


def test_there_are_commands_on_the_pages_that_a_newcomer_reads() -> None:
    assert len(CITED) > 12 and {"README.md", "first-hour.md", "tracking.md", "cluster.md"} <= {page for page, _ in CITED}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_says_of_python_is_there(page: Path) -> None:
    for block in blocks(page):
        if block.startswith(("import moeflow", "from moeflow", "moeflow.")):
            ast.parse(block)
            for line in re.findall(r"^from (moeflow[\w.]*) import (\w+)", block, re.MULTILINE):
                assert hasattr(__import__(line[0], fromlist=[line[1]]), line[1])
    for name in re.findall(r"\bmoeflow\.(\w+)\(", page.read_text()):
        assert name in moeflow.__all__, f"{page.name} says moeflow.{name}"


def test_the_extras_that_are_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for page in PAGES for inside in re.findall(r"moeflow\[(\w+)\]", page.read_text()) for name in inside.split(",")}
    assert named == {"compress", "train", "ray", "eval", "all", "vllm"} and named <= {*extras}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_every_link_between_files_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_picture_is_that_of_the_results() -> None:
    assert frontier.SVG.read_text() == frontier.svg(), "python -m infra.site.frontier draws it again"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed here; `make docs` brings it")
def test_the_site_is_built_without_a_broken_link(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    options = (tmp_path / "site" / "options.html").read_text()
    assert "calibration.sequences" in options and "moeflow fit" in options
    assert len([*(tmp_path / "site" / "decisions").glob("*.html")]) == len([*(ROOT / "docs" / "decisions").glob("*.md")])
