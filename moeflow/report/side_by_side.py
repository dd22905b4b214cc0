"""A comparison of versions (`comparing.compare`) as tables for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from moeflow.report.table import shown, titled

SHOWN = 12
"""So many experts of a layer are listed that only one version keeps."""


def tables(made: Mapping[str, Any], *, plain: bool = False) -> Iterator[tuple[str, Table | str]]:
    """Each part of a comparison: its title and its table, or a sentence where nothing differs."""
    refs = [v["ref"] for v in made["versions"]]
    yield "figures", _figures(made["figures"], refs, plain)
    if made["paired"]:
        yield "how far from the original, sequence by sequence", _paired(made["paired"], plain)
    if made["layers"]:
        yield "layers that differ", _layers(made["layers"], refs, plain)
    else:
        yield "layers that differ", "none: the same was done to every layer"
    asked = [o for o in made["options"] if _asked(o)]
    yield "options that differ", _rows(("", *refs), [(o["name"], *map(_word, o["values"])) for o in asked], plain)
    yield "made from", _upstream(made["lineage"], refs, plain)


def _asked(option: Mapping[str, Any]) -> bool:
    """Whether people asked for it, or two have it with other values; the defaults of another pipeline say nothing."""
    had = [v for v in option["values"] if v is not None]
    return any(option["given"]) or any(v != had[0] for v in had)


def _figures(rows: Sequence[Mapping[str, Any]], refs: Sequence[str], plain: bool) -> Table | str:
    named = any(r["figure"] for r in rows)
    changes = [f"{ref} against {refs[0]}" for ref in refs[1:]]
    cells = [
        (
            titled(r["name"], r["unit"]), shown(r["original"], r["unit"]), *(shown(v, r["unit"]) for v in r["values"]),
            *(_change(c, word, apart=r["apart"]) for c, word in zip(r["change"][1:], r["verdicts"][1:], strict=True)),
        )
        for r in rows
        if r["figure"] or not named
    ]  # fmt: skip
    return _rows(("", "original", *refs, *changes), cells, plain, right=range(1, len(refs) + 2))


def _change(change: float | None, verdict: str, *, apart: bool) -> str:
    if change is None:
        return ""
    if change == 0:
        return "the same"
    if apart:
        return f"{change:+.3g} %, measured apart"
    return f"{change:+.3g} %" + (f", {verdict}" if verdict else "")


def _paired(rows: Sequence[Mapping[str, Any]], plain: bool) -> Table | str:
    cells = []
    for r in rows:
        low, high = r["interval"] or (None, None)
        words = f"{r['version']} is {r['verdict']}" if r["verdict"] in ("closer", "farther") else r["verdict"]
        within = "-" if low is None else f"{low:+.3g} to {high:+.3g}"
        won = f"{r['wins']:,} closer, {r['losses']:,} farther"
        cells.append((r["text"], r["version"], f"{r['difference']:+.3g}", within, won, words))
    head = ("text", "", "difference [nats/token]", "95 % interval", "sequences", "so that")
    return _rows(head, cells, plain, right=(2,))


def _layers(rows: Sequence[Mapping[str, Any]], refs: Sequence[str], plain: bool) -> Table | str:
    cells = []
    for r in rows:
        first = None if r["kept"][0] is None else {*r["kept"][0]}
        words = [r["done"][0]]
        for done, kept, overlap in zip(r["done"][1:], r["kept"][1:], r["overlap"][1:], strict=True):
            parts = [done]
            if first is not None and kept is not None and overlap is not None and {*kept} != first:
                parts.append(f"{overlap:.0%} of the experts in common")
                more, less = sorted({*kept} - first), sorted(first - {*kept})
                parts += [f"more: {_some(more)}"] * bool(more) + [f"less: {_some(less)}"] * bool(less)
            words.append("; ".join(parts))
        cells.append((str(r["layer"]), *words))
    return _rows(("layer", *refs), cells, plain)


def _some(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts[:SHOWN])) + (f" and {len(experts) - SHOWN} others" if len(experts) > SHOWN else "")


def _upstream(lineage: Mapping[str, Any], refs: Sequence[str], plain: bool) -> Table | str:
    cells = [("keys", *(f"{n:,}, {lineage['shared']:,} of them in all" for n in lineage["keys"]))]
    for source in lineage["sources"]:
        words = ["-" if n is None else f"{n:,} files" for n in source["files"]]
        cells.append(
            (source["uri"], *(f"{w}, {d:,} of them others" if d else w for w, d in zip(words, source["differ"], strict=True)))
        )
    for step in lineage["steps"]:
        both = zip(step["versions"], step["keys"], strict=True)
        cells.append((step["step"], *(f"{n:,} of its own, version {' and '.join(map(str, v))}" if v else "-" for v, n in both)))
    cells += [(r["name"], *(" and ".join(v) or "-" for v in r["versions"])) for r in lineage["libraries"]]
    return _rows(("", *refs), cells, plain)


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]], plain: bool, right: Sequence[int] = ()) -> Table | str:
    if not rows:
        return "none"
    made = Table(box=None if plain else SIMPLE, pad_edge=False)
    for at, title in enumerate(head):
        made.add_column(Text(title), justify="right" if at in right else "left")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def _word(value: Any) -> str:
    return "-" if value is None else str(value)
