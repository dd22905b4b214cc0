"""Which of a checkpoint's tensors a fine-tuning trains, by their names on disk. No torch."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from moeflow.arch import Config, Family

Mode = Literal["lora", "full", "experts", "router", "compressed_experts"]
"""What is trained: low-rank additions to some matrices, everything, the routed experts, the routers, or Compressed Experts.

With "lora" and "experts", the vectors of Compressed Experts are trained too, if the model has any.
"""

Target = Literal["attention", "router", "experts", "shared", "dense"]
"""The matrices that LoRA can be added to: those of the attention, routers, routed and shared experts, and dense layers."""

TARGETS: tuple[Target, ...] = get_args(Target)

BY_MODE = {"experts": "experts", "router": "router", "compressed_experts": "compressed"}
"""The kind of tensor that a mode trains, for the modes that train only one kind."""

Shapes = Mapping[str, Sequence[int]]


def is_trained(family: Family, mode: str, targets: Sequence[str], name: str, shape: Sequence[int]) -> bool:
    """Does this mode train the tensor with this name on disk, or, with LoRA, add to it?"""
    kind = family.kind(name)
    if mode == "full":
        return kind != "fixed"
    if mode == "lora":
        matrix = len(shape) > 1 and not name.endswith("bias")  # those of all experts are a stack in memory
        if kind == "attention":
            matrix = len(shape) == 2 and name.endswith(".weight")  # a Mamba has other tables, and convolutions
        return kind in (*targets, "compressed") and matrix
    return kind == BY_MODE[mode] or (mode == "experts" and kind == "compressed")


def trained_in(
    config: Config, mode: str, targets: Sequence[str], layers: Mapping[int, Shapes], rest: Shapes
) -> dict[int | None, Shapes]:
    """The shapes of the trained tensors of each decoder layer, by number, and of the rest (None); no entry for layers without any.

    Raises ValueError if the model has nothing that this mode or one of the targets trains; the message names what it has.
    """
    family = Family.of(config)
    whole: dict[int | None, Shapes] = {i: layers[i] for i in layers} | {None: rest}
    trained = {i: {n: s for n, s in shapes.items() if is_trained(family, mode, targets, n, s)} for i, shapes in whole.items()}
    kinds = {family.kind(n) for shapes in trained.values() for n in shapes}
    for target in targets if mode == "lora" else ():
        if target not in kinds:
            there = sorted({family.kind(n) for s in whole.values() for n in s} & set(TARGETS))
            raise ValueError(f"target {target!r} matches no matrix of this {family.arch.model_type}; it has {', '.join(there)}")
    if not kinds:
        way = "attach them first" if mode == "compressed_experts" else "choose another mode"
        lacking = f"this {family.arch.model_type}: it has no {BY_MODE.get(mode, mode)}"
        raise ValueError(f"mode={mode!r} trains nothing of {lacking}; {way}")
    return {i: shapes for i, shapes in trained.items() if shapes}
