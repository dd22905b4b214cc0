"""Checkpoints in vLLM with AMD's zentorch, whose kernels run on any processor with AVX-512: vLLM is told that this is one of AMD's.

    python -m tests.serve.on_zen CHECKPOINT REFERENCE [CHECKPOINT REFERENCE ...]

Prints for each, as a line of JSON, the way, the kernels of its experts, how its greedy tokens agree with those of transformers, and
what the plug-in said.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.serve import conftest  # noqa: F401  before vLLM is imported


def kernels(model: Any) -> list[str]:
    """The class that computes the experts of each layer."""
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    return [method.experts_cls.__name__ for method in methods if hasattr(method, "experts_cls")]


def seen(folder: Path, reference: Path) -> dict[str, Any]:
    from tests.serve.engine import agreement, served, told, way

    with told() as lines, served(folder, dtype="bfloat16") as engine:
        (names,) = engine.apply_model(kernels)
        same, apart = agreement(engine, reference)
        return {"way": way(engine), "kernels": names, "same": same, "apart": apart, "said": lines}


if __name__ == "__main__":
    import vllm.platforms

    vllm.platforms._is_amd_zen_cpu = lambda: True
    for folder, reference in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        print(json.dumps(seen(Path(folder), Path(reference))), flush=True)
