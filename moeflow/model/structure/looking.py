"""Look at a model type: everything that moeflow has to know of it, or what was not understood."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moeflow.arch import Arch, Config, Layout
from moeflow.arch.by_layer import as_numbers
from moeflow.model.structure.anatomy import Anatomy, Unfit, Unknown, dissected, ids, is_attention, is_experts, language
from moeflow.model.structure.building import built, configuration, experts_key, inside_of, text_of, top_k_key, type_of, whole
from moeflow.model.structure.names import LAYER, OUT, Names, named, ours_of, saved, scrambled, unstacked
from moeflow.model.structure.proof import prove
from moeflow.model.structure.routing import in_fp32, routed
from moeflow.model.structure.spelling import loaded_as, spelled
from moeflow.model.structure.tiny import EXPERTS, tiny

LARGE = 1 << 26  # parameters of a model that is called tiny


@dataclass(frozen=True)
class Answer:
    """What a look at a checkpoint's config.json and the names of its tensors found."""

    arch: Arch
    layout: Layout
    shapes: dict[str, list[int]]  # of all tensors but the routed experts, by our names
    proven: dict[str, float]  # what was compared, and how far it is off at most

    def to_json(self) -> dict[str, Any]:
        return {
            "arch": self.arch.to_json(), "layout": self.layout.to_json(), "shapes": self.shapes,
            "proven": self.proven,
        }  # fmt: skip


def look(config: Config, stored: Iterable[str] | None = None) -> Answer:
    """Look at the model type of a config.json. `stored`: the names of the checkpoint's tensors; None: as transformers writes them.

    Raises Unknown, which says in one line what was not understood.
    """
    given = config
    config = _as_numbers(config)
    inside = inside_of(config)
    text = text_of(config, inside)
    if not experts_key(text):
        config = whole(config)
        inside = inside_of(config)
        text = text_of(config, inside)
    if not experts_key(text):
        raise Unknown("its config.json names no number of experts")
    top_k_key(text)
    configuration(given)  # what transformers refuses as it is, nothing loads
    text["model_type"] = type_of(config, inside)
    first: Exception | None = None
    for small in _smaller(config):
        try:
            return _seen(config, text, inside, small, stored)
        except Exception as error:  # of a model's own code, too, where sizes do not fit each other
            if isinstance(error, Unknown) and not isinstance(error, Unfit):
                raise
            first = first or error
    raise first or Unknown("its config.json has sizes that are not known")


def _as_numbers(config: Config) -> Config:
    """The configuration with numbers where it lists the same one for every layer, also of the models inside it."""
    return as_numbers({k: _as_numbers(v) if isinstance(v, dict) else v for k, v in config.items()})


def _smaller(config: Config) -> Iterator[Config]:
    """Configurations of tiny models of the same type, the one that changes most first.

    A published config.json leaves out what is as transformers has it by default, of which the sizes are not tiny either.
    """
    yield (first := tiny(config))
    full = whole(config)
    if (second := tiny(full)) != first:
        yield second
    yield tiny(full, heads=False)


def _seen(config: Config, text: Config, inside: tuple[str, ...], small: Config, stored: Iterable[str] | None) -> Answer:
    """What is found of a model by looking at one of the configuration `small`; `text` is the text model's of the whole one."""
    key, chosen = experts_key(text), top_k_key(text)
    if (size := sum(p.numel() for p in built(small, "meta").parameters())) > LARGE:
        raise Unfit(f"a tiny model of it still has {size:,} parameters: its config.json has sizes that are not known")
    model = built(small)
    anatomy = dissected(model, EXPERTS)
    scrambled(model, anatomy.vectors)
    real = built(config, "meta")
    names = _fitting(model, anatomy, None if stored is None else {*stored}, real)
    all_of_it = _Whole.of(real, anatomy, int(text[key]))
    arch = _arch(anatomy, names, all_of_it, text, key, chosen)
    layout = replace(names.layout, inside=inside)
    little = text_of(small, inside) | {"model_type": text["model_type"]}
    tensors = normal(model, anatomy, names)
    layer = anatomy.moe[-1]
    vectors = tuple(f"{LAYER}{{layer}}.{names.inside(v)}" for v in anatomy.vectors)
    tiny_arch = replace(arch, moe=anatomy.moe, expert_width=_width(model, anatomy))
    block = anatomy.layer(model, layer).get_submodule(anatomy.block)
    tiny_arch = routed(tiny_arch, little, tensors, layer, block, vectors)
    tiny_arch = replace(tiny_arch, router_fp32=in_fp32(block, anatomy.weight.removeprefix(f"{anatomy.block}.")))
    proven = prove(tiny_arch, little, tensors, model, anatomy)
    handed_on = _handed_on(anatomy.layer(model, layer), model, little)
    arch = replace(tiny_arch, moe=all_of_it.moe, expert_width=all_of_it.width, handed_on=handed_on)
    return Answer(arch, layout, all_of_it.shapes(anatomy, names), proven)


def _handed_on(layer: nn.Module, model: Any, config: Config) -> str:
    """The key of config.json for how many whole numbers a decoder layer returns for each token; "" if it returns none."""
    returned: list[Any] = []
    hook = layer.register_forward_hook(lambda _, args, out: returned.extend(out if isinstance(out, tuple) else ()))
    with torch.no_grad():
        language(model)(ids(int(config["vocab_size"])), use_cache=False)
    hook.remove()
    counts = [t.shape[-1] for t in returned if isinstance(t, Tensor) and t.dim() == 3 and not t.is_floating_point()]
    return next((key for key, value in config.items() if value in counts and re.search("top_?k", key)), "")


@dataclass(frozen=True)
class _Whole:
    """The model of the whole config.json, without weights."""

    state: Mapping[str, Tensor]
    moe: tuple[int, ...]
    width: int
    tied: frozenset[str]

    @staticmethod
    def of(model: Any, anatomy: Anatomy, experts: int) -> "_Whole":
        moe: dict[int, int] = {}
        for name, module in model.named_modules():
            if name.startswith(f"{anatomy.stack}.") and is_experts(module):
                number = int(name.removeprefix(f"{anatomy.stack}.").partition(".")[0])
                matrices, _ = unstacked(module)
                if len(matrices["down"]) != experts:
                    raise Unknown(f"layer {number} has {len(matrices['down'])} experts where config.json says {experts}")
                moe[number] = int(matrices["down"][0].shape[1])
        if not moe:
            raise Unknown("no layer has experts, by what its config.json says of its layers")
        if len(set(moe.values())) != 1:
            raise Unknown("the experts of its layers differ in width")
        return _Whole(
            model.state_dict(), tuple(sorted(moe)), next(iter(moe.values())), frozenset(model.all_tied_weights_keys or ())
        )

    def shapes(self, anatomy: Anatomy, names: Names) -> dict[str, list[int]]:
        """The shapes of all tensors but the routed experts, by our names; those that are tied to others left out."""
        shapes = {}
        for name, tensor in self.state.items():
            ours = ours_of(name, anatomy, names)
            if ours is not None and name not in self.tied:
                shapes[ours] = list(tensor.shape)
        return shapes


def normal(model: Any, anatomy: Anatomy, names: Names) -> dict[str, Tensor]:
    """The tensors of the text model by our names, each matrix of each expert for itself."""
    state = model.state_dict()
    tensors = {ours: t for name, t in state.items() if (ours := ours_of(name, anatomy, names)) is not None}
    for layer in anatomy.moe:
        matrices, biases = unstacked(anatomy.layer(model, layer).get_submodule(f"{anatomy.block}.experts"))
        for templates, pieces in ((names.experts, matrices), (names.biases, biases)):
            for template, each in zip(templates, pieces.values(), strict=True):
                for expert, tensor in enumerate(each):
                    tensors[f"{LAYER}{layer}.{template.format(expert=expert)}"] = tensor.contiguous()
    return tensors


def _arch(anatomy: Anatomy, names: Names, whole: _Whole, text: Config, key: str, chosen: str) -> Arch:
    def inside(path: str) -> str:
        return f"{LAYER}{{layer}}.{names.inside(path)}"

    shared = _shared(anatomy, whole)
    body = anatomy.stack.rpartition(".")[0]
    # in the text model alone, which has no wrapper around its body and its head
    rest = tuple((ours, "lm_head." if ours == OUT else there.replace(f"{body}.", "model.", 1)) for ours, there in names.rest)
    return Arch(
        model_type=str(text["model_type"]),
        router=inside(anatomy.weight),
        experts=tuple(f"{LAYER}{{layer}}.{n}" for n in names.experts),
        expert_biases=tuple(f"{LAYER}{{layer}}.{n}" for n in names.biases),
        shared=tuple(inside(n) for n in shared),
        shared_gate=inside(anatomy.shared_gate) if anatomy.shared_gate else None,
        memory=names.memory, block=anatomy.block, block_router=anatomy.router, norm=names.inside(f"{anatomy.norm}."). rstrip("."),
        attention=anatomy.attention or _mixer(anatomy, whole), experts_key=key, top_k_key=chosen,
        moe=whole.moe, expert_width=whole.width, norm_feeds_more=anatomy.norm_feeds_more,
        rest=tuple((a, b) for a, b in rest if a != b), turned=anatomy.turned,
    )  # fmt: skip


def _mixer(anatomy: Anatomy, whole: _Whole) -> str:
    """Where attention is, if a layer with experts has none: under the block's own name, if no layer has a module called so."""
    inside = {n.removeprefix(f"{anatomy.stack}.").split(".")[1] for n in whole.state if n.startswith(f"{anatomy.stack}.")}
    return next(filter(is_attention, sorted(inside)), anatomy.block)


def _shared(anatomy: Anatomy, whole: _Whole) -> tuple[str, ...]:
    """The matrices of the shared expert inside a layer: gate, up, down, or up and down."""
    if not anatomy.shared:
        return ()
    prefix = f"{anatomy.stack}.{whole.moe[-1]}."
    inside = [n.removeprefix(prefix) for n in whole.state if n.startswith(f"{prefix}{anatomy.shared}.")]
    ends = [n.removeprefix(f"{anatomy.shared}.") for n in inside]
    for known in (("gate_proj.weight", "up_proj.weight", "down_proj.weight"), ("up_proj.weight", "down_proj.weight")):
        if {*ends} == {*known}:
            return tuple(f"{anatomy.shared}.{n}" for n in known)
    raise Unknown(f"its shared expert has {', '.join(sorted(ends)[:4])}, not gate, up and down matrices")


def _width(model: Any, anatomy: Anatomy) -> int:
    matrices, _ = unstacked(anatomy.layer(model, anatomy.moe[-1]).get_submodule(f"{anatomy.block}.experts"))
    return int(matrices["down"][0].shape[1])


def _fitting(model: Any, anatomy: Anatomy, stored: set[str] | None, real: Any) -> Names:
    """The names that the checkpoint has: as transformers writes its original format, as it holds the model, or expert by expert.

    `real`: the model of the checkpoint's own config.json, without weights; it says how `stored` is read.
    """
    unknown: dict[bool, Unknown] = {}  # by whether it is the original format
    found: list[Names] = []
    single: Names | None = None  # as transformers reads and writes a tensor for each matrix of an expert
    for original in (True, False):
        try:
            disk = saved(model, original=original)
            names = spelled(named(model, anatomy, disk), anatomy, loaded_as(model, disk))
            single = names if single is None and not names.layout.stacked else single
            found.append(_one_by_one(names, single) if single else names)
        except Unknown as error:
            unknown[original] = error
    if not found or (stored is None and unknown.get(True)):
        raise unknown.get(True) or Unknown("nothing was saved")
    if stored is None:
        return found[0]
    memory = loaded_as(real, stored)
    try:
        candidates = [spelled(v, anatomy, memory) for names in found for v in (names, _alone(names))]
    except Unknown as error:
        raise unknown.get(True) or error from None
    scores = [sum(t in stored for t in _expected(v, anatomy)) for v in candidates]
    return candidates[scores.index(max(scores))]


def _one_by_one(names: Names, single: Names) -> Names:
    """The names, which may be of stacks, of a family whose checkpoints have a tensor for each matrix of an expert (`single`).

    Where nothing else is renamed, what is in stacks is called here as it is where it is not.
    """
    layout = names.layout
    if names.experts == single.experts or layout.renamed or single.layout.renamed or single.biases or names.stack != single.stack:
        return replace(names, layout=replace(layout, per_expert=names.experts == single.experts))
    parts = dict(zip(names.experts, single.experts, strict=True))
    stacked = tuple(replace(s, parts=tuple(f"{LAYER}{{layer}}.{parts[_inside(p)]}" for p in s.parts)) for s in layout.stacked)
    renamed = tuple((f"{LAYER}{{layer}}.{memory}", f"{LAYER}{{layer}}.{disk}") for disk, memory in single.memory)
    return replace(single, layout=replace(layout, stacked=stacked, renamed=renamed, per_expert=True))


def _inside(template: str) -> str:
    return template.removeprefix(f"{LAYER}{{layer}}.")


def _alone(names: Names) -> Names:
    """The same names with a tensor for each matrix of each expert."""
    return replace(names, layout=replace(names.layout, stacked=()))


def _expected(names: Names, anatomy: Anatomy) -> list[str]:
    """Names of the last MoE layer of a tiny model as they would be in a checkpoint, to tell candidates apart."""
    prefix = f"{names.stack}{anatomy.moe[-1]}."
    experts = [s.name.format(layer=anatomy.moe[-1]) for s in names.layout.stacked] or [
        prefix + template.format(expert=e) for template in names.experts for e in (0, 1)
    ]
    experts += [f"{n}_blocks" for n in experts if names.layout.stacked]
    return [prefix + names.inside(anatomy.weight), prefix + names.inside(f"{anatomy.norm}.weight"), *experts]
