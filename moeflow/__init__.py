"""Compress Mixture-of-Experts language models as a graph of cached steps.

    import moeflow

    small = moeflow.run("mixtral", model="FOLDER", tokens="TEXT.jsonl", heldout="OTHER.jsonl", keep=6)
    small.report           # what it costs, beside the original
    model = small.load()   # as transformers gives it

`moeflow.fit` makes a model fit into a budget, `moeflow.version` finds what a store holds, `moeflow.load` loads a folder or what is
stored. Importing moeflow imports neither torch nor transformers; transformers loads compressed checkpoints from then on.
"""

from moeflow.model import autoload

TYPE_CHECKING = False  # typing itself takes a while to import
if TYPE_CHECKING:
    from os import PathLike
    from typing import Any

    from moeflow.api import fit, pipelines, run, version, versions
    from moeflow.result import Version

__version__ = "0.3.0"
__all__ = ["Version", "__version__", "fit", "load", "pipelines", "run", "version", "versions"]

autoload.register()  # imports nothing of transformers yet


def load(where: "str | PathLike[str]", *, store: str = "", **options: "Any") -> "Any":
    """The model in a folder, or of a version in a store, whatever form it has, ready to use.

    `where`: a folder, or what names a version: mixtral@3, mixtral, a label. `options` are those of transformers' `from_pretrained`,
    such as `dtype` and `device_map`. Raises NotStored where there is no such folder and no such version.
    """
    import os

    if os.path.isdir(where):
        from moeflow.model import loading  # which takes no more than `pip install moeflow` brings

        return loading.model_in(where, **options)
    return __getattr__("stored")(os.fspath(where), store).load(**options)


def __getattr__(name: str) -> "Any":
    """What is listed above comes when it is first asked for, since it imports what a run takes."""
    if name not in __all__ and name != "stored":
        raise AttributeError(f"module 'moeflow' has no attribute {name!r}")
    import importlib

    try:
        return getattr(importlib.import_module("moeflow.result" if name == "Version" else "moeflow.api"), name)
    except ModuleNotFoundError as error:
        from moeflow import extras

        raise ImportError(extras.said(str(error.name))) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
