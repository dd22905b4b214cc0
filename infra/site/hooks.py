"""What the documentation's site is made of besides the pages in docs/: the options, made from the code, and pages beside docs/."""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: Any) -> Files:
    """Add the page of options, and to the last part of the navigation every page that it does not name."""
    from moeflow.cli import app  # here, so that a missing package is told by mkdocs
    from moeflow.run import pipeline
    from moeflow.run.opening import shipped

    files.append(File.generated(config, "options.md", content=_options(shipped(), pipeline, app)))
    known = _named(config.nav)
    others = sorted(f.src_uri for f in files.documentation_pages() if f.src_uri not in known)
    decisions = [name for name in others if name.startswith("decisions/")]
    more = [name for name in others if name not in decisions]
    *before, (last, inside) = [*config.nav[:-1], *config.nav[-1].items()]
    config.nav = [*before, {last: [*inside, *more, {"Decisions": decisions}]}]
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """CONTRIBUTING.md is a page here, too: its links are those of the repository."""
    return (ROOT / "CONTRIBUTING.md").read_text().replace("(docs/", "(") if page.file.src_uri == "add-a-method.md" else markdown


def _named(nav: Any) -> set[str]:
    """The pages that a navigation names."""
    if isinstance(nav, str):
        return {nav}
    inside = nav.values() if isinstance(nav, dict) else nav
    return {name for one in inside for name in _named(one)}


def _coded(text: str) -> str:
    """The text with its options as code, so that none is broken at a hyphen."""
    return re.sub(r"(?<![\w`-])--[a-z][\w-]*", r"`\g<0>`", text)


def _options(shipped: dict[str, Path], pipeline: Any, app: Any) -> str:
    """Every command with its options, and every pipeline with its parameters, as `--help` shows them."""
    import typer

    lines = [
        "# Options",
        "",
        "Made from the code: what `moeflow COMMAND --help` and `moeflow run PIPELINE --help` show.",
        "",
        "## Commands",
    ]
    for name, command in sorted(typer.main.get_command(app).commands.items()):
        about = _coded(" ".join((command.help or "").split()))
        lines += ["", f"### moeflow {name}", "", about, "", "| option | meaning |", "|---|---|"]
        for one in command.params:
            words = ", ".join(one.opts) if one.param_type_name == "option" else (one.metavar or one.name.upper())
            lines.append(f"| `{words}` | {_coded((getattr(one, 'help', '') or '').replace('|', '&#124;'))} |")
    lines += ["", "## Pipelines"]
    for name, path in shipped.items():
        page = pipeline.page(pipeline.load(path), ast.get_docstring(ast.parse(path.read_text())) or "")
        lines += ["", f"### {name}", "", "```text", page, "```"]
    return "\n".join(lines) + "\n"
