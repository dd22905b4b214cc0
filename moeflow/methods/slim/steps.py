"""Expert Slimming: the weights inside the experts become sparse or are quantized.

He et al., Demystifying the Compression of Mixture-of-Experts Through a Unified Framework (arXiv 2406.02500), section 3. Routers,
gates of shared experts, norms and everything outside the MoE blocks compute the same as before; AWQ moves a scale between a norm
and all that it feeds, including the router.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import gcd, lcm
from typing import Any

from moeflow.arch import Family
from moeflow.methods.records import Bits, Facts
from moeflow.methods.rewrite import joined, link_all
from moeflow.methods.slim.methods import AT_ONCE, METHODS, Share, Slimming
from moeflow.methods.slim.pattern import Pattern
from moeflow.model import operations
from moeflow.model.layout import LAYER, file_for, read_config
from moeflow.model.memory import on_device
from moeflow.model.packed import PACKED, SCALE, SHAPE, ZERO, unpacked_shapes, zeros_shape
from moeflow.model.spec import LayerSpec, ObservedSpec, RestSpec, element_bytes, shapes_of
from moeflow.step import Arithmetic, Artifact, Context, Part, Spec, Step, step

PER_TASK = 300_000_000
"""Weights of experts that one task slims, where layers are slimmed one after the other; a GPU takes some seconds for them."""


def slimmed(
    rest: Step | Part, before: Step, observed: tuple[Step | Part, ...], beside: tuple[Part, ...] = (),
    *, at: int, how: Slimming, dtype: str, in_turn: bool = False,
) -> Step:  # fmt: skip
    """The graph that slims layer `at` in one task or several; with `in_turn` the next layer waits for it.

    `beside`: what a calibration of the original recorded so. Raises ValueError for an impossible number of tasks.
    """
    return _divided(partial(layer, rest, before, observed, beside), before, at=at, how=how, dtype=dtype, in_turn=in_turn)


def slimmed_as_decided(
    bits: Step, rest: Step | Part, before: Step, observed: tuple[Step | Part, ...], beside: tuple[Part, ...] = (),
    *, at: int, how: Slimming, dtype: str,
) -> Step:  # fmt: skip
    """As `slimmed` in turn, at the bits and in the groups that a step decides for the layer, if it is to be quantized at all."""
    return _divided(partial(decided, bits, rest, before, observed, beside), before, at=at, how=how, dtype=dtype, in_turn=True)


def _divided(slim: Callable[..., Step], before: Step, *, at: int, how: Slimming, dtype: str, in_turn: bool) -> Step:
    most, tasks = before.spec.output.experts, how.tasks
    if how.tasks > 1 and how.row.needs == "tokens":
        raise ValueError(f"tasks={how.tasks}: {how.method} treats all experts of layer {at} at once; give tasks=1")
    if how.tasks > max(1, most):
        raise ValueError(f"tasks={how.tasks}: the {most} experts of layer {at} are divided between 1 to {most} tasks")
    if not tasks:
        several = in_turn and how.row.needs != "tokens"
        tasks = max(1, min(most, -(-before.spec.output.expert_numel // PER_TASK))) if several else 1
    same: dict[str, Any] = {"layer": at, "how": how.of_a_layer, "dtype": dtype}
    parts = tuple(slim(share=Share(task, tasks), **same) for task in range(tasks))
    return parts[0] if len(parts) == 1 else joined(parts)


def _layer_spec(
    rest: RestSpec, before: LayerSpec, observed: tuple[ObservedSpec, ...], beside: tuple[ObservedSpec, ...] = (),
    *, layer: int, share: Share, how: Slimming, dtype: str,
) -> Spec:  # fmt: skip
    before.check_plain("slim")
    if before.slimmed_by:
        raise ValueError(
            f"layer {layer} is slimmed already ({before.slimmed_by}); slim the model that it was made of, by one method"
        )
    if (before.ranks_decided or before.format.low_rank) and not how.row.factors:
        others = " or ".join(name for name, row in METHODS.items() if row.factors)
        raise ValueError(
            f"layer {layer} has low-rank experts, whose factors {how.method} does not slim; take {others}, or slim the model that "
            "was decomposed"
        )
    if before.format.compressed:
        before.check_routing("slim")
    family, table = Family.of(rest.config), dict(before.tensors)
    check_scalable(family, how)
    wholes = [n for e in range(before.experts) for n in family.expert(layer, e)]
    names = [n for whole in wholes for n in (whole, *family.factors(whole)) if n in before.tensors]
    names += family.shared(layer) or () if how.shared else ()
    for name in names:
        dtype_of, (rows, columns) = before.tensors[name]
        _check_columns(name, columns, how)
        if how.packs:
            del table[name]
            table[name + PACKED] = ("I32", (rows, columns * how.bits // 32))
            table[name + SCALE] = (dtype_of, (rows, how.grid.groups(columns)))
            table[name + SHAPE] = ("I64", (2,))
            if not how.symmetric:
                table[name + ZERO] = ("I32", zeros_shape(rows, how.grid.groups(columns), how.bits))
    multiple = lcm(how.group or 1, 32 // gcd(32, how.bits) if how.packs else 1) if how.row.quantizes else 1
    if before.ranks_decided and before.multiple % multiple:
        raise ValueError(
            f"the ranks of layer {layer} are decided by a run, as multiples of {before.multiple}: at {how.bits} bits in groups of "
            f"{how.group} they have to be multiples of {multiple}; decompose with multiple={multiple}"
        )
    stays = before.elsewhere and not before.least  # without experts it is linked
    out = replace(before, tensors=table, slimmed_by=how.words, sparse=not how.row.quantizes, elsewhere=stays)
    size, columns = element_bytes(rest.config, dtype), int(rest.config["hidden_size"])
    tokens = sum(shard.rows for shard in observed) * columns * size
    rows = before.tensors[names[0]][1][0]
    # the output, the tokens, and the moments, factor and working copy of one expert, or all experts and their codes
    together = 3 * before.experts * rows * columns * (size + 3) if how.row.needs == "tokens" else 0
    bytes_of_share = out.nbytes // share.tasks
    one = 60 * max(rows, columns) ** 2 + 24 * rows * columns
    if how.target != "matrix":  # the moments of two halves of the tokens, and what is missing of both
        one += 40 * rows**2 + 32 * rows * columns
    memory = bytes_of_share + together + 3 * tokens + one + (1 << 29)
    device = on_device(before.loaded(dtype) + together + 3 * tokens + max(one, AT_ONCE))
    writes = bytes_of_share + 300 + 200 * before.experts // share.tasks
    products, factors = 2 * before.expert_numel, 0
    if how.row.needs != "weights":  # the inputs' moment of each matrix is factored, and its columns are treated one after another
        products += operations.moments(before, sum(shard.rows for shard in observed), (columns, rows))
        products += before.expert_numel // 3 * (2 * columns + rows)
        factors = before.experts * 4 * (2 * columns**3 + rows**3) // 3
    if how.target != "matrix":  # down is moved: its moment again, experts that are run twice more, and three solutions
        seen = sum(shard.rows for shard in observed)
        products += operations.moments(before, seen, (rows,)) + operations.moments(before, seen, ())
        products += before.experts * 3 * 2 * columns * rows**2
        factors += before.experts * rows**3
    if beside:  # the original's rows, with their difference in fp32
        memory, tokens = memory + tokens * (2 + 12 // size), 3 * tokens
    done: Mapping[Arithmetic, int] = {"float32": products // share.tasks, "factors": factors // share.tasks}
    return Spec(out, reads=before.nbytes // share.tasks + tokens, writes=writes, operations=done, memory=memory, device=device)


def check_scalable(family: Family, how: Slimming) -> None:
    """Raise ValueError if the method scales experts' inputs and this family's experts do not scale with them."""
    arch = family.arch
    odd = {
        "no gate": not family.gated,
        "biases": bool(arch.expert_biases),
        f"the activation {arch.activation}": arch.activation == "clamped_swiglu",
        "weighted inputs": arch.weighs_input,
        "no norm of their own": arch.norm_feeds_more,
    }
    if how.row.needs == "tokens" and (reasons := [what for what, is_so in odd.items() if is_so]):
        raise ValueError(
            f"the experts of a {arch.model_type} have {' and '.join(reasons)}, which {how.method} cannot scale; take gptq instead"
        )


def _check_columns(name: str, columns: int, how: Slimming) -> None:
    if not how.row.quantizes:
        Pattern.parse(how.pattern).check(columns)
        return
    how.grid.check(columns)
    if how.packed and columns * how.bits % 32:
        raise ValueError(f"bits={how.bits} of {columns} columns of {name} fill no whole words of 32 bits; give packed=False")


@step("slim.layer", version=4, spec=_layer_spec, gpus=1)
def layer(
    context: Context, config: Artifact, before: Artifact, observed: tuple[Artifact, ...], beside: tuple[Artifact, ...] = (),
    *, layer: int, share: Share, how: Slimming, dtype: str,
) -> None:  # fmt: skip
    """One layer's file with slimmed experts, and `facts.json`, which says for every expert how it was treated and what it lost.

    `observed`: what each shard of tokens recorded in this layer. Each task treats its `share` of the experts; the
    first also writes everything else. If trimming removed the layer's experts, the layer is unchanged. `beside`: what the block is
    added to in the original, for the same tokens in order, if `how.target` asks for it.
    """
    _rewritten(context, config, before, observed, beside, layer=layer, share=share, how=how, dtype=dtype)


def _rewritten(
    context: Context, config: Artifact, before: Artifact, observed: tuple[Artifact, ...], beside: tuple[Artifact, ...],
    *, layer: int, share: Share, how: Slimming, dtype: str,
) -> None:  # fmt: skip
    from moeflow.methods.slim import experts

    report = experts.rewrite(context, read_config(config), before, observed, beside, how, layer=layer, share=share, dtype=dtype)
    facts = Facts.of(before)
    if report is not None:
        facts = facts.and_then("slim.layer", **how.facts, experts=report)
    if report is not None or not share.first:  # otherwise the layer is unchanged
        facts.write(context.out)


def _unpacked_spec(before: LayerSpec) -> Spec:
    whole = unpacked_shapes(shapes_of(before.tensors), before.config)
    table = {n: (before.tensors.get(n) or before.tensors[n + SCALE])[0] for n in whole}
    out = replace(before, tensors={n: (table[n], shape) for n, shape in whole.items()}, slimmed_by="", bits_decided=False)
    return Spec(out, reads=before.nbytes, writes=out.nbytes, memory=2 * out.nbytes)


@step("slim.unpacked", version=1, spec=_unpacked_spec)
def unpacked(context: Context, before: Artifact) -> None:
    """One layer's file with its packed matrices unpacked, and what a fine-tuning left beside them added."""
    from moeflow.model.checkpoint import Tensors, save

    tensors = Tensors(before)
    save({n: tensors[n] for n in tensors if file_for(n) == LAYER}, context.out / LAYER)
    link_all(context, before, but=(LAYER, Facts.FILE))
    Facts.of(before).and_then("slim.unpacked").write(context.out)


def _decided_spec(
    bits: Any, rest: RestSpec, before: LayerSpec, observed: tuple[ObservedSpec, ...], beside: tuple[ObservedSpec, ...] = (),
    *, layer: int, share: Share, how: Slimming, dtype: str,
) -> Spec:  # fmt: skip
    """As at the bits of `how`, the most that may be decided."""
    spec = _layer_spec(rest, before, observed, beside, layer=layer, share=share, how=how, dtype=dtype)
    return replace(spec, output=replace(spec.output, elsewhere=before.elsewhere), reads=spec.reads + bits["bytes"])


@step("slim.decided", version=2, spec=_decided_spec, gpus=1)
def decided(
    context: Context, bits: Artifact, config: Artifact, before: Artifact, observed: tuple[Artifact, ...],
    beside: tuple[Artifact, ...] = (),
    *, layer: int, share: Share, how: Slimming, dtype: str,
) -> None:  # fmt: skip
    """As `slim.layer`, at the bits and in the groups that a decision says; a layer that it does not quantize is linked as it is."""
    decision = Bits.read(bits)
    if (chosen := decision.layers.get(layer)) is not None:
        how = replace(how, bits=chosen, group=decision.groups.get(layer, how.group))
        _rewritten(context, config, before, observed, beside, layer=layer, share=share, how=how, dtype=dtype)
    elif share.first:
        link_all(context, before)
    else:
        Facts.of(before).write(context.out)
