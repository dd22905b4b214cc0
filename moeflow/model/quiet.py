"""Whole models as transformers loads them, without the bars that libraries draw meanwhile: a step reports its own progress."""

import inspect
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what is printed: compressed-tensors draws bars when a model is loaded and when it first runs, and has no switch."""
    logger = logging.getLogger("compressed_tensors")  # it warns of every layer whose experts lie in stacks, which are unpacked
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def quiet_hooks(model: Any) -> None:
    """Let what is to happen before a model's first forward pass happen without a bar: compressed-tensors unpacks it there."""

    def quietly(hook: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(hook)
        def called(*args: Any, **options: Any) -> Any:
            with quiet():
                return hook(*args, **options)

        return called

    hooks = model._forward_pre_hooks
    for number in hooks:
        hooks[number] = quietly(hooks[number])


def load_whole(folder: Path, **options: Any) -> Any:
    """The causal language model in a checkpoint's folder; `options` are those of `from_pretrained`.

    Raises ValueError if a weight is missing, which transformers would draw at random.
    """
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    from moeflow.model.text_half import language_class

    disable_progress_bar()
    with quiet():
        config = AutoConfig.from_pretrained(folder)
        model, found = language_class(type(config)).from_pretrained(folder, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{folder} lacks {len(missing)} of the weights that transformers loads for a {config.model_type}, as {missing[0]}: "
            "fetch the checkpoint again, or take the version of transformers that wrote it"
        )
    return model


def cache_name(model: Any) -> str:
    """What a model calls the keys and values that it takes and returns: transformers 5.24 renamed them."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
