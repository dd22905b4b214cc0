"""Measure two checkpoints in an engine, in turns, and compare what it writes with what transformers computes of the same tokens."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeflow.methods.evaluate.engine import Engine, EngineFailed
from moeflow.methods.evaluate.options import BY_REQUESTS, ONCE, Serving
from moeflow.methods.evaluate.timing import Speed, device_and_memory
from moeflow.methods.reports import row
from moeflow.model.cost import cache_bytes
from moeflow.model.layout import Folder, read_config
from moeflow.model.quiet import load_whole
from moeflow.model.spec import element_bytes
from moeflow.step import Context

ROOM = 1.2
"""What a model takes in the engine, as a multiple of its bytes on disk, without the keys and values of its requests."""
TURNS = 3
"""How often each model is loaded where the device does not hold both at once."""
CHECKED = 8
"""So many prompts are compared with transformers."""
BLOCK = 128
"""Tokens of the largest block in which engines keep keys and values."""
ENOUGH = 0.9
"""Where fewer of the compressed model's tokens, and fewer than of the original's, are transformers', the report says so."""


@dataclass
class _Side:
    """What was measured of one model: of each number of requests the tokens a second of each round, and the peak of memory."""

    folder: Path
    loaded: dict[str, Any] = field(default_factory=dict)
    checked: dict[str, Any] = field(default_factory=dict)
    prefill: dict[int, list[float]] = field(default_factory=dict)
    decode: dict[int, list[float]] = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)
    agreement: float | None = None
    apart: float | None = None


@dataclass(frozen=True)
class Measured:
    """Original and compressed, with what is known of how they were measured."""

    sides: tuple[_Side, _Side]
    facts: dict[str, Any]
    notes: tuple[str, ...]


def measured(folders: tuple[Path, Path], tokens: np.ndarray, how: Serving, context: Context) -> Measured:
    """Both models in the engine that the context's settings name. Raises EngineFailed.

    `tokens`: token ids that prompts are cut from, in order, and from the beginning again where they end.
    """
    length = _prompt(folders, how)
    prompts = [tokens.take(range(i * length, (i + 1) * length), mode="wrap").tolist() for i in range(max(how.requests))]
    sides = (_Side(folders[0]), _Side(folders[1]))
    need = sum(int(_weights(f) * ROOM) + _cache(f, how, length) for f in folders)
    together = need <= device_and_memory()[1] * how.parallel
    groups = [[*sides]] if together else [[side] for side in sides] * TURNS
    rounds = how.rounds if together else -(-how.rounds // TURNS)
    for at, group in enumerate(groups):
        with ExitStack() as running:
            engines = []
            for n, side in enumerate(group):
                engine = _engine(how, context, f"engine-{at}-{n}.log")
                engines.append((side, running.enter_context(engine)))
                side.loaded = engine.ask("load", folder=str(side.folder), options=_options(side.folder, how, length))
                context.progress(at * (rounds + 1), len(groups) * (rounds + 1), "rounds", "loaded")
            _rounds(engines, prompts, rounds, how)
        context.progress((at + 1) * (rounds + 1), len(groups) * (rounds + 1), "rounds")
    notes = [why for side in sides if (why := _check(side, prompts, how))]
    facts = {
        "engine": sides[0].loaded["engine"], "ways": [s.loaded["way"] for s in sides], "requests": [*how.requests],
        "prompt": length, "tokens": how.tokens, "rounds": rounds * (1 if together else TURNS), "together": together,
    }  # fmt: skip
    return Measured(sides, facts, tuple(notes))


def rows_of(result: Measured, how: Serving) -> tuple[list[dict[str, Any]], str]:
    """The rows of the report, and its note."""
    sides, rows, same = result.sides, [], []
    for word, part in (("served_prefill", "prefill"), ("served_decode", "decode")):
        for n in how.requests:
            speeds = [_speed(getattr(side, part)[n]) for side in sides]
            rows.append(_row(word, *(s.median for s in speeds), requests=n))
            ends = {", lower quartile": [s.low for s in speeds], ", upper quartile": [s.high for s in speeds]}
            rows += [row(rows[-1]["name"] + end, one, other, "tokens/s") for end, (one, other) in ends.items()]
            same += [f"{part} of {n}"] if speeds[0].overlaps(speeds[1]) else []
    rows += [_row("served_memory", *(s.memory[n] for s in sides), requests=n) for n in how.requests]
    rows.append(_row("served_resident", *(s.loaded["resident"] for s in sides)))
    rows.append(_row("served_agreement", *(s.agreement for s in sides)))
    rows.append(_row("served_apart", *(s.apart for s in sides)))
    facts = result.facts
    notes = [f"{facts['engine']} runs the original the {facts['ways'][0]} way, the compressed model the {facts['ways'][1]} way"]
    if same:
        rounds = f"the quartiles of {facts['rounds']} alternating rounds overlap"
        notes.append(f"no difference measured, since {rounds}: {', '.join(same)} requests")
    first, second = (s.agreement for s in sides)
    if first is not None and second is not None and second < min(first, ENOUGH):
        notes.append(f"the engine does not compute the compressed model as transformers does: {second:.0%} of its tokens agree")
    return rows, "; ".join([*notes, *result.notes])


def rows_without(how: Serving) -> list[dict[str, Any]]:
    """The rows of a report without figures."""
    return [
        *(_row(word, None, None, requests=n) for word in BY_REQUESTS for n in how.requests),
        *(_row(word, None, None) for word in ONCE),
    ]


def _row(word: str, original: float | None, compressed: float | None, *, requests: int = 0) -> dict[str, Any]:
    name, unit, better = (BY_REQUESTS | ONCE)[word]
    of = {"figure": word, "better": better, "text": str(requests or "")}
    return row(f"{name}, {requests} request{'s' * (requests > 1)}" if requests else name, original, compressed, unit, **of)


def _speed(rates: Sequence[float]) -> Speed:
    low, median, high = (float(q) for q in np.quantile(rates, (0.25, 0.5, 0.75)))
    return Speed(median, low, high)


def _engine(how: Serving, context: Context, log: str) -> Engine:
    if not (program := context.settings.get("python")):
        raise EngineFailed("no engine is named; say serving.python=PATH")
    return Engine(str(program), context.scratch / log, 60 * float(context.settings.get("minutes", how.minutes)))


def _prompt(folders: Sequence[Path], how: Serving) -> int:
    """The tokens of a prompt: fewer than were asked for where a model has fewer positions."""
    configs = [read_config(Folder(folder)) for folder in folders]
    positions = min(int(c.get("max_position_embeddings") or how.prompt + how.tokens) for c in configs)
    if positions <= how.tokens:
        raise EngineFailed(f"the model's {positions} positions leave none before the {how.tokens} that are written")
    return min(how.prompt, positions - how.tokens)


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _cache(folder: Path, how: Serving, length: int) -> int:
    """Bytes that hold the keys and values of the most requests, in whole blocks, and some more."""
    config = read_config(Folder(folder))
    token = cache_bytes(config) * element_bytes(config, how.dtype) // element_bytes(config, "auto")
    blocks = -(-(length + how.tokens) // BLOCK) + 1
    return int(1.2 * token * BLOCK * blocks * max(how.requests)) + (1 << 20)


def _options(folder: Path, how: Serving, length: int) -> dict[str, Any]:
    """What both models are loaded with: room for these requests alone, so that memory is not what is left of a device."""
    return {
        "dtype": how.dtype, "max_model_len": length + how.tokens, "max_num_seqs": max(how.requests),
        "kv_cache_memory_bytes": _cache(folder, how, length), "gpu_memory_utilization": 0.1,
    } | how.further  # fmt: skip


def _rounds(engines: Sequence[tuple[_Side, Engine]], prompts: list[list[int]], rounds: int, how: Serving) -> None:
    """A warm-up, which is what transformers is compared with, and so many rounds in which the models take turns."""
    for turn in range(rounds + 1):
        for side, engine in engines:
            if not turn:
                side.checked = engine.ask("run", prompts=prompts[:CHECKED], tokens=how.tokens, logs=True)
            for n in how.requests:
                ran = engine.ask("run", prompts=prompts[:n], tokens=how.tokens)
                if turn:
                    side.prefill.setdefault(n, []).append(n * len(prompts[0]) / ran["prefill"])
                    side.decode.setdefault(n, []).append(ran["decoded"] / ran["decode"])
                    side.memory[n] = max(side.memory.get(n, 0), ran["memory"])


@torch.inference_mode()
def _check(side: _Side, prompts: list[list[int]], how: Serving) -> str:
    """Compare what the engine wrote with transformers, in the same precision; why not, where transformers cannot load the model."""
    device, same, apart = device_and_memory()[0], [], []
    try:
        model = load_whole(side.folder, dtype=how.dtype).to(device).eval()
        for prompt, written, logs in zip(prompts, side.checked["written"], side.checked["logs"], strict=False):
            ids = torch.tensor([[*prompt, *written]], device=device)
            own_TV = model(ids[:, :-1]).logits[0, len(prompt) - 1 :].float().log_softmax(-1)
            wrote_T = ids[0, len(prompt) :]
            same.append((own_TV.argmax(-1) == wrote_T).float().mean().item())
            apart.append((own_TV.gather(-1, wrote_T[:, None])[:, 0].cpu() - torch.tensor(logs)).abs().max().item())
    except Exception as error:  # of any kind: what transformers and devices raise is theirs to choose
        why = " ".join(str(error).split())[:300]
        return f"{side.folder.name} is not compared with transformers, which failed with {type(error).__name__}: {why}"
    side.agreement, side.apart = float(np.mean(same)), max(apart)
    return ""
