"""A version in a few lines: what it is, from what, how it was asked for, how good it is; and in the end its hashes."""

import shlex
from collections.abc import Iterator
from typing import Any

from moeflow.report import layers
from moeflow.report.about import HUB, About
from moeflow.report.layers import text_config
from moeflow.report.table import shown
from moeflow.report.words import moved
from moeflow.sizes import bytes_text

WIDTH = 11  # of the words at the left
FIRST = ("bytes", "resident", "kl", "agreement", "perplexity", "decode")
"""The figures that people ask for first."""


def lines(about: About) -> list[str]:
    """What a person asks of a version, a line each: its names, what, from, how, how good."""
    made = [f"{about.version.ref}  {' '.join(about.version.labels)}".rstrip()] if about.version else []
    for word, said in (("what", _what(about)), ("from", _from(about)), *_asked(about), ("how good", _good(about))):
        made += [f"{word if at == 0 else '':<{WIDTH}}{line}" for at, line in enumerate(said)]
    return made


def hashes(about: About) -> list[str]:
    """The names by which a machine knows it, a line each."""
    manifest = about.manifest
    files = f"{len(manifest.files):,} file{'s' * (len(manifest.files) != 1)}"
    return [
        f"{'step':<{WIDTH}}{manifest.step}, version {manifest.version}",
        f"{'made':<{WIDTH}}{manifest.created} in {manifest.seconds:.1f} s",
        f"{'contents':<{WIDTH}}{manifest.digest}, {files}, {bytes_text(manifest.bytes)}",
        *([f"{'same as':<{WIDTH}}{manifest.same_as}"] if manifest.same_as else []),
        f"{'key':<{WIDTH}}{about.key}",
    ]


def listed(about: About) -> dict[str, Any]:
    """What `moeflow ls` says of a version beside its record: its bytes, also resident, and the divergence by text."""
    rows = [row for raw in about.reports for row in raw.get("rows", ()) if row.get("compressed") is not None]
    known = {row.get("figure"): row["compressed"] for row in reversed(rows)}  # the first of each
    divergence = {str(r.get("text", "")): r["compressed"] for r in rows if r.get("figure") == "kl"}
    return {"weights": known.get("bytes"), "resident": known.get("resident"), "kl": divergence}


def _what(about: About) -> list[str]:
    checkpoint = about.checkpoint
    if checkpoint is None:
        return []
    kind = str(text_config(checkpoint.config).get("model_type") or checkpoint.config.get("model_type", "model"))
    count = text_config(checkpoint.config).get("num_hidden_layers")
    alike = layers.alike(checkpoint.layers)
    words = [f"{kind.removeprefix('moeflow_')} of {count or len(checkpoint.layers)} layers"]
    return (
        words
        + [f"layer{'s' * (' to ' in numbers)} {numbers}: {layer.words}" for numbers, layer in alike[:8]]
        + ([f"and {len(alike) - 8} more kinds of layers; see moeflow report"] if len(alike) > 8 else [])
    )


def _from(about: About) -> list[str]:
    if not about.model:
        return []
    hub, (licence, file) = HUB.match(about.model), about.licence
    name = f"{about.model_name} at {hub['commit'][:12]}" if hub and hub["commit"] else about.model_name
    told = licence or (f"see {file}" if file else "")
    return [name, *([f"licence {told}"] if told else [])]


def _asked(about: About) -> Iterator[tuple[str, list[str]]]:
    """The pipeline and the parameters that were given, as words for a shell."""
    pipeline, given = about.record.get("pipeline"), about.record.get("given") or ()
    if pipeline:
        yield "pipeline", [shlex.quote(str(pipeline))]
    yield "given", [f"-p {shlex.quote(str(word))}" for word in given]


def _good(about: About) -> list[str]:
    made = []
    for word in FIRST:
        for f in (f for f in about.figures if f.figure == word and f.compressed is not None):
            within = f", 95 % interval {f.interval[0]:.3g} to {f.interval[1]:.3g}" if f.interval else ""
            before = shown(f.original, f.unit)
            beside = f" of {before}" if f.unit == "B" else f" ({before} before)" if f.original else ""
            change = f", {said}" if (said := moved(f)) and f.figure != "agreement" else ""
            unit = f" {f.unit}" if f.unit not in ("", "B") else ""
            made.append(f"{f.name}: {shown(f.compressed, f.unit)}{unit}{beside}{change}{within}")
    return made
