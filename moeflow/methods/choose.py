"""The choice of the experts of one layer that stay: a small JSON that a person can read and diff."""

import json
from typing import Any

from moeflow.arch import arch_of
from moeflow.methods.subsets import ENUMERATE, MAX_SUBSETS, count_subsets
from moeflow.model.layout import read_config
from moeflow.model.spec import LayerSpec, ObservedSpec, RestSpec, precision
from moeflow.step import Artifact, Context, Spec, step

CHOICE = "choice.json"
LOSSES = ("frobenius", "batch-sum")
CRITERIA = ("random", "frequency", "router_score", "reap", "aimer")
"""What `moeflow.methods.criteria` scores single experts by."""


def _choose_spec(
    rest: RestSpec, layer_spec: LayerSpec, *seen: ObservedSpec,
    layer: int, keep: int, criterion: str, loss: str, batch_tokens: int, seed: int, dtype: str, targets: int,
) -> Spec:  # fmt: skip
    config = rest.config
    arch = arch_of(config)
    arch.check_keep(config, keep)
    if criterion not in (ENUMERATE, *CRITERIA):
        raise ValueError(f"criterion={criterion!r} is not known; choose one of {', '.join((ENUMERATE, *CRITERIA))}")
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is not known; choose one of {', '.join(LOSSES)}")
    count = count_subsets(layer_spec.experts, keep, arch.group_limit(config)[0])
    if criterion == ENUMERATE and count > MAX_SUBSETS:
        raise ValueError(
            f"keeping {keep} of {layer_spec.experts} experts means {count:,} subsets, over {MAX_SUBSETS:,}: enumeration is for "
            "narrow layers; choose by score instead (search=reap)"
        )
    states = [s.hidden for s in seen]
    partial = [s for s, h in zip(seen, states, strict=True) if s.recorded < h.sequences * h.length]
    if loss == "batch-sum" and partial:
        raise ValueError("loss='batch-sum' sums over whole batches and needs the inputs of all tokens: calibrate with record=None")
    width, size = int(config["hidden_size"]), 4 if precision(config, dtype) == "float32" else 2
    rows = sum(s.rows for s in seen)
    reads = layer_spec.headers + layer_spec.block_bytes
    reads += rows * width * size + len(seen) * (1400 + 7 * 8 * layer_spec.experts)
    # the layer twice, the largest shard's inputs and targets twice, and the intermediate tensors of a chunk of tokens in fp64
    memory = 2 * layer_spec.nbytes + 4 * max(s.rows for s in seen) * width * size + (1 << 30)
    writes = 1500 + (count if criterion == ENUMERATE else 0) * (26 + 3 * keep)
    return Spec({"layer": layer, "keep": keep, "bytes": writes}, reads=reads, writes=writes, memory=memory)


@step("search.choose", version=2, spec=_choose_spec, gpus=1)
def choose(
    context: Context, config_from: Artifact, layer_file: Artifact, *seen: Artifact,
    layer: int, keep: int, criterion: str, loss: str, batch_tokens: int, seed: int, dtype: str, targets: int,
) -> None:  # fmt: skip
    """The experts of one layer that stay, as `choice.json`, with the loss of the choice, of the runner-up and of the baselines.

    `seen`: what each shard of tokens showed in this layer. Where `targets` is not 0, the first `targets` of them saw the layer
    behind an already pruned prefix, and the others show, for the same tokens, what the original model's layer saw.
    """
    from moeflow.methods.weigh import weigh

    shards, originals = (seen[:targets], seen[targets:]) if targets else (seen, ())
    choice = weigh(
        context, read_config(config_from), layer_file, shards, originals,
        layer=layer, keep=keep, criterion=criterion, loss=loss, batch_tokens=batch_tokens, seed=seed, dtype=dtype,
    )  # fmt: skip
    (context.out / CHOICE).write_text(readable(choice))


def read_choice(artifact: Artifact) -> dict[str, Any]:
    """What `choose` wrote."""
    return json.loads(artifact.read(CHOICE, 0, artifact.size(CHOICE)))


def readable(choice: dict[str, Any]) -> str:
    """Indented JSON with each list of experts in one line."""
    lines = []
    for name, value in choice.items():
        if isinstance(value, dict):
            inside = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f" {json.dumps(name)}: {{\n{inside}\n }}")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
