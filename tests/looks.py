"""Looking at model types in the tests: in their own process, where torch is loaded already, and remembered by all of them."""

import json
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import pytest
import torch

from moeflow.arch import found
from moeflow.home import home
from moeflow.model.structure.__main__ import answer

AS_IT_IS = found._looked
"""How it is looked outside of the tests: in a process of its own."""


def share(folders: pytest.TempPathFactory) -> None:
    """Let all processes of a run of the tests remember what one of them has looked at."""
    base = folders.getbasetemp()
    together = (base.parent if base.name.startswith("popen-") else base) / "families"
    together.mkdir(exist_ok=True)
    (home() / "families").symlink_to(together)


def here(request: str) -> dict[str, Any]:
    """What the process that looks at a model type answers."""
    precision = torch.get_default_dtype()  # a model may be in the middle of being built
    torch.set_default_dtype(torch.float32)
    try:
        quiet = redirect_stderr(StringIO())  # of bars, as what a process writes there
        with quiet, torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.device("cpu"):
            return json.loads(json.dumps(answer(json.loads(request))))
    finally:
        torch.set_default_dtype(precision)
