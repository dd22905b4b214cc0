"""The classes that vLLM is told of, one for each model type: each makes a model of the way that the checkpoint runs."""

from typing import Any

from vllm.config import VllmConfig

from moeflow.arch import COMPRESSED
from moeflow.serve.general import General
from moeflow.serve.native import native_class
from moeflow.serve.ways import NAMES, way_of


class Served(General):
    """A compressed checkpoint in vLLM. Making one gives an object of vLLM's own class where the checkpoint runs the native way."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        config = vllm_config.model_config.hf_config
        if way_of(config.to_dict()).way == "general":
            return super().__new__(cls)
        return native_class(config.model_type)(vllm_config=vllm_config, prefix=prefix)


for _type in NAMES:
    _name = COMPRESSED + _type
    globals()[_name] = type(_name, (Served,), {"__module__": __name__})
