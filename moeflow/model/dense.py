"""Multiply out the low-rank matrices of a pulled checkpoint, for engines that have no kernel for them.

    python -m moeflow.model.dense FOLDER [--type]

`moeflow pull --dense` runs it in a process of its own, since the command line does not load torch. It prints one line of JSON.
`--type` changes nothing: it tells the model type that the checkpoint would have, for which its config.json and index are enough.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeflow.arch import ARCH, LAYERS, MATRICES, Config, Family, family_config
from moeflow.model import skeleton
from moeflow.model.checkpoint import Tensors, save
from moeflow.model.factors import IN, OUT, multiplied_out
from moeflow.model.formats import Format, config_of, format_of, layer_formats
from moeflow.model.header import TensorInfo
from moeflow.model.layout import Folder, headers, read_config
from moeflow.model.packed import ADDED_OUT, PACKED, SCALE, logical, packed_shapes
from moeflow.model.spec import tensor_bytes

INDEX = "model.safetensors.index.json"


def multiply_out(folder: Path) -> dict[str, Any]:
    """Rewrite the checkpoint in `folder`, file by file. Returns how many matrices were multiplied and unpacked, and all weights'
    bytes before and after.

    If all layers have the same number of experts, and transformers reads the family matrix by matrix, the result has the family's
    own format. If factors are packed, or something is added to packed matrices, everything is unpacked. Without either nothing but
    names is read. One file's tensors are in memory at a time. Raises ValueError if the two factors of a matrix lie in different
    files, OSError if the disk has no room.
    """
    tensors = headers(Folder(folder))
    if not any(n.endswith((OUT, OUT + PACKED, ADDED_OUT)) for n in tensors):  # of any form, such as a multimodal model
        size = sum(t.nbytes for t in tensors.values())
        return {"matrices": 0, "unpacked": 0, "before": size, "after": size}
    config = read_config(Folder(folder))
    family = Family.of(config)
    shapes = {n: t.shape for n, t in tensors.items()}
    formats = {i: format_of(shapes, config, i) for i in family.moe_layers}
    packed = any(n.endswith((OUT + PACKED, ADDED_OUT)) for n in tensors)
    files = sorted({t.file for n, t in tensors.items() if n.endswith((OUT, PACKED) if packed else OUT)})
    for name, info in tensors.items():
        if name.endswith((OUT, OUT + PACKED)) and tensors[name.replace(OUT, IN)].file != info.file:
            raise ValueError(
                f"{name} lies in {info.file} and its other factor in another file; pull the checkpoint from its store again"
            )
    check_room(folder, files, tensors, config)
    for file in files:
        save(multiplied_out(Tensors(folder / file)), folder / f"{file}.new")
        os.replace(folder / f"{file}.new", folder / file)
    whole = headers(Folder(folder))
    before, after = (sum(t.nbytes for t in table.values()) for table in (tensors, whole))
    plain = [replace(formats[i], gate=(), up=(), down=(), added="") if i in formats else None for i in range(family.num_layers)]
    if packed:
        config.pop("quantization_config")
    write(folder / "config.json", config_alone(config, plain, whole))
    if (folder / INDEX).exists():
        weight_map = {name: whole[name].file for name in sorted(whole)}
        write(folder / INDEX, {"metadata": {"total_size": after}, "weight_map": weight_map})
    matrices = sum(rank > 0 for f in formats.values() for m in MATRICES for rank in f.ranks(m))
    unpacked = sum(n.endswith(PACKED) for n in tensors) if packed else 0
    return {"matrices": matrices, "unpacked": unpacked, "before": before, "after": after}


def config_alone(config: Config, formats: Sequence[Format | None], names: Iterable[str]) -> Config:
    """The config.json of a checkpoint with these layers and tensors: the family's own, if transformers has a place for each."""
    new = config_of(family_config(config), formats)
    if ARCH not in new or LAYERS in new:
        return new
    alone = {k: v for k, v in new.items() if k != ARCH}
    return alone if reads(alone, names) else config_of(family_config(config), formats, own=True)


def type_multiplied_out(folder: Path) -> str:
    """The model type that a checkpoint would have once it is multiplied out, by its config.json and index alone."""
    config = json.loads((folder / "config.json").read_text())
    stored = json.loads((folder / INDEX).read_text())["weight_map"]
    formats = [f and replace(f, gate=(), up=(), down=(), added="") for f in layer_formats(config)]
    names = {n.replace(OUT, ".weight") for n in logical(stored) if not n.endswith(IN)}
    return str(config_alone(config, formats, names)["model_type"])


def reads(config: Config, names: Iterable[str]) -> bool:
    """Whether transformers' own causal language model of a config.json has a place for each tensor, by its name on disk."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from moeflow.model.structure.building import built
    from moeflow.model.structure.spelling import loaded_as

    if type(skeleton.config_of(config)) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    return {*names} == {*loaded_as(built(config, "meta"), names)}


def check_room(folder: Path, files: list[str], tensors: Mapping[str, TensorInfo], config: Config) -> None:
    """Raise OSError if the disk has no room for the largest of these files at its size after rewriting."""
    size = dict.fromkeys(files, 0)
    shapes = {n: t.shape for n, t in tensors.items()}
    whole = shapes | packed_shapes(shapes, config)
    for name in logical(tensors):
        file = (tensors.get(name) or tensors[name + PACKED]).file
        if file in size and not name.endswith(IN):
            columns = whole[name.removesuffix(OUT) + IN][1:] if name.endswith(OUT) else whole[name][1:]
            size[file] += tensor_bytes((tensors.get(name) or tensors[name + SCALE]).dtype, (*whole[name][:1], *columns))
    free = shutil.disk_usage(folder).free
    if (need := max(size.values(), default=0)) > free:
        raise OSError(f"multiplying out needs {need:,} bytes of disk in {folder}, and {free:,} are free")


def write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    try:
        made: Callable[[Path], Any] = type_multiplied_out if "--type" in sys.argv[2:] else multiply_out
        print(json.dumps(made(Path(sys.argv[1]))))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
