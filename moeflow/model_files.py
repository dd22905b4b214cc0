"""Which files of a folder make a model: one list, with the reason of each. Everything else stays where it is, and a note names it.

Code is among them as bytes that travel with the checkpoint. moeflow never imports it.
"""

import fnmatch
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

INDEX = "model.safetensors.index.json"
"""Which file holds which tensor."""
HISTORY = "moeflow.json"
"""The file of a checkpoint that moeflow assembled: what was decided, and what was done to each layer."""
ADAPTER_CONFIG = "adapter_config.json"
"""What PEFT writes beside an adapter's tensors: its kind, its rank, the model that it was trained on."""
ADAPTERS = (ADAPTER_CONFIG, "adapter_model*")
"""The files of an adapter. They are looked at and never travel: an adapter is merged, or refused."""

READ = ("*.safetensors", INDEX, "config.json", HISTORY, *ADAPTERS)
"""The files that a graph is built from. The new checkpoint has its own."""
FOREIGN = ("consolidated*", "optimizer*", "scheduler*", "rng_state*", "random_states*", "training_args*")
"""The beginnings of names that no weights of transformers have: weights in their maker's own form, and a training's state."""
PROCESSORS = ("*processor_config.json", "*processor.json")
"""The files of a multimodal model that say how images, sounds and videos are read."""

TRAVELLING = (
    "tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model", "*.tiktoken",  # text into tokens
    "*.jinja", "chat_template*", "additional_chat_templates/*.jinja",  # messages into text
    "generation_config.json",  # how tokens are drawn
    *PROCESSORS,  # images, sounds and videos into tokens
    "*.py",  # classes that an `auto_map` names, and what they import; see `remote_code.py`
    "licen[cs]e*", "copying*", "notice*", "use_policy*",  # what its owners ask for
)  # fmt: skip
"""The small files that go along with the weights, in lower or upper case. README.md tells of the original, and stays there."""


def named_like(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file's name matches one of the lower-case patterns, ignoring its own case; "*" stands for no "/"."""
    parts = name.lower().split("/")
    return any(
        len(parts) == pattern.count("/") + 1 and all(map(fnmatch.fnmatchcase, parts, pattern.split("/"))) for pattern in patterns
    )


def is_hidden(name: str) -> bool:
    """Whether a file is of git's or a downloader's, not of the model: a part of its name begins with a point."""
    return any(part.startswith(".") for part in name.split("/"))


def of_model(names: Iterable[str]) -> list[str]:
    """Those of a folder's files that make the model, sorted."""
    return sorted(n for n in names if not is_hidden(n) and named_like(n, (*READ, *TRAVELLING)) and not named_like(n, FOREIGN))


def left_of(names: Iterable[str], taken: Iterable[str]) -> tuple[str, ...]:
    """What stays of a folder when the files `taken` are taken: its other files, and its folders, each with how many files stay."""
    left = [PurePosixPath(n) for n in sorted({*names} - {*taken}) if not is_hidden(n)]
    folders = Counter(n.parts[0] for n in left if len(n.parts) > 1)
    words = (f"{folder}/ ({count} file{'s' if count > 1 else ''})" for folder, count in folders.items())
    return (*(str(n) for n in left if len(n.parts) == 1), *words)
