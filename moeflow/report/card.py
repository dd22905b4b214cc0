"""README.md and recipe.yaml of a checkpoint: a model card that says what it is, how it was made, how good it is and how to load it.

They are written by `moeflow pull` (and by whatever else hands a checkpoint out), not by the step that assembles it: the reports are
made after the checkpoint, and beside it, so that its key does not depend on the machine that measured its speed; a card inside
would have to be without them. What pulls it knows both. The card is ours: the README.md of the source tells of another model, and
is not copied; what it says of licence and language is taken over as metadata.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeflow.report import layers, loading, recipe, sections
from moeflow.report.about import HUB, About
from moeflow.report.figures import Figure
from moeflow.report.layers import LAYERS, Checkpoint
from moeflow.report.loading import Loading
from moeflow.report.table import shown, titled
from moeflow.report.words import change, meaning, per_cent

FILE = "README.md"
JUDGED = ("size", "layers", "quality", "speed", "serving", "fit", "fine-tuning", "experts per token", "written")
"""The kinds of reports that let no model do a task."""
SHOWN = 3
"""So many texts are shown."""


def describe(about: About, folder: Path, *, dense: bool = False) -> list[str]:
    """Write the card and the recipe of a version into the folder with its files; returns the names of what was written.

    `dense`: its low-rank matrices were multiplied out there. What is no checkpoint gets neither.
    """
    checkpoint = layers.read(layers.Files(folder))
    if checkpoint is None:
        return []
    made = {FILE: card(about, checkpoint, dense=dense), recipe.FILE: recipe.text(about)}
    for name, text in made.items():
        if text:
            (folder / name).unlink(missing_ok=True)  # it may be a link to what others read, too
            (folder / name).write_text(text)
    return [name for name, text in made.items() if text]


def card(about: About, checkpoint: Checkpoint, *, dense: bool = False) -> str:
    """The model card of a version whose checkpoint is this."""
    from huggingface_hub import ModelCard

    how = loading.of(checkpoint, ref=about.title)
    title = about.version.name if about.version else "A compressed checkpoint"
    parts = [
        f"# {_plain(title)}", _what(about, dense), _load(how), _done(checkpoint), _table(about.figures), _written(about),
        _made(about), _caveats(about, checkpoint, how, dense),
    ]  # fmt: skip
    body = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{_data(about, checkpoint, how).to_yaml()}\n---\n\n{body}\n"))


def _data(about: About, checkpoint: Checkpoint, how: Loading) -> Any:
    """The metadata at the head of the card, as the hub reads it."""
    from huggingface_hub import ModelCardData

    told = about.record.get("model")
    of_source: dict[str, Any] = {k: v for k, v in told.items() if k != "uri"} if isinstance(told, dict) else {}
    licence, file = about.licence
    hub = HUB.match(about.model)
    known = {name: of_source[name] for name in ("language", "pipeline_tag", "license_name", "license_link") if of_source.get(name)}
    if licence or file:
        known["license"] = of_source.get("license") or "other"
    if file and known["license"] == "other":
        known = {"license_name": file.rpartition(".")[0] or file, "license_link": file} | known
    if base := hub["name"] if hub else of_source.get("base_model"):
        known["base_model"] = base
    return ModelCardData(**{"library_name": how.library, "tags": _tags(checkpoint)} | known)


def _tags(checkpoint: Checkpoint) -> list[str]:
    done = " ".join(layer.words for layer in checkpoint.layers)
    words = {
        "pruned": any(layer.kept is not None for layer in checkpoint.layers) or "it was layer" in done,
        "low-rank": any((f or {}).get("ranks") for f in checkpoint.config.get(LAYERS) or ()),
        "quantized": bool(checkpoint.config.get("quantization_config")),
        "sparse": "pattern" in done,
    }
    return ["moe", "mixture-of-experts", "compressed", "moeflow", *(word for word, holds in words.items() if holds)]


def _what(about: About, dense: bool) -> str:
    """The first paragraph: what it is made from, how small it is, how far from the original."""
    source, hub, size = about.model_name, HUB.match(about.model), about.figure("bytes")
    name = f"[{source}](https://huggingface.co/{source})" if hub else f"`{source.rstrip('/').rpartition('/')[2]}`"
    parts = [f"A Mixture-of-Experts model{f' made from {name}' * bool(source)}, compressed by moeflow."]
    if size and size.original and not dense:
        parts.append(f"Its weights take {shown(size.compressed, 'B')} instead of {shown(size.original, 'B')} ({per_cent(size)}).")
    for kl in (f for f in about.figures if f.figure == "kl" and f.compressed is not None):
        within = f" (95 % interval {kl.interval[0]:.3g} to {kl.interval[1]:.3g})" if kl.interval else ""
        text = _plain(kl.text or "held-out text")
        parts.append(f"On {text} its predictions are {kl.compressed:.3g} nats a token from the original's{within}.")
    if dense:
        parts.append("Its low-rank matrices were multiplied out in this folder: it is as large and as fast as if they were whole.")
    return " ".join(parts)


def _load(how: Loading) -> str:
    return f"## How to load it\n\n    pip install {' '.join(how.packages)}\n\n```python\n{how.code}\n```\n\n{how.engine}"


def _done(checkpoint: Checkpoint) -> str:
    if not checkpoint.layers:
        return ""
    rows = ["| layers | experts before | experts now | what was done |", "|---|---|---|---|"]
    for numbers, layer in layers.alike(checkpoint.layers):
        now = ["-" if n is None else str(n) for n in (layer.experts, layer.now)]
        rows.append(f"| {numbers} | {now[0]} | {now[1]} | {_plain(layer.words)} |")
    return "## What was done to each layer\n\n" + "\n".join(rows) + "\n\n`moeflow.json` says which experts stay, and why."


def _table(figures: Sequence[Figure]) -> str:
    named = [f for f in figures if f.figure] or figures  # reports of before figures had words have all of their rows
    if not named:
        return ""
    rows = ["| | original | this model | change | what it is |", "|---|---:|---:|---|---|"]
    for f in named:
        within = f" ({f.interval[0]:.3g} to {f.interval[1]:.3g})" if f.interval else ""
        values = shown(f.original, f.unit), f"{shown(f.compressed, f.unit)}{within}", change(f), meaning(f)
        rows.append(f"| {' | '.join(map(_plain, (titled(f.name, f.unit), *values)))} |")
    return "## How good it is\n\n" + "\n".join(rows) + "\n\nIn brackets: 95 % intervals."


def _written(about: About) -> str:
    blocks = [
        f"The original:\n\n{_fenced(pair.prompt + pair.original)}\n\nThis model:\n\n{_fenced(pair.prompt + pair.compressed)}"
        for pair in sections.generations(about)[:SHOWN]
    ]
    return "## What it writes\n\n" + "\n\n".join(blocks) if blocks else ""


def _made(about: About) -> str:
    if not about.command:
        return f"## How it was made\n\nBy moeflow, under the key `{about.key}`."
    command = shlex.join(about.command)
    return (
        f"## How it was made\n\n{_fenced(command)}\n\nThe same again, from every parameter and the pins of its sources in "
        f"`{recipe.FILE}`:\n\n    moeflow run {recipe.FILE}\n\nKey: `{about.key}`."
    )


def _caveats(about: About, checkpoint: Checkpoint, how: Loading, dense: bool) -> str:
    lines = [*how.caveats]
    if dense:
        lines.append("Sizes and speeds above are those of the low-rank checkpoint that it was made of.")
    kinds = {str(raw.get("kind")) for raw in about.reports}
    done = " ".join(layer.words for layer in checkpoint.layers)
    if any(layer.kept is not None for layer in checkpoint.layers) and "fine-tuned" not in done:
        lines.append("It was not fine-tuned after experts were taken out.")
    if not about.reports:
        lines.append("Nothing was measured of it.")
    elif not kinds - {*JUDGED}:
        lines.append("It was judged by its predictions on text, not by tasks: try what it writes on prompts of your own.")
    texts = dict.fromkeys(f.text for f in about.figures if f.text)
    if texts:
        lines.append(f"What is said of its quality holds for {', '.join(map(_plain, texts))}; other text can lose more.")
    if not any(about.licence):
        lines.append("Its source says no licence: ask its owner before you pass it on.")
    notes = dict.fromkeys(note for raw in about.reports if raw.get("kind") != "written" for note in raw.get("notes") or ())
    lines += [_plain(str(note)) for note in notes]
    return "## What to know\n\n" + "\n".join(f"- {line[:1].upper()}{line[1:]}" for line in lines) if lines else ""


def _plain(text: str) -> str:
    """Text that Markdown and HTML leave as it is, in one line."""
    text = " ".join(text.split())
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, f"&#{ord(sign)};" if sign in "<>|" else f"\\{sign}")
    return text


def _fenced(text: str) -> str:
    """A block of code, whatever is in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
