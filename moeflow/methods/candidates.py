"""The best sets of experts that one layer could keep, for each of several counts: what global budgets and blocks choose from."""

import json
from typing import Any

from moeflow.arch import arch_of
from moeflow.methods.subsets import ENUMERATE, MAX_SUBSETS, check, count_subsets
from moeflow.model.layout import read_config
from moeflow.model.spec import LayerSpec, ObservedSpec, RestSpec, precision
from moeflow.step import Artifact, Context, Spec, step

CANDIDATES, COUNTS = "candidates.json", "counts.json"

METHODS = {ENUMERATE: (), "genetic": ("population", "generations", "parents", "mutation"), "swap": ("starts",)}
"""Every search over the subsets of one layer, and the options that it takes."""


def _candidates_spec(
    rest: RestSpec, layer_spec: LayerSpec, *inputs: Any,
    layer: int, counts: list[int], decided: bool, method: str, best: int, options: dict[str, Any], protected: list[int],
    seed: int, dtype: str,
) -> Spec:  # fmt: skip
    arch = arch_of(rest.config)
    for keep in counts:
        arch.check_keep(rest.config, keep, layer_spec.experts)
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; choose one of {', '.join(METHODS)}")
    if strange := sorted(set(options) - set(METHODS[method])):
        raise ValueError(f"{method} has no option {strange[0]}; it takes {', '.join(METHODS[method]) or 'none'}")
    groups = arch.group_limit(rest.config)[0]
    for keep in counts:
        check(layer_spec.experts, keep, groups=groups, protected=protected, best=best, **options)
        count = count_subsets(layer_spec.experts, keep, groups, protected)
        if method == ENUMERATE and count > MAX_SUBSETS:
            raise ValueError(
                f"keeping {keep} of {layer_spec.experts} experts means {count:,} subsets, over {MAX_SUBSETS:,}: enumeration is for "
                "narrow layers; search instead (genetic or swap)"
            )
    seen: list[ObservedSpec] = [s for s in inputs if isinstance(s, ObservedSpec)]
    width, size = int(rest.config["hidden_size"]), 4 if precision(rest.config, dtype) == "float32" else 2
    rows = sum(s.rows for s in seen)
    reads = layer_spec.headers + layer_spec.block_bytes + rows * width * size + len(seen) * (1400 + 7 * 8 * layer_spec.experts)
    sets = (1 if decided else len(counts)) * (best + 6)
    writes = 300 + sets * (70 + 4 * layer_spec.experts)
    out = {"layer": layer, "counts": counts, "experts": layer_spec.experts, "bytes": writes}
    return Spec(out, reads=reads, writes=writes, memory=2 * layer_spec.nbytes + (3 << 30))


@step("search.candidates", version=1, spec=_candidates_spec, gpus=1)
def candidates(
    context: Context, config: Artifact, layer_file: Artifact, *inputs: Artifact,
    layer: int, counts: list[int], decided: bool, method: str, best: int, options: dict[str, Any], protected: list[int],
    seed: int, dtype: str,
) -> None:  # fmt: skip
    """The `best` sets of one layer's experts for each count, by `method`, with the losses of these and of the baselines.

    `inputs`: where `decided`, first the counts of all layers, one of `counts` for this one; then what each shard of tokens showed
    in this layer. `options` are the method's own; `protected` experts stay. Long searches save their state and go on from it.
    """
    from moeflow.methods.evaluator import search_counts

    first = inputs[0] if decided else None
    shards = inputs[1:] if decided else inputs
    wanted = [read_counts(first)["counts"][str(layer)]] if first else counts
    found = search_counts(
        context, read_config(config), layer_file, shards,
        layer=layer, counts=wanted, method=method, best=best, options=options, protected=protected, seed=seed, dtype=dtype,
    )  # fmt: skip
    (context.out / CANDIDATES).write_text(_readable(found))


def read_candidates(artifact: Artifact) -> dict[str, Any]:
    """What `candidates` wrote."""
    return json.loads(artifact.read(CANDIDATES, 0, artifact.size(CANDIDATES)))


def read_counts(artifact: Artifact) -> dict[str, Any]:
    """How many experts each layer keeps, as a step of `moeflow.methods.budget` wrote it."""
    return json.loads(artifact.read(COUNTS, 0, artifact.size(COUNTS)))


def _readable(found: dict[str, Any]) -> str:
    """Indented JSON, one line for each set."""
    text = json.dumps(found | {"counts": "@"}, indent=1)
    blocks = []
    for keep, entry in found["counts"].items():
        sets = ",\n".join(f"    {json.dumps(s)}" for s in entry["best"])
        base = ",\n".join(f"    {json.dumps(n)}: {json.dumps(s)}" for n, s in entry["baselines"].items())
        blocks.append(f'  {json.dumps(keep)}: {{\n   "best": [\n{sets}\n   ],\n   "baselines": {{\n{base}\n   }}\n  }}')
    return text.replace('"@"', "{\n" + ",\n".join(blocks) + "\n }") + "\n"
