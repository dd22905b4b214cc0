"""Whole models as transformers loads them, without the bars that libraries draw meanwhile: a step reports its own progress."""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any


def load_whole(folder: Path, **options: Any) -> Any:
    """The model in a checkpoint's folder; `options` are those of `AutoModelForCausalLM.from_pretrained`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # compressed-tensors' bars have no switch
        return AutoModelForCausalLM.from_pretrained(folder, **options)
