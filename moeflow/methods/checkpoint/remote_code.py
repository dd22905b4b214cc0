"""Classes of a checkpoint's own, in Python files beside its weights: they travel with it, and moeflow never runs them. No torch."""

import ast
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeflow.sources import Source

MAP = "auto_map"
"""The entry of a JSON file that names, for a class of transformers such as AutoTokenizer, "module.Class" in a file `module.py`."""


def code_of(source: "Source", configs: dict[str, dict[str, Any]]) -> list[str]:
    """The Python files that the `auto_map` of any of these JSON files names, and those beside them which they import; sorted."""
    held = {n for n in source.names() if n.endswith(".py")}
    found: set[str] = set()
    todo = [f"{name.rpartition('.')[0]}.py" for value in configs.values() for name in _named(value)]
    while todo:
        if (file := todo.pop()) in held - found:
            found.add(file)
            todo += [f"{module}.py" for module in _imported(source.read(file))]
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


def _imported(code: bytes) -> list[str]:
    """The modules beside it that a module imports ("from .other import x"), as transformers copies them along; nothing is run."""
    try:
        nodes = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ImportFrom) and n.level == 1]
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # whoever runs it is told
        return []
    return [name for n in nodes for name in ([n.module.partition(".")[0]] if n.module else [a.name for a in n.names])]
