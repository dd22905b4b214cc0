"""A digest of the code that a function runs, by which a run warns of a step whose code changed and whose version did not."""

import ast
import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path

BENEATH = (Path(__file__), Path(__file__).with_name("step.py"))
"""What every step stands on: a change there is none of the step's own code."""
CODE = re.compile(r"[a-z_]\w*(\.\w+)+:\w+")  # how a table of methods refers to a row's code; see `moeflow.methods.graph.load`
_text = cache(Path.read_text)


@cache
def source_digest(fn: Callable[..., None]) -> str:
    """A digest of a function's source and of the modules of its package that it needs, but for `BENEATH`; empty without a file."""
    try:
        text = inspect.getsource(fn)
    except OSError:
        return ""
    package, *inside = fn.__module__.split(".")
    root = Path(inspect.getfile(fn)).parents[len(inside) - 1] if inside else None
    texts: dict[Path, str] = {}
    stack = [*_imports(textwrap.dedent(text), package, root)] if root else []
    while stack:
        file = stack.pop()
        if root and file not in texts and file not in BENEATH:
            texts[file] = _text(file)
            stack.extend(_imports(texts[file], package, root))
    return hashlib.sha256("".join([text, *(texts[file] for file in sorted(texts))]).encode()).hexdigest()


@cache
def _imports(text: str, package: str, root: Path) -> frozenset[Path]:
    """The files of the package that a text imports, or refers to as code to load ("package.module:function")."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
            names.add(node.value.partition(":")[0])
    modules = [root.joinpath(*name.split(".")[1:]) for name in names if name.startswith(f"{package}.")]
    return frozenset(f for m in modules for f in (m.with_suffix(".py"), m / "__init__.py") if f.is_file())
