"""A GPU that is none: tensors that say they lie on one, and refuse what a GPU refuses. They are computed on the processor.

Inside `emulated()`, `torch.cuda.is_available()` is true, tensors can be made on or moved to the device "cuda", and an operation on
tensors of both devices fails with the error that CUDA gives. So code that forgets a tensor on the processor fails without a GPU.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from moeflow.model import ahead, ragged

MEMORY = 80 * 10**9
"""The bytes that the emulated device says it has."""
MOVES = ("aten::copy_", "aten::_has_compatible_shallow_copy_type")
"""The operations that take tensors of both devices."""
INDEXES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
"""The operations on a tensor of the device that take indices on the processor."""


class OnGPU(Tensor):
    """A tensor on the emulated device. `held` are its numbers, which share memory with those of its views."""

    held: Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl  # what an operation gives is wrapped below

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGPU":
        # torch's own code has to take it for a tensor of the processor, or would look for a driver
        made: OnGPU = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def record_stream(self, stream: Any) -> None:
        """A single stream is emulated."""

    def as_subclass(self, kind: Any) -> Any:
        return OnGPU.__new__(type(kind.__name__, (kind, OnGPU), {}), self.held)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs, name = kwargs or {}, function._schema.name
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        _check(name, tensors)
        if name == "aten::histc":  # the processor knows none of whole numbers
            args = (args[0].double(), *args[1:])
        result = function(*_bare(args), **_bare(kwargs))
        if name == MOVES[0]:
            return args[0]
        # an operation in place, or with `out=`, gives back the tensor that it was given
        same = {id(t.held): t for t in tensors if isinstance(t, OnGPU)}
        inference = torch.is_inference_mode_enabled() and all(t.is_inference() for t in tensors)
        with torch.inference_mode(inference):  # or views of other tensors would be refused
            return tree_map(lambda t: _on_gpu(t) if id(t) not in same else same[id(t)], result)


class _Devices(TorchFunctionMode):
    """Calls that name a device, or another tensor as the one to go to, are computed on the processor and give what lies there."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in LEAVING and isinstance(args[0], OnGPU):
            if function is Tensor.numpy:
                raise TypeError(
                    "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory"
                )
            return function(args[0].held.detach(), *args[1:], **kwargs)
        named = [d for value in tree_leaves((args, kwargs)) if (d := _device(value)) is not None]
        if function is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            named = [args[1].device]
        if function is Tensor.new_tensor and not named:
            named = [args[0].device]
        if not named or function in PARSING or named[0].type not in ("cpu", "cuda"):
            return function(*args, **kwargs)
        args, kwargs = tree_map(lambda x: x if _device(x) is None else torch.device("cpu"), (_bare(args), _bare(kwargs)))
        made = function(*args, **kwargs)
        return tree_map(_on_gpu, made) if named[0].type == "cuda" else made


PARSING = (torch.device, torch._C._nn._parse_to)
"""The functions that read the name of a device and go to none."""
LEAVING = (Tensor.cpu, Tensor.numpy, Tensor.tolist)
"""The functions whose result lies on the processor."""


@contextmanager
def emulated() -> Iterator[None]:
    """Inside the `with` statement there is a GPU."""
    with (
        _Devices(),
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(ragged, "AVAILABLE", False),  # kernels of one's own run on a GPU alone
        patch.object(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True),
        patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        patch.object(torch.cuda, "synchronize", lambda *_: None),
        patch.object(torch.cuda, "empty_cache", lambda: None),
        patch.object(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(total_memory=MEMORY)),
        patch.object(torch.cuda, "mem_get_info", lambda *_: (MEMORY, MEMORY)),
        patch.object(torch.cuda, "Stream", lambda *_: SimpleNamespace(synchronize=lambda: None)),
        patch.object(torch.cuda, "stream", nullcontext),
        patch.object(torch.cuda, "current_stream", lambda *_: None),
        # calls in another thread name devices, too
        patch.object(ahead, "ThreadPoolExecutor", partial(ThreadPoolExecutor, initializer=lambda: _Devices().__enter__())),
    ):
        yield


def _device(value: Any) -> torch.device | None:
    """The device that an argument names, if it names one."""
    if isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda"):
        return torch.device(value)
    return value if isinstance(value, torch.device) else None


def _on_gpu(value: Any) -> Any:
    return OnGPU(value) if isinstance(value, Tensor) else value


def _bare(values: Any) -> Any:
    return tree_map(lambda t: t.held if isinstance(t, OnGPU) else t, values)


def _check(name: str, tensors: list[Tensor]) -> None:
    """Raise RuntimeError if tensors of both devices meet where CUDA lets them not: a number [] of the processor may meet any."""
    here = [t for t in tensors if not isinstance(t, OnGPU)]
    if not here or name in MOVES or (name in INDEXES and isinstance(tensors[0], OnGPU)):
        return
    if any(t.dim() for t in here) or (name.endswith("_") and tensors[0] is here[0]):
        raise RuntimeError(
            f"{name}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
        )
