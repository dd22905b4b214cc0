"""What was done to each layer of a stored checkpoint, in order and in words: from its moeflow.json, config.json and index."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

EXPERT = re.compile(r"layers\.(\d+)\..*?experts\.(\d+)\.")
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""The keys of config.json for the number of routed experts."""
LAYERS = "moeflow_layers"
"""The key of config.json for the formats of layers that differ."""


@dataclass(frozen=True)
class Layer:
    """One layer of a checkpoint, and what became of the layer of its source."""

    layer: int
    """Its number now."""
    was: int
    """Its number in the source."""
    experts: int | None
    """The routed experts that it had in the source; 0 for a dense layer, None if it cannot be told."""
    kept: tuple[int, ...] | None
    """Those that stay, by their numbers in the source, ascending; None if all do."""
    done: tuple[str, ...]
    """What was done, a phrase for each step."""
    ranks: Mapping[int, float]
    """The mean rank of the matrices of each expert that has low-rank ones, by its number in the source."""
    bits: int | None
    """Of the weights of its experts, if they were quantized."""
    error: float | None
    """How far its output moved when its experts were chosen, as a part of the output's norm."""
    divergence: float | None
    """How far the whole model's predictions move when this layer alone is so, in nats a token; measured by a fit."""
    lost: float | None
    """The mean error of its experts' matrices by rounding or lower ranks, relative to their outputs."""

    @property
    def now(self) -> int | None:
        """How many experts stay."""
        return self.experts if self.kept is None else len(self.kept)

    @property
    def words(self) -> str:
        return "; ".join(self.done) or "unchanged"


@dataclass(frozen=True)
class Checkpoint:
    """What a stored checkpoint says of itself."""

    config: Mapping[str, Any]
    layers: tuple[Layer, ...]
    choices: tuple[Mapping[str, Any], ...]
    """The decisions that led to it, as their records are."""
    names: tuple[str, ...]
    """The names of its files."""


class Readable(Protocol):
    """A folder whose small files are read: a stored one, or one that was pulled."""

    def names(self) -> list[str]: ...

    def size(self, name: str) -> int: ...

    def read(self, name: str, start: int, stop: int) -> bytes | memoryview: ...


@dataclass(frozen=True)
class Files:
    """A folder on this machine, read as a stored one is."""

    folder: Path

    def names(self) -> list[str]:
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def read(self, name: str, start: int, stop: int) -> bytes | memoryview:
        with (self.folder / name).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)


def read(artifact: Readable) -> Checkpoint | None:
    """A checkpoint; None for what is none."""
    names = artifact.names()
    if "config.json" not in names:
        return None
    config = _json(artifact, "config.json")
    history = _json(artifact, "moeflow.json") if "moeflow.json" in names else {}
    index = _json(artifact, "model.safetensors.index.json") if "model.safetensors.index.json" in names else {}
    choices = tuple(c for c in history.get("choices", ()) if isinstance(c, Mapping))
    done = {entry["layer"]: entry["done"] for entry in history.get("layers", ())}
    counts = _counts(config, index.get("weight_map", {}))
    numbers = sorted({*counts, *done})
    return Checkpoint(config, tuple(_layer(i, done.get(i, ()), counts.get(i), choices) for i in numbers), choices, tuple(names))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the language model, which a multimodal one has inside."""
    inside = config.get("text_config")
    return inside if isinstance(inside, Mapping) else config


def _json(artifact: Readable, name: str) -> Any:
    return json.loads(bytes(artifact.read(name, 0, artifact.size(name))))


def _counts(config: Mapping[str, Any], weight_map: Mapping[str, str]) -> dict[int, int | None]:
    """The routed experts of each layer as it is now, by the names of its tensors, or else by config.json."""
    text = text_config(config)
    total = int(text.get("num_hidden_layers") or 0)
    formats = text.get(LAYERS) or config.get(LAYERS)
    if isinstance(formats, Sequence) and formats:
        return {i: int((f or {}).get("experts", 0)) for i, f in enumerate(formats)}
    found: dict[int, int] = {}
    for name in weight_map:
        if match := EXPERT.search(name):
            found[int(match[1])] = max(found.get(int(match[1]), 0), int(match[2]) + 1)
    if found:
        return {i: found.get(i, 0) for i in range(max(total, max(found) + 1))}
    count = next((int(text[key]) for key in COUNTS if isinstance(text.get(key), int)), None)
    return dict.fromkeys(range(total), count)


def _layer(number: int, done: Sequence[Mapping[str, Any]], now: int | None, choices: Sequence[Mapping[str, Any]]) -> Layer:
    was = next((int(d["from"]) for d in done if d["step"] == "trim.renumber"), number)
    kept: list[int] | None = None
    experts, bits, ranks, lost = now, None, dict[int, float](), list[float]()
    for d in done:
        if d["step"] == "rewrite.experts":
            if kept is None:
                experts, kept = int(d["experts"]), list(d["keep"])
            else:
                kept = [kept[e] for e in d["keep"]]
        elif d["step"] in ("trim.without_moe_block", "trim.gone"):
            treated = [of for one in done for of in one.get("experts") or () if isinstance(one.get("experts"), list)]
            known = len([of for of in treated if isinstance(of.get("expert"), int)]) or None
            experts, kept = experts if kept is not None else known, []
        bits = d.get("bits", bits) if d["step"] == "slim.layer" else bits
        for of in d.get("experts") or () if isinstance(d.get("experts"), list) else ():
            lost += [v for v in (of.get("lost") or {}).values() if isinstance(v, int | float)]
            if any((of.get("ranks") or {}).values()) and isinstance(of["expert"], int):
                ranks[of["expert"] if kept is None else kept[of["expert"]]] = fmean(r for r in of["ranks"].values() if r)
    chosen = [c for c in choices if c.get("layer") == was and isinstance(c.get("loss"), Mapping)]
    alone = next((c["alone"][str(was)] for c in choices if str(was) in c.get("alone", {})), None)
    return Layer(
        number, was, experts, None if kept is None else tuple(kept), tuple(_words(d) for d in done), ranks, bits,
        float(chosen[-1]["loss"]["of_output"]) if chosen else None, None if alone is None else float(alone),
        fmean(lost) if lost else None,
    )  # fmt: skip


def _words(d: Mapping[str, Any]) -> str:
    """What one step did to a layer, as a phrase; a step that is not known here by its name."""
    step = d["step"]
    each: list[Any] = d["experts"] if isinstance(d.get("experts"), list) else []
    if step == "rewrite.experts":
        return f"{len(d['keep'])} of {d['experts']} experts stay"
    if step == "slim.layer":
        how = f"{d['bits']} bits" if d.get("bits") else f"pattern {d.get('pattern', '')}".strip()
        group = f" in groups of {d['group']}" if d.get("bits") and d.get("group") else ""
        return f"experts by {d['method']}, {how}{group}"
    if step == "decompose.layer":
        cut = [e for e in each if any((e.get("ranks") or {}).values())]
        if not cut:
            return "experts left whole by the decomposition"
        mean = fmean(r for e in cut for r in e["ranks"].values() if r)
        return f"low-rank matrices in {len(cut)} of {len(each)} experts, mean rank {mean:.4g}"
    plain = {
        "trim.without_moe_block": "its MoE block is gone",
        "trim.gone": "its MoE block is gone",
        "trim.renumber": f"it was layer {d.get('from')}",
        "fewer_active.skipping": f"tokens skip experts (rule {d.get('rule')})",
        "fewer_active.compressed_experts": f"Compressed Experts ({d.get('form')})",
        "finetune.layer": f"fine-tuned ({d.get('mode')}, loss {d.get('loss')})",
        "checkpoint.merged_layer": f"an adapter merged into {d.get('tensors')} tensors",
    }
    return plain.get(step, step)


def alike(layers: Sequence[Layer]) -> list[tuple[str, Layer]]:
    """Runs of neighbouring layers that were treated alike: "0 to 3", and the first of them."""
    runs: list[list[Layer]] = []
    for layer in layers:
        if runs and (runs[-1][-1].words, runs[-1][-1].experts) == (layer.words, layer.experts):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [(f"{r[0].layer}" if len(r) == 1 else f"{r[0].layer} to {r[-1].layer}", r[0]) for r in runs]
