"""Classes of a checkpoint's own, in Python files beside its weights: they travel with it, and moeflow never runs them. No torch."""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeflow.sources import Source

MAP = "auto_map"
"""The entry of a JSON file that names, for a class of transformers such as AutoTokenizer, "module.Class" in a file `module.py`."""
_IMPORT = re.compile(rb"^\s*(?:from\s+\.(\w+)\s+import|import\s+\.(\w+)|from\s+\.\s+import\s+(\w+))", re.MULTILINE)
"""What transformers copies along with a module: another one beside it."""


def code_of(source: "Source", configs: dict[str, dict[str, Any]]) -> list[str]:
    """The Python files that the `auto_map` of any of these JSON files names, and those beside them which they import; sorted."""
    held = {n for n in source.names() if n.endswith(".py")}
    found: set[str] = set()
    todo = [f"{name.rpartition('.')[0]}.py" for value in configs.values() for name in _named(value)]
    while todo:
        if (file := todo.pop()) in held - found:
            found.add(file)
            todo += [f"{next(filter(None, groups)).decode()}.py" for groups in _IMPORT.findall(source.read(file))]
    return sorted(found)


def tokenizer_code(config: dict[str, Any], names: list[str]) -> str:
    """The class of its own that alone can read a checkpoint's text, "" if there is another way.

    `config`: its tokenizer_config.json; `names`: its files. With a tokenizer.json the class is not needed.
    """
    value = config.get(MAP) or {}
    own = value.get("AutoTokenizer") if isinstance(value, dict) else value
    classes = [str(c) for c in (own if isinstance(own, list) else [own]) if c]
    return classes[0] if classes and "tokenizer.json" not in names else ""


def _named(config: dict[str, Any]) -> list[str]:
    """All classes that an `auto_map` names; those of another repository ("org/name--module.Class") lie there."""
    value = config.get(MAP) or {}
    every = value.values() if isinstance(value, dict) else [value]
    flat = [c for one in every for c in (one if isinstance(one, list) else [one])]
    return [c for c in flat if isinstance(c, str) and "--" not in c]
