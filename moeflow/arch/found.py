"""The family of a checkpoint, found by looking at transformers' own model of its type. No torch.

Looking takes torch, and building a graph must not load it: it is a process of its own (`moeflow.model.structure`). Its answer is
kept in the cache by the configuration, the tensors' names, the version of transformers and the code that looks; only the `Arch`
enters a step's key.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moeflow.arch.layout import Layout
from moeflow.arch.spec import ALIASES, WITHOUT_EFFECT, Arch, Config, essential
from moeflow.home import home

SECONDS = 900


@dataclass(frozen=True)
class Found:
    """What a look at a checkpoint found."""

    arch: Arch
    layout: Layout = field(default_factory=Layout)
    shapes: Mapping[str, Sequence[int]] | None = None  # of all tensors but the routed experts, by our names; None: not known

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Found":
        return Found(Arch.from_json(value["arch"]), Layout.from_json(value["layout"]), value.get("shapes"))


def arch_of(config: Config) -> Arch:
    """The `Arch` of a model by its config.json alone, compressed by moeflow or not. Raises ValueError if it is not understood."""
    return _of_text(json.dumps(plain(config), sort_keys=True, default=str)).arch


def shapes_of(config: Config) -> Mapping[str, Sequence[int]] | None:
    """The shapes of all tensors of the model but the routed experts, by our names; None if it is not understood here."""
    try:
        return _of_text(json.dumps(plain(config), sort_keys=True, default=str)).shapes
    except ValueError:
        return None


def plain(config: Config) -> Config:
    """The part of a config.json, compressed by moeflow or not, that says what the family's own class is made of."""
    return {k: v for k, v in essential({"model_type": None} | config).items() if not k.startswith("moeflow_")}


@lru_cache(1024)
def _of_text(text: str) -> Found:
    config = json.loads(text)
    return found(config, None, "the model")


def found(config: Config, names: Iterable[str] | None, where: str) -> Found:
    """Look at the checkpoint with this config.json and tensors of these names, or remember what was seen.

    `names`: None if they are as transformers writes them. `where` names the checkpoint. Raises ValueError with what was not
    understood.
    """
    told = {k: v for k, v in config.items() if k not in WITHOUT_EFFECT or k == "architectures"}
    if (model_type := config.get("model_type")) in ALIASES:
        told["model_type"] = ALIASES[model_type]
    asked = {"config": told, "names": None if names is None else sorted(names)}
    text = json.dumps(asked, sort_keys=True)
    about = f"{_code()} {_transformers()} {text}".encode()
    word = re.sub(r"[^\w-]", "_", str(config.get("model_type")), flags=re.ASCII)[:60]  # of a stranger's file: no path, no end
    place = home() / "families" / f"{word}-{hashlib.sha256(about).hexdigest()[:24]}.json"
    answer = _remembered(place)
    if answer is None:
        answer = _looked(text)
        if "why" not in answer:
            _remember(place, answer)
    if "why" in answer:
        kind = f"{config.get('model_type')!r:.60}"
        raise ValueError(f"{where} is a {kind}, which is not supported: {answer['why']:.400}; `moeflow families` lists what is")
    return Found.from_json(answer)


def _looked(request: str) -> dict[str, Any]:
    """The answer of the process. Raises ValueError if it fails."""
    words = [sys.executable, "-P", "-m", "moeflow.model.structure"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(words, input=request, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        raise ValueError(f"looking at the model type took more than {SECONDS} s; run again when the machine is less busy") from None
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"looking at the model type failed: {why[:200]}; is transformers installed here?")
    answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return answer


@cache
def _code() -> str:
    """A digest of what looks, and of what it answers with: another moeflow asks again."""
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(p for room in ("arch", "model") for p in (folder / room).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _transformers() -> str:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return "none"


def _remembered(place: Path) -> dict[str, Any] | None:
    try:
        answer = json.loads(place.read_text())
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) else None


def _remember(place: Path, answer: Mapping[str, Any]) -> None:
    new = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(answer))
        new.replace(place)
    except OSError:  # it is looked at again
        new.unlink(missing_ok=True)
