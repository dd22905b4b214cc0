"""What an engine reads of a pulled folder besides its tensors, and what it keeps of them in memory.

    python -m moeflow.model.for_engine FOLDER ENGINE

`moeflow pull --engine` runs it in a process of its own, since the command line does not load what reads headers. It prints one line
of JSON.
"""

import json
import re
import sys
from math import prod
from pathlib import Path
from typing import Any

from moeflow.arch import COMPRESSED
from moeflow.arch.stock import as_engines_read
from moeflow.engines import Engine, engine_of
from moeflow.model.formats import config_of, layer_formats
from moeflow.model.layout import Files, Folder, headers
from moeflow.model.packed import BESIDE, PACKED, SCALE, asymmetric
from moeflow.model.spec import tensor_bytes


def prepare(folder: Path, engine: Engine) -> dict[str, Any]:
    """Write what engines read into the config.json in `folder`. Returns the bytes of weights that the engine keeps in memory."""
    config = json.loads((folder / "config.json").read_text())
    if (told := as_engines_read(as_family(config, engine))) != config:
        (folder / "config.json").write_text(json.dumps(told, indent=2) + "\n")
    return {"resident": resident(Folder(folder), engine, config)}


def as_family(config: dict[str, Any], engine: Engine) -> dict[str, Any]:
    """The configuration in the family's own format, if nothing but zero points keeps it from that, which transformers' own classes
    do not read and this engine does; any other unchanged."""
    if engine.counts or not engine.zeros or not asymmetric(config) or not str(config["model_type"]).startswith(COMPRESSED):
        return config
    return config_of(config, layer_formats(config))


def resident(files: Files, engine: Engine, config: dict[str, Any]) -> int:
    """The bytes of a checkpoint's weights in the engine's memory, on all of its devices together."""
    tensors, total = headers(files), 0
    bits = _bits(config)
    for name, info in tensors.items():
        if not engine.unpacks or bits == 0:
            total += info.nbytes
        elif name.endswith(PACKED):
            scale = tensors[name.removesuffix(PACKED) + SCALE].dtype
            width = _bits(config, name)
            total += tensor_bytes(scale, (prod(info.shape) * 32 // width,))
        elif not name.endswith(BESIDE):
            total += info.nbytes
    return total


def _bits(config: dict[str, Any], name: str = "") -> int:
    """The bits of packed weights by config.json: of the group whose pattern this name matches, or of the first; 0 without any."""
    groups = [*((config.get("quantization_config") or {}).get("config_groups") or {}).values()]
    for group in groups:
        patterns = [t.removeprefix("re:") for t in group.get("targets") or () if t.startswith("re:")]
        if any(re.match(p, name) for p in patterns):
            return int(group["weights"]["num_bits"])
    return int(groups[0]["weights"]["num_bits"]) if groups else 0


if __name__ == "__main__":
    try:
        print(json.dumps(prepare(Path(sys.argv[1]), engine_of(sys.argv[2]))))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
