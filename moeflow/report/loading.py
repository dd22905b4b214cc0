"""How a checkpoint of each form is loaded, and what has to be known of it: told by its config.json and its files alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeflow.engines import ENGINES, form_of
from moeflow.report.layers import LAYERS, Checkpoint, text_config

OWN = "moeflow_"
"""The beginning of the model type of a checkpoint in moeflow's own format."""
TOKENIZERS = ("tokenizer", "vocab", "merges")
VLLM = ENGINES["vllm"]


@dataclass(frozen=True)
class Loading:
    library: str
    """The library that loads it: transformers, or moeflow where transformers alone does not."""
    packages: tuple[str, ...]
    """What to install, as for pip."""
    code: str
    """Python that loads it from the folder DIR."""
    engine: str
    """How an engine serves it, or why none does, in Markdown."""
    caveats: tuple[str, ...]


def of(checkpoint: Checkpoint, *, ref: str = "") -> Loading:
    """How this checkpoint is loaded; `ref`: the version to pull it from again."""
    config = checkpoint.config
    own = str(config.get("model_type", "")).startswith(OWN)
    packed = _packed(config)
    packages = ("transformers",) + ("compressed-tensors",) * bool(packed) + ("moeflow",) * own
    caveats = [_different(config)] if own else []
    if packed:
        bits, groups = (sorted({scheme[at] for scheme in packed}) for at in (0, 1))
        in_groups = f", in groups of {groups[0]}" if len(groups) == 1 and groups[0] else ""
        plain = _not_packed(checkpoint)
        caveats.append(f"Its experts are stored in {' or '.join(map(str, bits))} bits{in_groups}{plain}.")
    counts = {layer.now for layer in checkpoint.layers if layer.now}
    if not own and len(counts) == 1 and any(layer.kept for layer in checkpoint.layers):
        (count,) = counts
        caveats.append(f"Engines that spread experts over GPUs need a number of GPUs that divides {count}.")
    if config.get("auto_map") and not own:  # moeflow's own says no more than that moeflow is needed
        caveats.append("It names Python code of its own (`auto_map`), which travels along and which moeflow has never run.")
    return Loading(
        "moeflow" if own else "transformers", packages, _code(checkpoint, own), _engine(config, own, packed, ref), tuple(caveats)
    )


def _not_packed(checkpoint: Checkpoint) -> str:
    """The layers whose experts were left as they are where those of others were quantized, in words."""
    holding = [layer for layer in checkpoint.layers if layer.now]
    plain = [str(layer.layer) for layer in holding if not layer.bits]
    if not plain or len(plain) == len(holding):  # a checkpoint that came packed says nothing of its layers
        return ""
    return f", but for layer{'s' * (len(plain) > 1)} {', '.join(plain)}, where they are not quantized"


def _code(checkpoint: Checkpoint, own: bool) -> str:
    config = checkpoint.config
    several = any(key in config for key in ("vision_config", "audio_config")) and "text_config" in config
    kind, reader = ("AutoModelForImageTextToText", "AutoProcessor") if several else ("AutoModelForCausalLM", "AutoTokenizer")
    reads = any(name.startswith(TOKENIZERS) for name in checkpoint.names)
    lines = ["import moeflow  # tells transformers about layers that differ"] * own
    lines += [f"from transformers import {kind}" + f", {reader}" * reads, ""]
    lines += [f'model = {kind}.from_pretrained("DIR", dtype="auto")']
    lines += [f'{"processor" if several else "tokenizer"} = {reader}.from_pretrained("DIR")'] * reads
    return "\n".join(lines)


def _engine(config: Mapping[str, Any], own: bool, packed: Sequence[tuple[int, int]], ref: str) -> str:
    if own:
        formats = text_config(config).get(LAYERS) or config.get(LAYERS) or []
        alone = {(f or {}).get("experts") for f in formats if (f or {}).get("experts")}
        low_rank = any((f or {}).get("ranks") for f in formats)
        others = any((f or {}).get(name) for f in formats for name in ("skip", "compressed", "gone"))
        text = f"Engines that know only the family's own format, such as vLLM, refuse its model type `{config.get('model_type')}`."
        if low_rank and len(alone) == 1 and not others:
            text += f" `moeflow pull {ref or 'REF'} DIR --dense` writes the family's own format, at the size that it had before."
        return text
    if packed:
        if why := form_of(config).why_not(VLLM):
            runs = [name for name, engine in ENGINES.items() if not form_of(config).why_not(engine)]
            return f"vLLM does not load it: {'; '.join(why)}. It is loaded by {', '.join(runs)}."
        return "`vllm serve DIR` on a GPU: vLLM has kernels for experts packed so; moeflow's tests load them with transformers."
    return "It is in its family's own format, so that an engine which serves the original serves it too: `vllm serve DIR`."


def _different(config: Mapping[str, Any]) -> str:
    """What the family's own classes cannot hold."""
    formats = [f or {} for f in text_config(config).get(LAYERS) or config.get(LAYERS) or []]
    words = []
    if len({f.get("experts") for f in formats if f.get("experts")}) > 1:
        words.append("layers have different numbers of experts")
    if any(f.get("ranks") for f in formats):
        words.append("matrices of experts are low-rank, as two factors")
    if any(f.get("skip") for f in formats):
        words.append("tokens skip experts")
    if any(f.get("compressed") for f in formats):
        words.append("it has Compressed Experts")
    if any(f.get("gone") for f in formats):
        words.append("MoE blocks, or their experts, are gone")
    return f"transformers loads it after `import moeflow` only: {', '.join(words) or 'its family has no such form'}."


def _packed(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Bits and group size of packed weights, each pair that there is; none if they are not packed by moeflow."""
    quantized = config.get("quantization_config") or text_config(config).get("quantization_config") or {}
    if quantized.get("quant_method") != "compressed-tensors":
        return []
    groups = [g.get("weights") or {} for g in (quantized.get("config_groups") or {}).values()]
    return [(int(weights.get("num_bits") or 0), int(weights.get("group_size") or 0)) for weights in groups]
