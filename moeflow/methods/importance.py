"""How much each expert of a layer matters: what the layer's output loses without it (MoE-I², arXiv 2411.01016, section 3.1).

The paper does not say which loss it takes: `recon`, here, is the change of the layer's own output, as a part of that output, so
that layers compare; `lm_loss` is how much the model's loss grows with the expert gone, measured by `moeflow.methods.sweep`.
"""

import json
from typing import Any

from moeflow.model.layout import read_config
from moeflow.model.spec import LayerSpec, ObservedSpec, RestSpec, precision
from moeflow.step import Artifact, Context, Spec, step

IMPORTANCE = "importance.json"


def _recon_spec(rest: RestSpec, layer_spec: LayerSpec, *seen: ObservedSpec, layer: int, dtype: str) -> Spec:
    width, size = int(rest.config["hidden_size"]), 4 if precision(rest.config, dtype) == "float32" else 2
    rows = sum(s.rows for s in seen)
    reads = layer_spec.headers + layer_spec.block_bytes + rows * width * size
    writes = 80 + 32 * layer_spec.experts
    out = {"layer": layer, "experts": layer_spec.experts, "bytes": writes}
    return Spec(out, reads=reads, writes=writes, memory=2 * layer_spec.nbytes + (3 << 30))


@step("search.importance", version=1, spec=_recon_spec, gpus=1)
def recon(context: Context, config: Artifact, layer_file: Artifact, *seen: Artifact, layer: int, dtype: str) -> None:
    """The relative change of one layer's output when one expert is left out, for each expert, as `importance.json`.

    Exact, from the Gram identity. In a layer whose router needs all its experts every importance is zero.
    """
    from moeflow.methods.evaluator import without_each

    importance, tokens = without_each(context, read_config(config), layer_file, seen, layer=layer, dtype=dtype)
    write_importance(context, layer, importance, tokens)


def write_importance(context: Context, layer: int, importance: list[float], tokens: list[int]) -> None:
    """Leave one layer's importances, expert by expert, and how many recorded tokens each of them got."""
    value = {"layer": layer, "importance": importance, "tokens": tokens}
    (context.out / IMPORTANCE).write_text(
        "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}\n"
    )


def read_importance(artifact: Artifact) -> dict[str, Any]:
    """What one layer's importance step wrote."""
    return json.loads(artifact.read(IMPORTANCE, 0, artifact.size(IMPORTANCE)))
