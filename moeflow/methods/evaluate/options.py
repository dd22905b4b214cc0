"""How both models are measured where they are served. No torch."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moeflow.methods.reports import figures
from moeflow.options import check_at_least, check_choices

OURS = ("model", "dtype", "skip_tokenizer_init", "enable_prefix_caching")
"""The engine's options that the measuring sets by itself, and that nobody else may."""
BY_REQUESTS = {
    "served_prefill": ("served prefill", "tokens/s", "higher"),
    "served_decode": ("served decode", "tokens/s", "higher"),
    "served_memory": ("peak memory of the engine", "B", "lower"),
}
"""What is measured for each number of requests, by the word with which a gate names it: name, unit and which is better."""
ONCE = {
    "served_resident": ("resident bytes in the engine", "B", "lower"),
    "served_agreement": ("served tokens that transformers has likeliest", "", "higher"),
    "served_apart": ("log-probabilities apart from transformers', at most", "nats", "lower"),
}
"""The same of what is measured once."""


@dataclass(frozen=True)
class Serving:
    """Both models in vLLM, in an environment of its own: what they write, how fast they are, what they hold in memory.

    Raises ValueError for what cannot be measured.
    """

    python: str = ""
    """The Python of an environment with vLLM and moeflow (docs/serve.md), or its folder, on the machine that measures."""
    requests: tuple[int, ...] = (1, 8, 32)
    """So many requests at once; each number has figures of its own."""
    prompt: int = 256
    """Tokens of a request's prompt, of the first held-out text."""
    tokens: int = 64
    """Tokens that are written behind each prompt, by the likeliest next one."""
    rounds: int = 7
    """Rounds in which the models take turns, after a warm-up."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """In which precision the engine computes; auto: that of the checkpoint."""
    options: str = ""
    """Further arguments of vLLM's LLM, as a JSON object: {"tensor_parallel_size": 2}."""
    again: int = 0
    """Another number measures again what failed, or what was measured on a busy machine."""
    minutes: float = 30.0
    """How long loading a model, or one of its runs, may take; then the engine is stopped, and its figures are left out."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, prompt=1, tokens=2, rounds=2)
        if not self.requests or min(self.requests) < 1 or len({*self.requests}) < len(self.requests):
            raise ValueError(f"requests={self.requests} must be different numbers of at least 1, such as [1, 8, 32]")
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes={self.minutes:g} must be a time above 0")
        if ours := next((name for name in OURS if name in self.further), None):
            raise ValueError(f"options={self.options} says {ours}, which the measuring sets by itself; leave it out")
        parallel = self.further.get("tensor_parallel_size", 1)
        if not isinstance(parallel, int) or isinstance(parallel, bool) or parallel < 1:
            raise ValueError(f"options={self.options} says tensor_parallel_size={parallel!r}, which must be a whole number above 0")

    @property
    def further(self) -> dict[str, Any]:
        """The further arguments of the engine. Raises ValueError if they are no JSON object."""
        try:
            made = json.loads(self.options or "{}")
        except ValueError as error:
            raise ValueError(f'options={self.options} is no JSON ({error}); write it like {{"tensor_parallel_size": 2}}') from None
        if not isinstance(made, dict):
            raise ValueError(f'options={self.options} is no JSON object; write it like {{"tensor_parallel_size": 2}}')
        return made

    @property
    def figures(self) -> tuple[str, ...]:
        """What a gate may ask for: "served_decode[8]", "served_resident"."""
        return (*(word for n in self.requests for word in figures(*BY_REQUESTS, text=str(n))), *ONCE)

    @property
    def parallel(self) -> int:
        """The processes, each with its own GPU, that a model is divided over."""
        return int(self.further.get("tensor_parallel_size", 1))

    @property
    def program(self) -> str:
        """The Python's path, whole where it is relative to the current folder; a word without a folder is looked for in PATH."""
        path = Path(self.python).expanduser()
        if path.is_dir():
            path = path / "bin" / "python"
        return os.path.abspath(path) if "/" in str(path) else str(path)  # not resolved: an environment's Python is a link
