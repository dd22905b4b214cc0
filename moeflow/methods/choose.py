"""The choice of the experts of one layer that stay: a small JSON that a person can read and diff.

Shapes are suffixes: T tokens, D model width, E experts, S subsets, B batches.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moeflow.arch import arch_of
from moeflow.methods.criteria import CRITERIA, best_by_score
from moeflow.methods.subsets import MAX_SUBSETS, all_subsets, count_subsets, mask_of, squared_errors, squared_errors_direct
from moeflow.model.checkpoint import Tensors, read_moe
from moeflow.model.spec import LayerSpec, ObservedSpec, RestSpec, precision
from moeflow.step import Artifact, Context, Spec, step

CHOICE = "choice.json"
LOSSES = ("frobenius", "batch-sum")
STATS = ("count_E", "weight_E", "score_E", "norm_E", "reap_E", "reap_sq_E", "tokens")

Subset = tuple[int, ...]


def _choose_spec(
    rest: RestSpec, layer_spec: LayerSpec, *seen: ObservedSpec,
    layer: int, keep: int, criterion: str, loss: str, batch_tokens: int, seed: int, dtype: str, targets: int,
) -> Spec:  # fmt: skip
    config = rest.config
    arch = arch_of(config)
    arch.check_keep(config, keep)
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is not known; choose one of {', '.join(LOSSES)}")
    count = count_subsets(layer_spec.experts, keep, arch.group_limit(config)[0])
    if criterion == "enumerate" and count > MAX_SUBSETS:
        raise ValueError(
            f"keeping {keep} of {layer_spec.experts} experts means {count:,} subsets, over {MAX_SUBSETS:,}: enumeration is for "
            "narrow layers; choose by score instead (search=reap)"
        )
    states = [s.hidden for s in seen]
    partial = [s for s, h in zip(seen, states, strict=True) if s.recorded < h.sequences * h.length]
    if loss == "batch-sum" and partial:
        raise ValueError("loss='batch-sum' sums over whole batches and needs the inputs of all tokens: calibrate with record=None")
    width, size = int(config["hidden_size"]), 4 if precision(config, dtype) == "float32" else 2
    rows = sum(s.recorded for s in seen)
    reads = layer_spec.nbytes + rows * width * size + len(seen) * (1400 + 7 * 8 * layer_spec.experts)
    writes = 1500 + (count if criterion == "enumerate" else 0) * (26 + 3 * keep)
    return Spec({"layer": layer, "keep": keep}, reads=reads, writes=writes, memory=2 * layer_spec.nbytes + (1 << 28))


@step("search.choose", version=1, spec=_choose_spec)
@torch.inference_mode()
def choose(
    context: Context, config_from: Artifact, layer_file: Artifact, *seen: Artifact,
    layer: int, keep: int, criterion: str, loss: str, batch_tokens: int, seed: int, dtype: str, targets: int,
) -> None:  # fmt: skip
    """The experts of one layer that stay, as `choice.json`, with the loss of the choice, of the runner-up and of the baselines.

    `seen`: what each shard of tokens showed in this layer. Where `targets` is not 0, the first `targets` of them saw the layer
    behind an already pruned prefix, and the others show, for the same tokens, what the original model's layer saw.
    """
    config = Tensors.config(config_from)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precise = getattr(torch, precision(config, dtype))
    moe = read_moe(Tensors(layer_file.file("layer.safetensors")), config, layer).to(device=device, dtype=precise)
    shards, originals = (seen[:targets], seen[targets:]) if targets else (seen, ())
    stats = add_stats([Tensors(s) for s in shards])
    groups = moe.router.groups
    baselines = {n: tuple(best_by_score(score(moe, stats, seed + layer), keep, groups)) for n, score in CRITERIA.items()}
    subsets = (
        list(all_subsets(moe.num_experts, keep, groups)) if criterion == "enumerate" else list(dict.fromkeys(baselines.values()))
    )
    mask_SE = mask_of(subsets, moe.num_experts, device)
    evaluate = squared_errors if len(subsets) * moe.router.top_k > moe.num_experts else squared_errors_direct
    errors_B, square, done = [], 0.0, 0
    for at, shard in enumerate(shards):
        x_TD = _sample(shard)
        goal_TD = _sample(originals[at]) if originals else None
        for rows in _batches(len(x_TD), batch_tokens):
            target_tD = None if goal_TD is None else moe(goal_TD[rows].to(device, precise))
            error_S, norm = evaluate(moe, x_TD[rows].to(device, precise), mask_SE, target_tD)
            errors_B.append(error_S.cpu())
            square += float(norm)
        done += len(x_TD)
        context.progress(at + 1, len(shards), "shards")
    errors_BS = torch.stack(errors_B)
    loss_S = errors_BS.sqrt().sum(0) if loss == "batch-sum" else errors_BS.sum(0).sqrt()
    losses = dict(zip(subsets, loss_S.tolist(), strict=True))
    picked = min(losses, key=lambda s: losses[s]) if criterion == "enumerate" else baselines[criterion]
    others = sorted((s for s in losses if s != picked), key=lambda s: losses[s])
    choice = {
        "layer": layer,
        "experts": moe.num_experts,
        "keep": list(picked),
        "criterion": criterion,
        "loss": {
            "kind": loss,
            "value": losses[picked],
            "of_output": losses[picked] / square**0.5 if square else 0.0,
            "tokens": done,
        },
        "runner_up": _entry(others[0], losses) if others and criterion == "enumerate" else None,
        "baselines": {name: _entry(subset, losses) for name, subset in baselines.items()},
        "losses": {",".join(map(str, s)): v for s, v in losses.items()},
    }
    (context.out / CHOICE).write_text(_readable(choice))


def read_choice(artifact: Artifact) -> dict[str, Any]:
    """What `choose` wrote."""
    return json.loads(artifact.read(CHOICE, 0, artifact.size(CHOICE)))


def add_stats(shards: Sequence[Tensors]) -> dict[str, Tensor]:
    """The sums of all shards of one layer, added; the largest values, compared."""
    total = {name: torch.stack([s[name] for s in shards]).sum(0) for name in STATS}
    total["max_E"] = torch.stack([s["max_E"] for s in shards]).amax(0)
    return total


def _sample(shard: Artifact) -> Tensor:
    """The MoE inputs [T, D] of the shard's first tokens, in order, without those that are there for a rare expert."""
    tensors = Tensors(shard)
    return tensors["x_RD"][: int(tensors["sample"])]


def _batches(rows: int, size: int) -> Iterator[slice]:
    for at in range(0, rows, size or rows):
        yield slice(at, at + (size or rows))


def _entry(subset: Subset, losses: dict[Subset, float]) -> dict[str, Any]:
    return {"keep": list(subset), "loss": losses[subset]}


def _readable(choice: dict[str, Any]) -> str:
    """Indented JSON with each list of experts in one line."""
    lines = []
    for name, value in choice.items():
        if isinstance(value, dict):
            inside = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f" {json.dumps(name)}: {{\n{inside}\n }}")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
