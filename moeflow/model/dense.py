"""Multiply out the low-rank matrices of a pulled checkpoint, for engines that have no kernel for them.

    python -m moeflow.model.dense FOLDER

`moeflow pull --dense` runs it in a process of its own, since the command line does not load torch. It prints one line of JSON.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeflow.arch import MATRICES, Config, Family, family_config
from moeflow.model.checkpoint import Tensors, save
from moeflow.model.factors import IN, OUT, multiplied_out
from moeflow.model.formats import config_of, format_of
from moeflow.model.header import TensorInfo
from moeflow.model.layout import Folder, headers, read_config
from moeflow.model.packed import PACKED, SCALE, logical, packed_shapes
from moeflow.model.spec import tensor_bytes

INDEX = "model.safetensors.index.json"


def multiply_out(folder: Path) -> dict[str, Any]:
    """Rewrite the checkpoint in `folder`, file by file. Returns the number of matrices multiplied and the bytes before and after.

    If all layers have the same number of experts, the result has the family's own standard format. If factors are packed,
    everything is unpacked. One file's tensors are in memory at a time. Raises ValueError if the two factors of a matrix lie in
    different files, OSError if the disk has no room.
    """
    config = read_config(Folder(folder))
    family, tensors = Family.of(config), headers(Folder(folder))
    shapes = {n: t.shape for n, t in tensors.items()}
    formats = {i: format_of(shapes, config, i) for i in family.moe_layers}
    packed = any(n.endswith(OUT + PACKED) for n in tensors)
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
    plain = [replace(formats[i], gate=(), up=(), down=()) if i in formats else None for i in range(family.num_layers)]
    if packed:
        config.pop("quantization_config")
    write(folder / "config.json", config_of(family_config(config), plain))
    if (folder / INDEX).exists():
        weight_map = {name: whole[name].file for name in sorted(whole)}
        write(folder / INDEX, {"metadata": {"total_size": after}, "weight_map": weight_map})
    matrices = sum(rank > 0 for f in formats.values() for m in MATRICES for rank in f.ranks(m))
    return {"matrices": matrices, "before": before, "after": after}


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
        print(json.dumps(multiply_out(Path(sys.argv[1]))))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
