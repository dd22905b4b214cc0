"""Load a checkpoint's model into memory, freeze all but what is trained, and hand it to DeepSpeed.

Every process of a gang makes its own. This module knows nothing about data and losses.
"""

import gc
import io
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeflow.arch import Family
from moeflow.methods.finetune import extensions
from moeflow.methods.finetune.lora import apply, attach
from moeflow.methods.finetune.recipe import Recipe
from moeflow.methods.finetune.targets import is_trained
from moeflow.model.checkpoint import Tensors
from moeflow.model.factors import shape_of
from moeflow.model.formats import layer_formats
from moeflow.model.layout import Folder
from moeflow.model.quiet import load_whole
from moeflow.model.skeleton import layers_of


@contextmanager
def distributed(local_rank: int, *, gpus: float, offload: bool = False) -> Iterator[torch.device]:
    """Initialise torch.distributed for the gang's processes unless that is done already; yields this process's device.

    The device is a CPU if there is no GPU or `gpus` is 0. A step that runs outside a gang is a gang of one.
    """
    on_gpu = torch.cuda.is_available() and gpus > 0
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    ours = not torch.distributed.is_initialized()
    if "RANK" not in os.environ and ours:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    with quiet():
        extensions.load(*([] if on_gpu else [extensions.COMMUNICATION]), *([extensions.ADAM] if offload else []))
        deepspeed.init_distributed("nccl" if on_gpu else "gloo")
    try:
        yield device
    finally:
        if ours:
            deepspeed.comm.destroy_process_group()


def quiet() -> AbstractContextManager[Any]:
    """Hide what DeepSpeed prints when it compiles and loads extensions."""
    return redirect_stdout(io.StringIO())


def load(folder: Path, recipe: Recipe, config: dict[str, Any], device: torch.device, *, checkpointing: bool) -> Any:
    """Load the model in a checkpoint's folder, frozen except for what the recipe trains; `config` is DeepSpeed's configuration.

    Under ZeRO-3 only rank 0 reads the checkpoint, and it is divided tensor by tensor while it loads.
    """
    from transformers.integrations import HfDeepSpeedConfig

    divided = config["zero_optimization"]["stage"] == 3
    keep = HfDeepSpeedConfig(config) if divided else None  # transformers looks for it while it is referenced
    where = {} if divided or device.type == "cpu" else {"device_map": {"": device}}
    model = load_whole(folder, dtype=recipe.dtype, **where)
    del keep
    # on a CPU a loop over experts is twice as fast, forward and backward; on a GPU the grouped kernels are faster
    model.config._experts_implementation = "grouped_mm" if device.type == "cuda" else "eager"
    model.config.use_cache = False
    checkpoint = None if recipe.packed == "beside" else Tensors(Folder(folder))
    open_parameters(model, recipe, checkpoint, partial(_divide, config=config) if divided else None)
    if divided:  # DeepSpeed frees a module's weights too early if no gradient flows through its inputs
        model.enable_input_require_grads()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def _divide(module: nn.Module, config: dict[str, Any]) -> None:
    """Divide the parameters of a module between the processes, as ZeRO-3 does to those of a model that it loads."""
    from deepspeed import zero

    with quiet():
        zero.Init(module=module, config_dict_or_path=config)


def open_parameters(
    model: Any, recipe: Recipe, checkpoint: Tensors | None = None, divide: Callable[[nn.Module], object] | None = None
) -> None:
    """Freeze everything but what the recipe trains, or attach LoRA's additions; `checkpoint` and `divide` as for `lora.attach`."""
    family = Family.of(model.config.to_dict())
    parameters = dict(model.named_parameters())
    disk = {n: family.on_disk(n) for n in parameters}
    trained = [n for n, p in parameters.items() if is_trained(family, recipe.mode, recipe.targets, disk[n], shape_of(p))]
    if recipe.mode == "lora":
        attach(model, trained, recipe, checkpoint, divide)
        return
    model.requires_grad_(False)
    for name in trained:
        weight = parameters[name].requires_grad_(True)
        if recipe.keep_zeros and family.in_expert(disk[name]):
            # no gradient, so neither momentum nor decay: zeros stay zero
            weight.register_hook(lambda gradient, w=weight: gradient * (w != 0))


def engine_of(model: Any, config: dict[str, Any], *, decay: float) -> Any:
    """DeepSpeed's engine for the trained parameters; weight decay applies to matrices, not to vectors."""
    import deepspeed
    from deepspeed.utils.z3_leaf_module import set_z3_leaf_module

    for block in _blocks(model):  # processes route differently, so a whole block is gathered at once
        set_z3_leaf_module(block, True)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if len(shape_of(p)) > 1], "weight_decay": decay},
        {"params": [p for p in trained if len(shape_of(p)) < 2], "weight_decay": 0.0},
    ]
    exact = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    with quiet():
        engine, *_ = deepspeed.initialize(model=model, model_parameters=[g for g in groups if g["params"]], config=config)
    for name, buffer in exact.items():  # in bf16 DeepSpeed also rounds frequencies, biases and thresholds
        path, _, last = name.rpartition(".")
        model.get_submodule(path)._buffers[last] = buffer.to(engine.device)
    apply(model)
    gc.collect()
    return engine


def learning(model: Any, on: bool) -> None:
    """Switch the model between training and evaluation; its routers always stay in evaluation mode.

    In training mode some families' routers sample (Phi-MoE's) or add noise to their inputs. That is meant for pre-training, and
    would differ between processes.
    """
    model.train(on)
    for block in _blocks(model):
        block.eval()


def _blocks(model: Any) -> list[nn.Module]:
    """The MoE blocks."""
    config = model.config.to_dict()
    formats, block = layer_formats(config), Family.of(config).arch.block
    return [layer.get_submodule(block) for layer, format in zip(layers_of(model), formats, strict=True) if format is not None]
