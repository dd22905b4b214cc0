"""The names in a checkpoint, as far as they are not those that transformers would write: it reads more spellings than it writes.

What each name becomes is asked of transformers' own conversion mapping, for the model without weights.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from moeflow.arch.layout import rename
from moeflow.model.structure.anatomy import Anatomy, Unknown
from moeflow.model.structure.names import LAYER, Names, Pairs, ours_of, shortened, split


def loaded_as(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """The names on disk that transformers has a place for in this model, each with its name in memory."""
    mapping = get_model_conversion_mapping(model)
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    state = model.state_dict()
    names = {}
    for name in sorted(stored):
        memory, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if memory not in state:  # as transformers tries it
            memory, _ = rename_source_key(name, [], [], model.base_model_prefix, state)
        if memory in state:
            names[name] = memory
    return names


def spelled(names: Names, anatomy: Anatomy, memory: Mapping[str, str]) -> Names:
    """The same tensors under the names of a checkpoint; `memory`: its names, each with that in memory (`loaded_as`).

    Raises Unknown if no rule over the beginnings of names tells them.
    """
    ours = {disk: ours_of(name, anatomy, names) for disk, name in memory.items()}
    text = {disk: name for disk, name in ours.items() if name is not None}
    outside = [disk for disk, name in memory.items() if ours[disk] is None and f".{anatomy.block}.experts." not in name]
    layout = names.layout
    if outside and text:
        layout = replace(layout, beside=beginnings(outside, {*memory} - {*outside}))
    if not text or all(layout.here(disk) == name and layout.on_disk(name) == disk for disk, name in text.items()):
        return replace(names, layout=layout)
    rules, stack = _rules(text), _stack(text)
    stacked = tuple(replace(s, name=stack + s.name.removeprefix(names.stack)) for s in layout.stacked)
    return replace(names, stack=stack, layout=replace(layout, renamed=rules, stacked=stacked))


def beginnings(names: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """The shortest beginnings, ending with a point, that these names have and no other; the name itself where there is none."""
    taken = {name[: at + 1] for name in others for at, letter in enumerate(name) if letter == "."}
    found = set()
    for name in names:
        starts = (name[: at + 1] for at, letter in enumerate(name) if letter == ".")
        found.add(next((start for start in starts if start not in taken), name))
    return tuple(sorted(found))


def _rules(text: Mapping[str, str]) -> Pairs:
    """The beginnings (on disk, ours) that differ, of which the first that fits is right for every name."""
    whole = [_by_layer(disk, ours) for disk, ours in text.items()]
    for pairs in ([shortened(*pair) for pair in whole], whole):
        different = {(disk, ours) for disk, ours in pairs if disk != ours}
        rules = tuple(sorted(different, key=lambda p: (-len(p[0]), p)))
        back = [(ours, disk) for disk, ours in rules]
        if all(rename(disk, rules) == ours and rename(ours, back) == disk for disk, ours in text.items()):
            return rules
    raise Unknown("the checkpoint's names differ from those that transformers writes, and no rule over their beginnings says how")


def _by_layer(disk: str, ours: str) -> tuple[str, str]:
    """The two names of a tensor, over {layer} if it is in one."""
    if not ours.startswith(LAYER):
        return disk, ours
    number, _, inside = ours.removeprefix(LAYER).partition(".")
    before, _, there = split(disk, number)
    return f"{before}{{layer}}.{there}", f"{LAYER}{{layer}}.{inside}"


def _stack(text: Mapping[str, str]) -> str:
    """The beginning of the names of all layers on disk."""
    layers = {disk: ours.removeprefix(LAYER).partition(".")[0] for disk, ours in text.items() if ours.startswith(LAYER)}
    stacks = {split(disk, number)[0] for disk, number in layers.items()}
    if len(stacks) != 1:
        raise Unknown(f"the checkpoint's layers lie below {' and '.join(sorted(stacks)) or 'nothing'}")
    return stacks.pop()
