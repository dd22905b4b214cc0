"""Expert Slimming: the weights inside the experts become sparse or are quantized.

He et al., Demystifying the Compression of Mixture-of-Experts Through a Unified Framework (arXiv 2406.02500), section 3.
Routers, gates of shared experts, norms and everything outside the MoE blocks keep computing what they do; AWQ moves a scale
between a norm and all that it feeds, the router among them.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import gcd, lcm
from typing import Any

from moeflow.arch import Family
from moeflow.methods.records import DECOMPOSED, SPARSE, Facts
from moeflow.methods.slim.grid import Grid
from moeflow.methods.slim.pattern import Pattern
from moeflow.model.layout import LAYER, read_config
from moeflow.model.packed import PACKED, SCALE, SHAPE
from moeflow.model.spec import LayerSpec, ObservedSpec, RestSpec, precision
from moeflow.step import Artifact, Context, Part, Spec, Step, step

QUANTIZING = ("round_to_nearest", "gptq", "awq")
METHODS = (*SPARSE, *QUANTIZING)
FOR_FACTORS = ("round_to_nearest", "gptq")
"""What also works on the factors of low-rank experts."""

WITHOUT_TOKENS = {**dict.fromkeys(SPARSE, "magnitude"), **dict.fromkeys(QUANTIZING, "round_to_nearest")}
"""By what an expert is treated that too few tokens reach, unless it is kept as it is ("keep")."""

INPUTS = ("parallel", "sequential")


def divided(rest: Step | Part, given: Step | Part, seen: Sequence[Step | Part], at: int, how: dict[str, Any], tasks: int) -> Step:
    """One layer, by one task or several."""
    if tasks == 1:
        return layer(rest, given, *seen, layer=at, part=0, parts=1, **how)
    most = given.spec.output.experts
    if not 1 <= tasks <= most or how["method"] == "awq":
        raise ValueError(
            f"tasks={tasks}: the {most} experts of layer {at} are divided between 1 to {most} tasks, those of AWQ, which share a "
            "scale, are treated by one"
        )
    return joined(*(layer(rest, given, *seen, layer=at, part=part, parts=tasks, **how) for part in range(tasks)))


def _layer_spec(
    rest: RestSpec, given: LayerSpec, *seen: ObservedSpec,
    layer: int, method: str, pattern: str, bits: int, group: int, symmetric: bool, order: bool, damp: float, block: int,
    least: int, policy: str, shared: bool, chained: bool, packed: bool, part: int, parts: int, dtype: str,
) -> Spec:  # fmt: skip
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; choose one of {', '.join(METHODS)}")
    if policy not in (WITHOUT_TOKENS[method], "keep") or least < 1:
        raise ValueError(
            f"policy={policy!r} for experts with fewer than least={least} tokens: with {method} choose {WITHOUT_TOKENS[method]} or "
            "keep, and at least 1 token"
        )
    if block < 1 or not 0 <= damp < 1:
        raise ValueError(f"block={block} columns must be at least 1, and damp={damp} a part of the mean diagonal, such as 0.01")
    given.check_plain("slim")
    decided = given.slimmed == DECOMPOSED
    if given.slimmed and not decided:
        raise ValueError(f"layer {layer} is slimmed already ({given.slimmed}); slim the model that it was made of, by one method")
    if (decided or given.format.low_rank) and method not in FOR_FACTORS:
        raise ValueError(
            f"layer {layer} has low-rank experts, whose factors {method} does not slim; take {' or '.join(FOR_FACTORS)}, or slim "
            "the model that was decomposed"
        )
    if given.format.compressed:
        given.check_routing("slim")
    family = Family.of(rest.config)
    names = _treated(given, shared)
    for name in names:
        columns = given.tensors[name][1][1]
        if method in SPARSE:
            Pattern.parse(pattern).check(columns)
        else:
            Grid(bits, symmetric, group).check(columns)
            if packed and columns * bits % 32:
                raise ValueError(f"bits={bits} of {columns} columns of {name} fill no whole words of 32 bits; give packed=False")
    whole = lcm(group or 1, 32 // gcd(32, bits) if packed else 1) if bits else 1
    if decided and given.multiple % whole:
        raise ValueError(
            f"the ranks of layer {layer} are decided by a run, as multiples of {given.multiple}: at {bits} bits in groups of "
            f"{group} they have to be multiples of {whole}; decompose with multiple={whole}"
        )
    if packed and not symmetric:
        raise ValueError(
            "zero points of packed experts are read by neither transformers nor vLLM; give symmetric=True, or packed=False"
        )
    if packed and policy == "keep":
        raise ValueError(
            "policy='keep' leaves whole experts beside packed ones, which transformers does not load; give packed=False"
        )
    if packed and shared and method == "awq":
        raise ValueError("AWQ packs routed experts only; give shared=False, or packed=False")
    table = dict(given.tensors)
    for name in names if packed else ():
        dtype_of, (rows, columns) = table.pop(name)
        table[name + PACKED] = ("I32", (rows, columns * bits // 32))
        table[name + SCALE] = (dtype_of, (rows, columns // group if group else 1))
        table[name + SHAPE] = ("I64", (2,))
    what = f"{method} {pattern}" if method in SPARSE else f"{method} {bits} bits"
    out = replace(given, tensors=table, slimmed=what)
    size = 4 if precision(rest.config, dtype) == "float32" else 2
    columns = int(rest.config["hidden_size"])
    tokens = sum(s.rows for s in seen if isinstance(s, ObservedSpec)) * columns * size
    gate = family.expert(layer, 0)[0]
    rows = next(given.tensors[n][1][0] for n in (gate, family.factors(gate)[0]) if n in given.tensors)
    # what is written, the tokens, and the moments, factor and working copy of one expert; AWQ has all experts, and their codes
    together = 3 * given.experts * rows * columns * (size + 3) if method == "awq" else 0
    memory = out.nbytes + together + 3 * tokens + 60 * max(rows, columns) ** 2 + 24 * rows * columns + (1 << 29)
    share = out.nbytes // parts
    memory -= out.nbytes - share
    return Spec(out, reads=given.nbytes // parts + tokens, writes=share + 300 + 200 * given.experts // parts, memory=memory)


def _treated(given: LayerSpec, shared: bool) -> list[str]:
    family = Family.of(given.config)
    wholes = [n for e in range(given.experts) for n in family.expert(given.layer, e)]
    names = [n for whole in wholes for n in (whole, *family.factors(whole)) if n in given.tensors]
    return names + list(family.shared(given.layer) or () if shared else ())


@step("slim.layer", version=2, spec=_layer_spec, gpus=1)
def layer(
    context: Context, config: Artifact, given: Artifact, *seen: Artifact,
    layer: int, method: str, pattern: str, bits: int, group: int, symmetric: bool, order: bool, damp: float, block: int,
    least: int, policy: str, shared: bool, chained: bool, packed: bool, part: int, parts: int, dtype: str,
) -> None:  # fmt: skip
    """One layer's file with slimmed experts, and `facts.json`, which says for every expert by what it was treated and what it lost.

    Of several `parts` each has its share of the experts, and the first everything else. A layer that a run has left without
    experts stays what it is.
    """

    from moeflow.methods.slim import experts

    how = experts.How(
        method=method, pattern=pattern, grid=Grid(bits, symmetric, group) if bits else None, order=order, damp=damp, block=block,
        least=least, policy=policy, shared=shared, chained=chained, packed=packed,
    )  # fmt: skip
    report = experts.rewrite(
        context, read_config(config), given, seen, how, layer=layer, part=part, parts=parts, dtype=dtype
    )  # fmt: skip
    facts = Facts.of(given)
    if report is not None:
        facts = facts.and_then("slim.layer", method=method, pattern=pattern, bits=bits, group=group, experts=report)
    if report is not None or part:  # otherwise the layer is what it was
        facts.write(context.out)


def _joined_spec(*parts: LayerSpec) -> Spec:
    nbytes = parts[0].nbytes
    return Spec(parts[0], reads=nbytes, writes=nbytes + 300 + 200 * parts[0].experts, memory=nbytes + (1 << 29))


@step("slim.joined", version=1, spec=_joined_spec)
def joined(context: Context, *parts: Artifact) -> None:
    """One layer's file and report from those of its parts."""

    from moeflow.methods.slim import experts

    first, several = parts[0], all(LAYER in p.names() for p in parts)
    if several:
        experts.join(parts, context.out / LAYER)
    for name in first.names():
        if not several or name not in (LAYER, Facts.FILE):
            context.link(first, name)
    if several:
        *earlier, last = Facts.of(first).done
        report = [entry for p in parts for entry in Facts.of(p).done[-1]["experts"]]
        report.sort(key=lambda entry: (entry["expert"] == "shared", entry["expert"]))
        Facts((*earlier, {**last, "experts": report})).write(context.out)
