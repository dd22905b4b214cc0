"""The entry point that vLLM calls in each of its processes, and what is settled before a model is built."""

import logging
from typing import Any

from moeflow.arch import COMPRESSED, Config
from moeflow.model.formats import layer_formats
from moeflow.serve import switch
from moeflow.serve.ways import NAMES, WAY, architectures, low_rank, way_of

log = logging.getLogger("vllm.moeflow")  # vLLM shows what is said below its own name
ENTRY = "moeflow.serve.models"
"""The module with a class for each model type, imported by vLLM when it needs one."""
STOCK = "moeflow.serve.stock"
"""The module with vLLM's own classes, with their experts counted."""


def register() -> None:
    """Tell vLLM of the architectures of compressed checkpoints, how their attention is, and what has to be set for them."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS, ModelArchConfigConvertorBase

    import moeflow  # noqa: F401  transformers then knows the configurations

    class Latent(ModelArchConfigConvertorBase):
        """The attention of DeepSeek, which vLLM knows by its model types alone."""

        def is_deepseek_mla(self) -> bool:
            return getattr(self.hf_text_config, "kv_lora_rank", None) is not None

    class Settled(VerifyAndUpdateConfig):
        verify_and_update_model_config = staticmethod(settle_model)
        verify_and_update_config = staticmethod(settle)

    for name, model_type in architectures().items():
        ModelRegistry.register_model(name, f"{ENTRY}:{model_type}")
        MODELS_CONFIG_MAP[name] = Settled
    if switch.wanted():
        for name in (n for names in NAMES.values() for n in names if n in ModelRegistry.get_supported_archs()):
            ModelRegistry.register_model(name, f"{STOCK}:{name}")
            MODELS_CONFIG_MAP[name] = _counted(MODELS_CONFIG_MAP.get(name, VerifyAndUpdateConfig))
    for model_type in NAMES:
        MODEL_ARCH_CONFIG_CONVERTORS.setdefault(COMPRESSED + model_type, Latent)


def _counted(before: Any) -> Any:
    """What vLLM settles for one of its own architectures, and what counting its experts needs."""

    class Counted(before):
        @staticmethod
        def verify_and_update_model_config(model: Any) -> None:
            before.verify_and_update_model_config(model)
            if switch.wanted():
                eager(model)

        @staticmethod
        def verify_and_update_config(config: Any) -> None:
            before.verify_and_update_config(config)
            if switch.wanted():
                switch.settle(config.parallel_config)

    return Counted


def eager(model: Any) -> None:
    """Switch CUDA graphs and torch.compile off in vLLM's `ModelConfig`, where experts are counted."""
    if not model.enforce_eager:
        log.info("moeflow: without CUDA graphs and torch.compile, because %s counts in the forward", switch.VARIABLE)
        model.enforce_eager = True


def settle_model(model: Any) -> None:
    """Set what the way of a checkpoint needs in vLLM's `ModelConfig`: eager execution, and no quantization of vLLM's own.

    Raises ValueError if the configuration contradicts itself or asks for a way that cannot be.
    """
    from moeflow.serve.kernels import missing_kernel

    chosen = way_of(model.hf_config.to_dict(), missing_kernel(model))
    if switch.wanted():
        eager(model)
    if chosen.way == "general":
        _settle_general(model, chosen.why)
    else:
        log.info("moeflow: %s runs the native way: %s", model.model, chosen.why)


def _settle_general(model: Any, why: str) -> None:
    log.info("moeflow: %s runs the general way: %s", model.model, why)
    setattr(model.hf_config, WAY, "general")  # who reads it later cannot ask the engine for its kernels
    if not model.enforce_eager:
        log.info("moeflow: without CUDA graphs and torch.compile, because rows are counted for each expert in the forward")
        model.enforce_eager = True
    if model.model_arch_config.quantization_config is not None:
        log.info("moeflow: packed experts are unpacked while they are loaded, and take the memory of whole ones")
        model.model_arch_config.quantization_config = None


def settle(config: Any) -> None:
    """Set what a compressed checkpoint needs in vLLM's `VllmConfig`. Raises ValueError for what it cannot be run with."""
    from vllm.platforms import current_platform

    model, parallel = config.model_config, config.parallel_config
    plain = model.hf_config.to_dict()
    native = way_of(plain).way == "native"
    if parallel.enable_eplb:
        raise ValueError("--enable-eplb balances layers of equal counts of experts, and this checkpoint's differ; leave it out")
    if native and low_rank(plain) and (several := _several(parallel)):
        why = f"low-rank experts run the native way in one process alone, and {several}"
        if plain.get(WAY) == "native":
            raise ValueError(f"{WAY}='native' cannot be: {why}; leave {WAY} out, and the checkpoint runs the general way")
        _settle_general(model, why)
        native = False
    if parallel.enable_expert_parallel and native and low_rank(plain):
        raise ValueError("low-rank experts are none of those that --enable-expert-parallel divides; leave it out")
    if parallel.enable_expert_parallel and not native:
        raise ValueError(
            "--enable-expert-parallel is vLLM's own division of experts, and this checkpoint runs the general way, which divides "
            "them over the tensor-parallel ranks by itself; leave it out"
        )
    if native and low_rank(plain) and not current_platform.is_cpu():
        _without_graphs(config, plain)
    if switch.wanted():
        switch.settle(parallel)
    operations = config.compilation_config.custom_ops
    if current_platform.is_cpu() and config.model_config.use_mla and not any("rotary_embedding" in o for o in operations):
        operations.append("-rotary_embedding")  # the processor's own misreads the queries of latent attention


def _several(parallel: Any) -> str:
    """The option that divides a model's layers over several processes; empty if none does."""
    sizes = {"--" + n.replace("_", "-"): getattr(parallel, n, 1) for n in ("tensor_parallel_size", "data_parallel_size")}
    return next((f"{option} is {size}" for option, size in sizes.items() if size > 1), "")


def _without_graphs(config: Any, plain: Config) -> None:
    """Switch CUDA graphs off where low-rank experts could not be held by one; torch.compile stays."""
    from vllm.config import CUDAGraphMode

    from moeflow.model.routed_experts import waits

    if waiting := [i for i, format in enumerate(layer_formats(plain)) if format is not None and format.low_rank and waits(format)]:
        log.info("moeflow: without CUDA graphs, because layer %s asks the GPU how many rows its experts have", waiting[0])
        config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
