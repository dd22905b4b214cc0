"""What vLLM on a processor makes of what moeflow writes: tokens a second, prefill and decode, and memory.

A random Mixtral of 299 M parameters in bf16: d=768, F=2560, 6 layers, 8 experts of which 2 compute a token, prompts of 256 tokens,
of which one alone gives each expert 64 rows. Beside it the same with 6 experts in each layer; with 8, 7, 6, 6, 5 and 4, which are
the same bytes; and with every matrix of every expert in two factors of half of its parameters. What stock vLLM reads runs in stock
vLLM, the rest both of the plug-in's ways. Each runs in a process of its own, one thread each; rounds alternate. Ratios are of
what two models did in the same round.

Its engine is that of `make test-serve`: the environment .venv-serve, or $SERVE_VENV. With $MOEFLOW_BENCH_ROUNDS of 5, the default,
it takes about eight minutes.
"""

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.driver import ROOT
from benchmarks.rows import Row
from moeflow.arch import Config, Family
from moeflow.methods.evaluate.engine import Engine
from moeflow.model.checkpoint import save
from moeflow.model.formats import Format, config_of

SIZES: Config = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 4096, "hidden_size": 768, "head_dim": 64,
    "intermediate_size": 2560, "num_hidden_layers": 6, "num_attention_heads": 12, "num_key_value_heads": 4, "num_local_experts": 8,
    "num_experts_per_tok": 2, "hidden_act": "silu", "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1, "sliding_window": None,
}  # fmt: skip
D, F = SIZES["hidden_size"], SIZES["intermediate_size"]
HALF = D * F // (2 * (D + F))
COUNTS = {"full": (8,) * 6, "uniform": (6,) * 6, "differing counts": (8, 7, 6, 6, 5, 4), "low-rank": (8,) * 6}
RUNS = (
    ("full", "stock"), ("uniform", "stock"), ("differing counts", "native"), ("differing counts", "general"),
    ("low-rank", "native"), ("low-rank", "general"),
)  # fmt: skip
"""Each model, and the way that it runs."""

REQUESTS, PROMPT, WRITTEN = (1, 8, 32), 256, 17
ROUNDS = int(os.environ.get("MOEFLOW_BENCH_ROUNDS", "5"))
MEASURES = ("prefill", "decode")

Speeds = dict[tuple[str, str], dict[tuple[str, int], list[float]]]
"""Tokens a second of each run, by measure and number of requests, round by round."""


def checkpoint(name: str, folder: Path) -> Path:
    """Write one of the models, with random weights."""
    generator = torch.Generator().manual_seed(0)
    family, ranks = Family.of(SIZES), (HALF if name == "low-rank" else 0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    tensors = {"model.embed_tokens.weight": normal(SIZES["vocab_size"], D), "lm_head.weight": normal(SIZES["vocab_size"], D)}
    tensors["model.norm.weight"] = torch.ones(D).bfloat16()
    keys = SIZES["num_key_value_heads"] * SIZES["head_dim"]
    for layer, count in enumerate(COUNTS[name]):
        prefix = family.prefix(layer)
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"{prefix}{norm}.weight": torch.ones(D).bfloat16() for norm in norms}
        attention = {"q": D, "k": keys, "v": keys, "o": D}
        tensors |= {f"{prefix}self_attn.{part}_proj.weight": normal(rows, D) for part, rows in attention.items()}
        tensors[family.router(layer)] = normal(count, D)
        for expert in range(count):
            for matrix, (m, n) in zip(family.expert(layer, expert), ((F, D), (F, D), (D, F)), strict=True):
                pieces = zip(family.factors(matrix), ((m, HALF), (HALF, n)), strict=True) if ranks else [(matrix, (m, n))]
                tensors |= {piece: normal(*shape) for piece, shape in pieces}
    formats = [Format(c, *(((ranks,) * c,) * 3 if ranks else ())) for c in COUNTS[name]]
    folder.mkdir()
    save(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(SIZES, formats)))
    return folder


def loaded(engine: Engine, folder: Path, way: str) -> dict[str, Any]:
    """Load a model; its way must be the one that was asked for."""
    options: dict[str, Any] = {
        "max_model_len": PROMPT + WRITTEN, "max_num_seqs": max(REQUESTS), "kv_cache_memory_bytes": 256 << 20, "enforce_eager": True,
        "gpu_memory_utilization": 0.1, "max_num_batched_tokens": 2048,
    }  # fmt: skip
    asked = {} if way == "stock" else {"hf_overrides": {"moeflow_way": way}}
    made = engine.ask("load", folder=str(folder), options=options | asked)
    if made["way"] != way:
        raise AssertionError(f"{folder.name} runs the {made['way']} way, and was to run the {way} way")
    return made


def measured(engines: dict[tuple[str, str], Engine]) -> tuple[Speeds, dict[tuple[str, str], int]]:
    """The speeds of every run, and the peak of its memory in bytes; the first round does not count."""
    prompts = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (max(REQUESTS), PROMPT)).tolist()
    speeds: Speeds = {run: {} for run in engines}
    memory = dict.fromkeys(engines, 0)
    for turn in range(ROUNDS + 1):
        for n in REQUESTS if turn else REQUESTS[:2]:
            for run, engine in engines.items():
                ran = engine.ask("run", prompts=prompts[:n], tokens=WRITTEN)
                memory[run] = max(memory[run], ran["memory"])
                if turn:
                    speeds[run].setdefault(("prefill", n), []).append(n * PROMPT / ran["prefill"])
                    speeds[run].setdefault(("decode", n), []).append(ran["decoded"] / ran["decode"])
    return speeds, memory


def ratio(speeds: Speeds, one: tuple[str, str], other: tuple[str, str], measure: str, n: int) -> list[float]:
    """How many times as fast one run was as the other, round by round."""
    return [a / b for a, b in zip(speeds[one][measure, n], speeds[other][measure, n], strict=True)]


def quartiles(values: Sequence[float], word: Callable[[float], str]) -> str:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{word(median)} ({word(low)} to {word(high)})"


def claims(speeds: Speeds) -> list[Row]:
    """The bounds of the native way; the general way has none."""
    counts, uniform = ("differing counts", "native"), ("uniform", "stock")
    rows = [
        Row(
            f"differing counts the native way: {measure} at {n} requests, beside a uniform model of the same bytes in stock vLLM",
            statistics.median(ratio(speeds, counts, uniform, measure, n)), "at least", 0.97, "times",
        )
        for measure in MEASURES
        for n in REQUESTS
    ]  # fmt: skip
    return rows + [
        Row(
            f"low-rank experts of half the parameters the native way: prefill at {n} requests, beside the full model in stock vLLM",
            statistics.median(ratio(speeds, ("low-rank", "native"), ("full", "stock"), "prefill", n)), "at least", 1.6, "times",
        )
        for n in REQUESTS
    ]  # fmt: skip


def table(speeds: Speeds, memory: dict[tuple[str, str], int], resident: dict[tuple[str, str], int]) -> str:
    """Tokens a second with quartiles, and beside them the quartiles of the ratio to the full model."""
    heads = [f"{measure}, {n}" for measure in MEASURES for n in REQUESTS]
    lines = [
        "Tokens a second, and how many times those of the full model, at 1, 8 and 32 requests: medians (quartiles) of alternating "
        f"rounds, {ROUNDS} of them, one thread.",
        "",
        f"| model | way | {' | '.join(heads)} | weights, MB | peak of the process, MB |",
        f"|---|---|{'---|' * (len(heads) + 2)}",
    ]
    for run in speeds:
        cells = []
        for measure in MEASURES:
            for n in REQUESTS:
                times = quartiles(ratio(speeds, run, RUNS[0], measure, n), "{:.2f}".format)
                cells.append(f"{quartiles(speeds[run][measure, n], '{:,.0f}'.format)}; {times}")
        lines.append(f"| {' | '.join([*run, *cells])} | {resident[run] / 1e6:,.0f} | {memory[run] / 1e6:,.0f} |")
    return "\n".join(lines)


def main() -> tuple[list[Row], str]:
    program = Path(os.environ.get("SERVE_VENV", str(ROOT / ".venv-serve"))) / "bin" / "python"
    if not program.exists():
        raise SystemExit(f"benchmarks serving: there is no {program}; `make test-serve` makes it, or SERVE_VENV names another")
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        folders = {name: checkpoint(name, Path(scratch) / name.replace(" ", "-")) for name in COUNTS}
        engines: dict[tuple[str, str], Engine] = {}
        resident, version = {}, ""
        for name, way in RUNS:
            log = Path(scratch) / f"{name} {way}.log"
            engines[name, way] = running.enter_context(Engine(str(program), log, seconds=600))
            made = loaded(engines[name, way], folders[name], way)
            resident[name, way], version = made["resident"], made["engine"]
        speeds, memory = measured(engines)
    return claims(speeds), f"{version}. {table(speeds, memory, resident)}"


if __name__ == "__main__":
    done, text = main()
    print("\n".join([*(row.line() for row in done), "", text]))
