"""Runners take a graph of steps and a store, and put into the store what is missing there.

They know neither torch nor models; `ray` is imported only in the folder `ray`.
"""

import importlib
import os
import sys
from types import ModuleType
from typing import Any

from moeflow.run.options import Options
from moeflow.run.outcome import CannotRun, ClusterLost, Outcome, StepFailed

# steps report their own progress; the libraries that draw bars of theirs read this when they are imported
for _switch in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(_switch, "1")

__all__ = ["CannotRun", "ClusterLost", "Options", "Outcome", "StepFailed"]


class _Callable(ModuleType):
    """This package has the name of the library's first verb, `moeflow.run("mixtral", ...)`, which is `moeflow.api.run`."""

    def __call__(self, *args: Any, **parameters: Any) -> Any:
        """Run a pipeline and return the version that it makes; see `moeflow.api.run`."""
        return importlib.import_module("moeflow.api").run(*args, **parameters)


sys.modules[__name__].__class__ = _Callable
