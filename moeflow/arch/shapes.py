"""The tensors that config.json asks for beside the routed experts: their names on disk and their shapes. No torch.

Shapes are as on disk, [outputs, inputs] of a matrix. Where config.json leaves a size to the defaults of transformers, it is None.
"""

from moeflow.arch.family import Family
from moeflow.arch.spec import EMBEDDING, FINAL_NORM, HEAD

Shape = tuple[int | None, ...]


def attention_shapes(family: Family, layer: int) -> dict[str, Shape]:
    """The tensors of one layer's attention."""
    matrices = _latent(family) if family.arch.latent else _heads(family)
    stem = f"{family.prefix(layer)}{family.arch.attention}."
    key, default = family.arch.biased
    biased = family.arch.biases if family.config.get(key, default) else ()
    shapes = {f"{stem}{name}.weight": shape for name, shape in matrices.items()}
    return shapes | {f"{stem}{name}.bias": matrices[name][:1] for name in biased if name in matrices}


def norm_shapes(family: Family, stem: str) -> dict[str, Shape]:
    """The tensors of the norm whose names begin with `stem`, which ends with a point."""
    return {f"{stem}{part}": (family.size("hidden_size"),) for part in ("weight", "bias")[: 1 + family.arch.norm_bias]}


def mlp_shapes(family: Family, names: tuple[str, ...], inner: int | None) -> dict[str, Shape]:
    """The gate, up and down matrices with these names, of an expert or a dense layer with `inner` units."""
    width = family.size("hidden_size")
    return dict(zip(names, ((inner, width), (inner, width), (width, inner)), strict=True))


def shared_shapes(family: Family, layer: int) -> dict[str, Shape]:
    """The tensors of a layer's shared expert and of its gate; none if the family has none."""
    if not (names := family.shared(layer)):
        return {}
    inner = family.size("shared_expert_intermediate_size")
    if inner is None:
        inner = _product(family.size("n_shared_experts"), family.size("moe_intermediate_size"))
    gate = family.shared_gate(layer)
    return mlp_shapes(family, names, inner) | ({gate: (1, family.size("hidden_size"))} if gate else {})


def rest_shapes(family: Family) -> dict[str, Shape]:
    """The tensors outside the decoder layers, with those of the head, which may be absent if it is tied to the embedding."""
    shapes = {EMBEDDING: (vocabulary := family.size("vocab_size"), family.size("hidden_size"))}
    bias = {f"{HEAD.removesuffix('weight')}bias": (vocabulary,)} if family.config.get("lm_head_bias") else {}
    return shapes | norm_shapes(family, FINAL_NORM.removesuffix("weight")) | {HEAD: shapes[EMBEDDING]} | bias


def _heads(family: Family) -> dict[str, Shape]:
    """The matrices and norms of an attention whose groups of query heads share keys and values."""
    width, heads, groups = (family.size(n) for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head = family.size("head_dim")
    if head is None and width and heads:
        head = width // heads
    queries, keys = _product(heads, head), _product(groups, head)
    shapes = {"q_proj": (queries, width), "k_proj": (keys, width), "v_proj": (keys, width), "o_proj": (width, queries)}
    norms = {"": (), "head": (head, head), "all": (queries, keys)}[family.arch.qk_norm]
    return shapes | {name: (size,) for name, size in zip(("q_norm", "k_norm"), norms, strict=False)}


def _latent(family: Family) -> dict[str, Shape]:
    """The matrices and norms of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, 2.1)."""
    width, heads, rank, keys = (family.size(n) for n in ("hidden_size", "num_attention_heads", "kv_lora_rank", "q_lora_rank"))
    plain, rotated, values = (family.size(n) for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    queries = _product(heads, _sum(plain, rotated))
    shapes: dict[str, Shape] = {
        "kv_a_proj_with_mqa": (_sum(rank, rotated), width),
        "kv_a_layernorm": (rank,),
        "kv_b_proj": (_product(heads, _sum(plain, values)), rank),
        "o_proj": (width, _product(heads, values)),
    }
    if "q_lora_rank" in family.config and keys is None:
        return shapes | {"q_proj": (queries, width)}
    return shapes | {"q_a_proj": (keys, width), "q_a_layernorm": (keys,), "q_b_proj": (queries, keys)}


def _product(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a * b


def _sum(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b
