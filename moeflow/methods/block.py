"""Blocks of consecutive layers chosen together: the KT-Reception Field (MoE-I², arXiv 2411.01016, section 3.2).

Of every layer's K best sets, the combination that changes the output of a block of T layers least. The combinations are walked
as a tree whose branches share what comes before them: K + K² + K³ layers run where T·K^T would. These are real decoder layers:
attention, norms and residual are part of the block. The paper leaves open where a block's inputs come from: `original`, the
unpruned model, or `progressive`, the already pruned blocks below; the target is the original's output of the block either way.
"""

import json
from collections.abc import Sequence
from typing import Any

from moeflow.methods.calibrate import HIDDEN
from moeflow.methods.candidates import read_candidates
from moeflow.methods.choose import CHOICE, CRITERIA, readable
from moeflow.model.layout import read_config
from moeflow.model.spec import HiddenSpec, LayerSpec, ObservedSpec, RestSpec
from moeflow.step import Artifact, Context, Spec, step

BLOCK = "block.json"
INPUTS = ("original", "progressive")
MAX_COMBINATIONS = 10_000


def _block_spec(
    rest: RestSpec, *inputs: Any, layers: list[int], searched: list[int], best: int, shards: int, goals: int, batch: int, dtype: str
) -> Spec:
    if best ** len(searched) > MAX_COMBINATIONS:
        raise ValueError(
            f"K={best} sets in each of T={len(searched)} layers are {best ** len(searched):,} combinations, over "
            f"{MAX_COMBINATIONS:,}; lower K or T"
        )
    layer_specs: Sequence[LayerSpec] = inputs[: len(layers)]
    found = inputs[len(layers) : len(layers) + len(searched)]
    states: list[HiddenSpec] = [s.hidden if isinstance(s, ObservedSpec) else s for s in inputs[len(layers) + len(searched) :]]
    reads = shards * sum(layer.nbytes for layer in layer_specs) + sum(c["bytes"] for c in found) + sum(s.nbytes for s in states)
    held = sum(best**t for t in range(max(1, len(searched)))) + 2
    memory = 3 * max(layer.nbytes for layer in layer_specs) + held * max(s.nbytes for s in states)
    writes = 200 + best ** len(searched) * (60 + 8 * len(searched))
    return Spec({"layers": layers, "bytes": writes}, reads=reads, writes=writes, memory=memory)


@step("search.block", version=1, spec=_block_spec, gpus=1)
def block(
    context: Context, config: Artifact, *inputs: Artifact,
    layers: list[int], searched: list[int], best: int, shards: int, goals: int, batch: int, dtype: str,
) -> None:  # fmt: skip
    """The loss of every combination of the `best` sets of the `searched` among consecutive `layers`, as `block.json`.

    `inputs`: the layers' files, the candidates of the searched ones, the hidden states before the block in `shards` files, and
    where `goals` is not 0 as many files with the original's behind it; otherwise the unpruned layers say what is aimed at.
    """
    from moeflow.methods import reception

    files = [i.file("layer.safetensors") for i in inputs[: len(layers)]]
    at = len(layers) + len(searched)
    found = [read_candidates(i)["counts"] for i in inputs[len(layers) : at]]
    sets = {i: [s["keep"] for s in _only(c)["best"][:best]] for i, c in zip(searched, found, strict=True)}
    losses = reception.losses(
        read_config(config), list(zip(layers, files, strict=True)), sets,
        [h.file(HIDDEN) for h in inputs[at : at + shards]], [h.file(HIDDEN) for h in inputs[at + shards :]],
        batch=batch, dtype=dtype, progress=context.progress,
    )  # fmt: skip
    order = sorted(losses, key=lambda c: losses[c])
    lines = [json.dumps({"sets": list(c), "loss": losses[c]}) for c in order]
    context.note(f"layers {layers}: best combination {list(order[0])} of {len(order)}")
    (context.out / BLOCK).write_text('{"layers": ' + json.dumps(searched) + ', "combinations": [\n' + ",\n".join(lines) + "\n]}\n")


def _pick_spec(found: Any, *deciders: Any, layer: int, keep: int) -> Spec:
    if keep and keep not in found["counts"]:
        raise ValueError(f"the candidates of layer {layer} are for {found['counts']} experts, not for {keep}")
    reads = found["bytes"] + sum(d.get("bytes", 200) for d in deciders)
    share = min((d["share"] for d in deciders if "share" in d), default=1.0)
    return Spec({"layer": layer, "keep": keep, "share": share, "bytes": 1500}, reads=reads, writes=1500)


@step("search.pick", version=1, spec=_pick_spec)
def pick(context: Context, found: Artifact, *deciders: Artifact, layer: int, keep: int) -> None:
    """One of a layer's candidates, as the `choice.json` that `drop.experts` reads.

    `deciders`: the counts of all layers (where `keep` is 0) and the block that the layer belongs to (where blocks are chosen
    together).
    """
    from moeflow.methods.candidates import COUNTS, read_counts

    candidates, rank = read_candidates(found), 0
    for decider in deciders:
        if COUNTS in decider.names():
            keep = read_counts(decider)["counts"][str(layer)]
        else:
            chosen = json.loads(decider.read(BLOCK, 0, decider.size(BLOCK)))
            rank = chosen["combinations"][0]["sets"][chosen["layers"].index(layer)]
    entry = candidates["counts"][str(keep)] if keep else _only(candidates["counts"])
    picked, others = entry["best"][rank], [s for i, s in enumerate(entry["best"]) if i != rank]
    choice = {
        "layer": layer,
        "experts": candidates["experts"],
        "keep": picked["keep"],
        "criterion": candidates["method"],
        "loss": {"kind": "frobenius", "value": picked["loss"], "of_output": picked["of_output"], "tokens": candidates["tokens"]},
        "runner_up": others[0] if others else None,
        "baselines": {name: entry["baselines"][name] for name in CRITERIA},
    }
    (context.out / CHOICE).write_text(readable(choice))


def _only(counts: dict[str, Any]) -> Any:
    (entry,) = counts.values()
    return entry
