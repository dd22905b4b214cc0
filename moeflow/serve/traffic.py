"""Which experts a served model sends its tokens to, summed while it serves: MOEFLOW_TRAFFIC=FILE switches it on.

The file is what `tokens=traffic:FILE` reads: for each layer how often each expert was chosen, its weights, and how often each two
were chosen together. No token and no text is kept. Suffixes: T tokens, k experts a token, E experts.
"""

import atexit
import json
import logging
import re
import threading
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeflow.arch import COMPRESSED
from moeflow.serve.switch import VARIABLE, wanted

log = logging.getLogger("vllm.moeflow")
EVERY = 10.0
"""Seconds after which what was counted is written; and when the process ends."""
Note = Callable[[Tensor, Tensor], None]
"""Is told the experts of some tokens, [T, k], and their weights, [T, k]."""
_recorders: "list[Recorder]" = []


class Recorder:
    """The sums of one process, which has all layers of a model or some."""

    def __init__(self, file: Path, about: dict[str, Any]) -> None:
        """`about`: what the file says of the model. Raises ValueError if the file cannot be written."""
        self.file, self.about = file, about
        self.layers: dict[int, tuple[int, dict[str, Tensor]]] = {}
        self.tokens: dict[int, int] = {}
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        try:
            self._write()
        except OSError as error:
            raise ValueError(
                f"{VARIABLE}={file} cannot be written ({error.strerror}); name a file in a folder that is there"
            ) from None
        _recorders.append(self)

    def layer(self, number: int, experts: int) -> Note:
        """What is to be told of every forward of this layer, which has so many experts."""
        self.tokens[number] = 0

        def note(index_Tk: Tensor, weights_Tk: Tensor) -> None:
            count = self._real(len(index_Tk))
            if not count:
                return
            with torch.inference_mode(), self._lock:
                self._add(number, experts, index_Tk[:count], weights_Tk[:count])
            if self._timer is None:
                self._timer = threading.Timer(EVERY, self.write)
                self._timer.daemon = True
                self._timer.start()

        return note

    def write(self) -> None:
        """Write what was counted so far, in the place of the file."""
        self._timer = None
        try:
            self._write()
        except OSError as error:  # a server goes on without its statistics
            log.warning("moeflow: %s=%s was not written (%s)", VARIABLE, self.file, error.strerror)

    def _add(self, number: int, experts: int, index_Tk: Tensor, weights_Tk: Tensor) -> None:
        """On the device, without waiting for it. An index that is no expert's is one that was skipped."""
        if number not in self.layers:
            zeros = torch.zeros(experts, experts, dtype=torch.float64, device=index_Tk.device)
            self.layers[number] = experts, {"together": zeros, "weights": zeros[0].clone()}
        _, sums = self.layers[number]
        index_Tk = index_Tk.long().masked_fill((index_Tk < 0) | (index_Tk >= experts), experts)
        chosen_TE = sums["weights"].new_zeros(len(index_Tk), experts + 1, dtype=torch.float32).scatter_(1, index_Tk, 1)[:, :-1]
        sums["together"] += chosen_TE.T @ chosen_TE  # whole numbers that fp32 has
        weights_E = sums["weights"].new_zeros(experts + 1).index_add_(0, index_Tk.flatten(), weights_Tk.flatten().double())
        sums["weights"] += weights_E[:-1]
        self.tokens[number] += len(index_Tk)

    def _real(self, rows: int) -> int:
        """How many of a forward's rows are tokens of requests; none while vLLM measures its memory."""
        from vllm.forward_context import get_forward_context, is_forward_context_available

        about = get_forward_context().attn_metadata if is_forward_context_available() else None
        if not about:
            return 0
        one = next(iter(about.values())) if isinstance(about, dict) else None
        return min(rows, int(getattr(one, "num_actual_tokens", rows)))

    def _write(self) -> None:
        with self._lock:
            layers = {str(i): {"tokens": self.tokens[i]} | self._of_layer(i) for i in sorted(self.layers)}
        before = self.file.with_name(f"{self.file.name}.part")
        before.write_text(json.dumps(self.about | {"layers": layers}) + "\n")
        before.replace(self.file)

    def _of_layer(self, number: int) -> dict[str, Any]:
        """One layer's sums; counts are whole numbers."""
        if (device := self.layers[number][1]["together"].device).type == "cuda":
            torch.cuda.synchronize(device)  # vLLM computes on a stream of its own
        together_EE, weights_E = (self.layers[number][1][name].cpu() for name in ("together", "weights"))
        together = together_EE.long()
        return {"counts": together.diagonal().tolist(), "weights": weights_E.tolist(), "together": together.tolist()}


def write() -> None:
    """Write what all recorders of this process have counted."""
    for recorder in _recorders:
        recorder.write()


atexit.register(write)
Finalize(None, write, exitpriority=1)  # a process of multiprocessing ends without atexit


def recorder_of(vllm_config: Any) -> Recorder | None:
    """The recorder of a model that is being built; None if none is wanted, or this rank's is another's copy."""
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

    if not wanted() or get_tensor_model_parallel_rank():
        return None
    model, stages = vllm_config.model_config, get_pp_group()
    config = model.hf_config.to_dict()
    about = {"moeflow_traffic": 1, "model": str(model.model), "model_type": str(config["model_type"]).removeprefix(COMPRESSED)}
    about |= {"top_k": config.get("num_experts_per_tok"), "hidden_size": config["hidden_size"], "vocab_size": config["vocab_size"]}
    file = Path(wanted()).expanduser()
    if stages.world_size > 1:
        file = file.with_stem(f"{file.stem}-stage-{stages.rank_in_group}")
    file = free(file)
    log.info("moeflow: the experts that tokens are sent to are counted in %s", file)
    return Recorder(file, about)


def free(file: Path) -> Path:
    """The file, or one with a number behind its name if a run before has left it."""
    names = [file] + [file.with_stem(f"{file.stem}-{n}") for n in range(2, 10_000)]
    return next(name for name in names if not name.exists())


def record_runners(model: Any, vllm_config: Any) -> None:
    """Count in vLLM's own fused experts of a model that was just built. Raises ValueError for a kernel that shows no choice."""
    if (recorder := recorder_of(vllm_config)) is None:
        return
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    for name, module in model.named_modules():
        number = re.search(r"layers\.(\d+)\.", name)
        if isinstance(module, MoERunner) and number:
            _record_runner(module, recorder.layer(int(number[1]), int(module.router.global_num_experts)))


def _record_runner(runner: Any, note: Note) -> None:
    """Tell `note` what this router chooses; the object itself is changed, and no class of vLLM."""
    select = runner.router.select_experts

    def selected(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        weights_Tk, index_Tk = select(*args, **named)
        note(index_Tk, weights_Tk)
        return weights_Tk, index_Tk

    def unseen(*_: Any, **__: Any) -> Any:
        raise ValueError(f"{VARIABLE}: this kernel chooses experts by itself and shows no choice; take --moe-backend triton")

    runner.router.select_experts = selected
    runner.routed_experts.forward_monolithic = unseen
