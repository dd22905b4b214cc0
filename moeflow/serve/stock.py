"""vLLM's own classes of the families, with their experts counted: what the plug-in registers while MOEFLOW_TRAFFIC is set."""

import importlib
from functools import cache
from typing import Any

from moeflow.serve import traffic
from moeflow.serve.native import CLASSES
from moeflow.serve.ways import NAMES


@cache
def __getattr__(name: str) -> Any:
    """The class of an architecture. vLLM asks for it by the architecture's name."""
    family = next((f for f, names in NAMES.items() if name in names), None)
    if family is None:
        raise AttributeError(f"{__name__} has no {name}")
    module, _, own = CLASSES[family].partition(":")
    base: Any = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), own)

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        traffic.record_runners(self, vllm_config)

    return type(own, (base,), {"__module__": __name__, "__init__": __init__})
