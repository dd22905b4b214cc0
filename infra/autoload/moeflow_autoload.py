"""Whichever program imports transformers loads the checkpoints that moeflow wrote: lm_eval, a notebook's `pipeline()`.

An installed moeflow has this file beside its package, and moeflow.pth, by which Python imports it at every start; the environment
variable MOEFLOW_AUTOLOAD=0 leaves that out. Nothing is imported before transformers is: then it is moeflow, from wherever it lies.
"""

import sys

AUTO = "transformers.models.auto.configuration_auto"


class _Waiting:
    """A finder that imports moeflow when the module of transformers' AutoConfig is first imported, and is gone then."""

    def find_spec(self, name, path=None, target=None):
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        import importlib.util

        try:
            import moeflow  # noqa: F401  its own finder comes first from now on
        except ImportError as error:
            import warnings

            warnings.warn(f"moeflow cannot be imported ({error}), so its checkpoints do not load", stacklevel=2)
        return importlib.util.find_spec(name)


sys.meta_path.insert(0, _Waiting())
