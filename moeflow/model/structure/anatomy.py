"""The parts of a model of transformers with routed experts, found by running it: its decoder layers, and what is in one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

TOKENS = (2, 12)  # sequences and positions that a tiny model is run with


class Unknown(Exception):
    """What was not understood about a model, in one line."""


class Unfit(Unknown):
    """A model of this configuration is not built, or does not run: other sizes may."""


@dataclass(frozen=True)
class Anatomy:
    """Paths of modules. Those inside a decoder layer begin at the layer."""

    stack: str  # the list of decoder layers
    embedding: str
    final_norm: str
    head: str
    moe: tuple[int, ...]  # the layers with experts
    block: str  # the MoE block
    norm: str  # the norm before it
    norm_feeds_more: bool  # whether what that norm gives out also goes elsewhere
    attention: str
    router: str  # the module of the router inside the block; "" if its parameters are the block's own
    weight: str  # the router's matrix [E, D], inside the layer
    vectors: tuple[str, ...]  # the router's other tensors, [E] or [1, E], inside the layer
    shared: str  # the module of the shared expert inside the layer; "" if there is none
    shared_gate: str  # the matrix [1, D] inside the layer that weighs it; ""
    turned: bool  # the stacks of experts hold [E, inputs, outputs]

    def layer(self, model: nn.Module, number: int) -> nn.Module:
        return model.get_submodule(f"{self.stack}.{number}")


def is_experts(module: nn.Module) -> bool:
    """Whether these are the routed experts of a layer, in stacks."""
    names = {n for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
    return "down_proj" in names and bool(names & {"gate_up_proj", "up_proj"})


def is_attention(name: str) -> bool:
    """Whether a module of a layer is its attention, by its name; a norm may be named after it."""
    return ("attn" in name or "attention" in name) and "norm" not in name


def dissected(model: Any, experts: int) -> Anatomy:
    """The parts of a model with `experts` experts in each MoE layer. Raises Unknown."""
    paths = [n for n, m in model.named_modules() if is_experts(m) and m.down_proj.shape[0] == experts]
    stack = _stack_of(paths)
    inside = {p.removeprefix(f"{stack}.").partition(".")[2] for p in paths}
    if len(inside) > 1:
        raise Unknown(
            f"a layer has more than one set of experts, or layers have them in different places: {', '.join(sorted(inside))}"
        )
    (place,) = inside
    block, _, last = place.rpartition(".")
    if not block or last != "experts":
        raise Unknown(f"the experts lie at {place!r} of a layer, in no block of their own")
    moe = tuple(sorted(int(p.removeprefix(f"{stack}.").partition(".")[0]) for p in paths))
    layer, body = model.get_submodule(f"{stack}.{moe[-1]}"), model.get_submodule(stack.rpartition(".")[0])
    order, inner = _order(model, body, layer)
    weight, vectors = _router(layer.get_submodule(block), model.get_submodule(paths[0]), experts)
    shared, gate = _shared(layer.get_submodule(block), weight.rpartition(".")[0])
    heads = [m.get_output_embeddings() for m in model.modules() if isinstance(m, PreTrainedModel)]  # a part's, perhaps
    head = next((n for h in heads if h is not None for n, m in model.named_modules() if m is h), "")
    embedding = next((n for n, m in model.named_modules() if m is model.get_input_embeddings()), "")
    prefix = f"{block}."
    return Anatomy(
        stack=stack, embedding=embedding, head=head, moe=moe, block=block,
        final_norm=_final_norm(body, stack, order),
        norm=_norm_before(layer, inner, block),
        norm_feeds_more=_feeds_more(model, layer, _norm_before(layer, inner, block), block),
        attention=next(filter(is_attention, inner), ""),
        router=weight.rpartition(".")[0].partition(".")[0],
        weight=prefix + weight, vectors=tuple(prefix + v for v in vectors),
        shared=prefix + shared if shared else "", shared_gate=prefix + gate if gate else "",
        turned=is_turned(model.get_submodule(paths[-1])),
    )  # fmt: skip


def ids(vocabulary: int) -> Tensor:
    """Token ids to run a tiny model with."""
    return torch.randint(3, vocabulary, TOKENS, generator=torch.Generator().manual_seed(3))


def _stack_of(paths: list[str]) -> str:
    """The list of decoder layers that the experts lie in."""
    stacks = set()
    for path in paths:
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            raise Unknown(f"the experts at {path!r} are in no list of layers")
        stacks.add(".".join(parts[:at]))
    if len(stacks) != 1:
        raise Unknown("it has no routed experts in stacks" if not stacks else f"experts are in {' and in '.join(sorted(stacks))}")
    return stacks.pop()


@contextmanager
def _watched(module: nn.Module, called: list[str]) -> Iterator[None]:
    """Note the children of a module in the order in which they are called."""
    hooks = [child.register_forward_pre_hook(lambda *_, name=name: called.append(name)) for name, child in module.named_children()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def language(model: Any) -> Any:
    """The causal language model inside a multimodal one, where it is whole; otherwise the model. (Llama-4's runs in transformers
    5.24, and what is around it fails.)
    """
    inside = getattr(model, "language_model", None)
    return inside if hasattr(inside, "lm_head") else model


def _order(model: Any, body: nn.Module, layer: nn.Module) -> tuple[list[str], list[str]]:
    """The children of the model's body, and of one decoder layer, in the order in which they run."""
    order: list[str] = []
    inner: list[str] = []
    with _watched(body, order), _watched(layer, inner), torch.no_grad():
        language(model)(ids(model.get_input_embeddings().weight.shape[0]), use_cache=False)
    if not inner:
        raise Unknown("its decoder layers are not called as modules")
    return order, inner


def _final_norm(body: nn.Module, stack: str, order: list[str]) -> str:
    last = order[-1] if order else ""
    module = body.get_submodule(last) if last else None
    if module is None or not any(p.dim() == 1 for p in module.parameters()) or any(True for _ in module.children()):
        raise Unknown(f"behind its layers runs {last or 'nothing'}, which is no norm")
    return f"{stack.rpartition('.')[0]}.{last}"


def _norm_before(layer: nn.Module, inner: list[str], block: str) -> str:
    """The norm of a layer that runs last before the block."""
    first = block.partition(".")[0]
    before = inner[: inner.index(first)] if first in inner else []
    norms = [n for n in before if any(True for _ in layer.get_submodule(n).parameters())]
    norms = [n for n in norms if all(p.dim() == 1 for p in layer.get_submodule(n).parameters())]
    if not norms:
        raise Unknown(f"no norm of a layer runs before its block {block!r}")
    return norms[-1]


def _feeds_more(model: Any, layer: nn.Module, norm: str, block: str) -> bool:
    """Whether a module of the layer outside the block also sees what the norm gives out."""
    made: list[Tensor] = []
    seen: list[bool] = []

    def see(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = [t for t in (*args, *named.values()) if isinstance(t, Tensor)]
        seen.append(any(t.data_ptr() == m.data_ptr() and t.numel() == m.numel() for t in given for m in made))

    inside = tuple(f"{'.'.join(block.split('.')[: i + 1])}." for i in range(block.count(".") + 1))
    others = [m for n, m in layer.named_modules() if n and f"{n}." not in inside and not n.startswith((f"{block}.", norm))]
    hooks = [layer.get_submodule(norm).register_forward_hook(lambda _, args, out: made.append(out))]
    hooks += [m.register_forward_pre_hook(see, with_kwargs=True) for m in others]
    with torch.no_grad():
        language(model)(ids(model.get_input_embeddings().weight.shape[0]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return any(seen)


def _router(block: nn.Module, experts: Any, count: int) -> tuple[str, list[str]]:
    """The names inside the block of the router's matrix [E, D], and of its other tensors."""
    width = _width(experts)
    outside = {n: t for n, t in block.state_dict().items() if not n.startswith(("experts.", "shared"))}
    matrices = [n for n, t in outside.items() if tuple(t.shape) == (count, width)]
    if not matrices and (latent := [n for n, m in block.named_children() if getattr(m, "out_features", None) == width]):
        raise Unknown(f"its experts see what {latent[0]} makes of the hidden states, and no hidden states themselves")
    if len(matrices) != 1:
        raise Unknown(f"its MoE block has {len(matrices) or 'no'} matrices with a row for each expert, not one router")
    vectors = [n for n, t in outside.items() if t.numel() == count and t.dim() and t.shape[-1] == count]
    stem = matrices[0].rpartition(".")[0]
    if other := [n for n in outside if stem and n.startswith(f"{stem}.") and n not in (*matrices, *vectors)]:
        raise Unknown(f"its router has {other[0]}, which no router that we know has")
    return matrices[0], vectors


def _shared(block: nn.Module, router: str) -> tuple[str, str]:
    """The names inside the block of the shared expert's module and of the matrix that weighs it."""
    known = {"experts", router.partition(".")[0]}
    others = [(n, m) for n, m in block.named_children() if n not in known and any(True for _ in m.parameters())]
    gates = [n for n, m in others if [tuple(p.shape)[:1] for p in m.parameters()] == [(1,)]]
    shared = [n for n, m in others if n not in gates]
    if len(shared) > 1 or len(gates) > 1 or (gates and not shared):
        raise Unknown(f"its MoE block has {', '.join(n for n, _ in others)} beside router and experts")
    return "".join(shared), f"{gates[0]}.weight" if gates else ""


def _width(experts: Any) -> int:
    """D, by the stack that has it as its outputs."""
    return int(experts.down_proj.shape[2 if is_turned(experts) else 1])


def is_turned(experts: Any) -> bool:
    """Whether the stacks are [E, N, M]. Of a module that does not say it, D is the side that both share on the outside."""
    if hasattr(experts, "is_transposed"):
        return bool(experts.is_transposed)
    name = "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"
    first, second = getattr(experts, name).shape, experts.down_proj.shape
    return bool(first[1] == second[2] and first[2] != second[1])
