"""One version as one page of HTML that needs nothing else: no network, no script. Sections whose data it lacks are left out."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined

from moeflow.report import lineage, loading, sections, template
from moeflow.report.about import About
from moeflow.report.figures import Figure
from moeflow.report.sections import Section, Table
from moeflow.report.table import shown, titled
from moeflow.report.words import change, meaning, per_cent, verdict
from moeflow.run.words import count, many, span
from moeflow.sizes import bytes_text
from moeflow.store import Manifest


@dataclass(frozen=True)
class Tile:
    """One number at the head of the page."""

    name: str
    value: str
    words: str


def page(about: About) -> str:
    """The page of a version, or of an artifact that no version is. All text in it is escaped."""
    parts = [
        sections.quality(about), sections.written(about), *sections.of_checkpoint(about), sections.frontier(about),
        sections.speed(about), sections.speed(about, "serving", "How fast it is served"), sections.training(about),
        _figures(about), _loaded(about), _made(about), _cost(about), _lineage(about),
    ]  # fmt: skip
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template.PAGE).render(
        css=template.CSS,
        title=about.title,
        labels=about.version.labels if about.version else (),
        created=(about.version.created if about.version else about.manifest.created)[:16].replace("T", " "),
        source=about.model_name,
        tiles=tiles(about),
        notes=notes(about),
        sections=[part for part in parts if part is not None],
        key=about.key,
        digest=about.manifest.digest,
    )


def tiles(about: About) -> list[Tile]:
    """The few numbers that people ask for first: how small, how far from the original, how fast."""
    made = []
    if size := about.figure("bytes"):
        made.append(Tile("size", shown(size.compressed, "B"), f"of {shown(size.original, 'B')}, {per_cent(size)}"))
    if (kept := about.figure("experts")) and kept.change:
        made.append(Tile("experts", f"{shown(kept.compressed, '')} of {shown(kept.original, '')}", "stay, a layer"))
    if kl := max((f for f in about.figures if f.figure == "kl" and f.compressed is not None), key=_value, default=None):
        made.append(Tile("KL to the original", f"{kl.compressed:.3g}", f"nats a token{f', on {kl.text}' * bool(kl.text)}"))
    judged = [f for f in about.figures if f.figure == "agreement" and f.compressed is not None]
    if agreement := min(judged, key=_value, default=None):
        made.append(Tile("same next token", f"{100 * _value(agreement):.1f} %", "as the original's likeliest"))
    for f in about.figures:
        if f.chance is not None and f.compressed is not None and len(made) < 6:
            made.append(Tile(f.name, shown(f.compressed, f.unit), f"original {shown(f.original, f.unit)}"))
    if fast := about.figure("decode"):
        told = "no difference" if verdict(fast) == "undecided" else per_cent(fast) or shown(fast.compressed, "")
        made.append(Tile("decoding", told, f"{shown(fast.compressed, '')} tokens/s"))
    return made


def _value(figure: Figure) -> float:
    return figure.compressed or 0.0


def notes(about: About) -> list[str]:
    """What the reports say beside their rows, and what is to be known of its form."""
    checkpoint = about.checkpoint
    said = [*map(_unquoted, loading.of(checkpoint, ref=about.title).caveats)] if checkpoint else []
    return [
        *dict.fromkeys([*said, *(str(n) for raw in about.reports if raw.get("kind") != "written" for n in raw.get("notes", ()))])
    ]


def _loaded(about: About) -> Section | None:
    if about.checkpoint is None:
        return None
    how = loading.of(about.checkpoint, ref=about.title)
    words = f"After moeflow pull {about.title} DIR and pip install {' '.join(how.packages)}:"
    return Section("How to load it", words, code=how.code, after=_unquoted(how.engine))


def _made(about: About) -> Section | None:
    return Section("How it was made", "", code=shlex.join(about.command)) if about.command else None


def _unquoted(text: str) -> str:
    """Markdown as plain text."""
    return text.replace("`", "")


def _figures(about: About) -> Section | None:
    rows = [
        (titled(f.name, f.unit), shown(f.original, f.unit), shown(f.compressed, f.unit), _within(f), change(f), meaning(f))
        for f in about.figures
        if f.kind != "fit" or f.figure
    ]
    if not rows:
        return None
    head = ("", "original", "this model", "95 % interval", "change", "what it is")
    return Section("Every figure", "All that was measured, as the reports have it.", tables=(Table(head, rows, right=(1, 2)),))


def _within(f: Figure) -> str:
    return f"{shown(f.interval[0], f.unit)} to {shown(f.interval[1], f.unit)}" if f.interval else ""


def _cost(about: About) -> Section | None:
    """What each step of the run took."""
    groups: dict[str, list[Manifest]] = {}
    for manifest in about.made.values():
        groups.setdefault(manifest.step, []).append(manifest)
    if not groups:
        return None
    total = _spent([*about.made.values()])
    making = sum(m.seconds for m in about.lineage.values())
    rows = [(name, *_spent(group)) for name, group in sorted(groups.items(), key=lambda g: -sum(m.seconds for m in g[1]))]
    machines = sorted({str(m.machine.get("gpu") or "the processor") for m in about.made.values() if m.machine})
    words = (
        f"{count(len(about.made), 'step')} took {span(sum(m.seconds for m in about.made.values()))} together, {span(making)} to "
        f"make it and the rest to measure it, on {' and '.join(machines) or 'a machine that is not told'}. Steps that other "
        "versions share are counted in full."
    )
    head = ("step", "runs", "time", "read", "stored", "operations")
    return Section("What it cost", words, tables=(Table(head, [*rows, ("together", *total)], right=(1, 2, 3, 4, 5), total=True),))


def _spent(group: Sequence[Manifest]) -> tuple[str, ...]:
    return (
        f"{len(group):,}", span(sum(m.seconds for m in group)), bytes_text(sum(m.reads for m in group)),
        bytes_text(sum(m.bytes for m in group)), many(sum(sum(m.operations.values()) for m in group)),
    )  # fmt: skip


def _lineage(about: About) -> Section:
    sources = [(uri, f"{len(files):,}", _pin(next(iter(files.values()), ""))) for uri, files in about.sources.items()]
    tables = [Table(("source", "files", "pin of the first"), sources, right=(1,))] if sources else []
    head, rows = lineage.COLUMNS, lineage.step_rows(about.lineage)
    tables.append(Table(head, rows, right=(3, 4)))
    words = f"All that it was made from: {count(len(about.lineage), 'key')}."
    used = ", ".join(f"{name} {' and '.join(found)}" for name, found in lineage.libraries(about.lineage).items())
    return Section("What it was made from", words, tables=tuple(tables), after=f"Libraries: {used}." if used else "")


def _pin(pin: str) -> str:
    return pin if len(pin) <= 24 else f"{pin[:21]}..."
