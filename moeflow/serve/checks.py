"""What is compared before vLLM loads a weight: the names and shapes of a checkpoint's tensors, and its configuration."""

from typing import Any

from moeflow.model.compressed import check_checkpoint, files_of, shapes_of

HEADERS = ("auto", "safetensors", "hf")
"""The formats of vLLM's --load-format in which the checkpoint lies in files, whose headers can be read before."""


def check(vllm_config: Any) -> None:
    """Raise ValueError if a tensor of the checkpoint is missing, left over, or of another shape than its configuration says."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if str(load.load_format) in HEADERS:
        hub = {"revision": model.revision, "cache_dir": load.download_dir}
        check_checkpoint(model.hf_config, shapes_of(files_of(model.model, None, hub)), model.model)
