"""Multi-token prediction: the layers that predict the tokens after the next one (DeepSeek-V3, arXiv 2412.19437, section 2.2).

They are numbered on behind the decoder layers. Each has a decoder layer inside it, with experts of its own, and around that what
makes its input of the hidden states before it and of the embeddings of the tokens that follow. No torch.
"""

from collections.abc import Iterable

from moeflow.arch.family import Family
from moeflow.arch.spec import ARCH, Config, essential

COUNT_KEY = "num_mtp_layers"
COUNT_KEYS = ("num_nextn_predict_layers", COUNT_KEY)
"""The keys of config.json for how many there are: the hub's, and transformers' own."""
OTHER_COUNT_KEYS = ("mtp_num_hidden_layers", "num_mtp_modules")
"""The keys for the same that transformers does not know (qwen3_5_moe, minimax_m2)."""

APART = ("mtp.", "mtp_", "model.mtp.", "model.mtp_")
"""How the tensors of prediction layers begin in families that do not number them on behind the decoder layers (qwen3_next)."""

ENORM, HNORM, PROJECTION, NORM = "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"
"""What is around the decoder layer inside a prediction layer: the norms [D] of embeddings and of hidden states, the matrix
[D, 2 D] that makes one vector of both, and the norm [D] behind the decoder layer."""

ONE_HEAD = (
    ("mtp.fc.", "eh_proj."), ("mtp.pre_fc_norm_embedding.", "enorm."), ("mtp.pre_fc_norm_hidden.", "hnorm."),
    ("mtp.norm.", "shared_head.norm."), ("mtp.layers.0.", ""),
)  # fmt: skip
"""The names of a single prediction layer that is kept apart (qwen3_next, qwen3_5_moe, mellum), and inside a numbered one."""

KINDS = ("layer_types", "mlp_layer_types")
"""Lists of config.json with the kind of each decoder layer; behind "mtp_" that of each prediction layer."""

AROUND = ("enorm.", "hnorm.", "eh_proj.", "shared_head.", "embed_tokens.")
"""How the names of these begin inside the layer, and of the model's embedding and head where they are stored once more."""


def prediction_layers(config: Config) -> int:
    """How many prediction layers config.json says there are."""
    return next((int(config[key]) for key in (*COUNT_KEYS, *OTHER_COUNT_KEYS) if config.get(key) is not None), 0)


def without_prediction_layers(config: Config) -> Config:
    """The configuration of the same model without prediction layers."""
    return config | {key: 0 for key in (*COUNT_KEYS, *OTHER_COUNT_KEYS) if key in config}


def prediction_config(config: Config) -> Config:
    """The configuration of a model whose decoder layers are those inside the prediction layers, numbered from 0.

    All of them have experts. Raises ValueError if config.json has a list by layer that does not say what they are.
    """
    plain, count, layers = essential(config), prediction_layers(config), Family.of(config).num_layers
    alone = plain | {"num_hidden_layers": count}
    for name, value in plain.items():
        if "layer" not in name or not isinstance(value, list) or len(value) != layers or name == "mlp_only_layers":
            continue
        own = plain.get(f"mtp_{name}", ["sparse"] * count if name == "mlp_layer_types" else None)
        if own is None and any(v != value[0] for v in value):
            raise ValueError(
                f"config.json has {name} that differs by layer and no mtp_{name}, so that nobody knows what the "
                "multi-token-prediction layers are; say it there, or take mtp='drop'"
            )
        alone[name] = own or value[:1] * count
    alone |= {key: plain[f"mtp_{key}"] for key in KINDS if plain.get(f"mtp_{key}")}
    for key, dense in (("first_k_dense_replace", 0), ("mlp_only_layers", []), ("decoder_sparse_step", 1)):
        if key in alone:
            alone[key] = dense
    if plain.get(ARCH, {}).get("moe") is not None:
        alone[ARCH] = plain[ARCH] | {"moe": list(range(count))}
    return alone


def numbered_behind(names: Iterable[str], layer: str) -> tuple[tuple[str, str], ...]:
    """Beginnings of the names of a single prediction layer that is kept apart, each with that of a numbered one.

    `layer`: how the names of the layer behind the decoder layers begin. Empty if there is no such prediction layer.
    """
    apart, pairs = [], tuple((name, layer + inside) for name, inside in ONE_HEAD)
    for name in names:
        if name.startswith(layer) or (name.startswith(APART) and not name.startswith(tuple(file for file, _ in pairs))):
            return ()
        apart += [name] if name.startswith(APART) else []
    return pairs if all(any(n.startswith(file) for n in apart) for file, _ in pairs) else ()


def decoder_names(family: Family, names: Iterable[str], layer: int, to: int) -> dict[str, str]:
    """The names of the decoder layer's tensors inside prediction layer `layer`, each with its name in layer `to`."""
    prefix = family.prefix(layer)
    inside = {n: n.removeprefix(prefix) for n in names if n.startswith(prefix)}
    return {n: family.prefix(to) + short for n, short in inside.items() if not short.startswith(AROUND)}
