"""Teach transformers about compressed checkpoints after `import moeflow`, which must not import torch or transformers itself.

An installed moeflow is imported whenever a program imports transformers (infra/autoload), so importing it must cost as good as
nothing.

This takes two steps. A finder waits until the module of transformers' `AutoConfig` is imported, and then removes itself. It
registers a stand-in for each configuration, because that module may be imported in the middle of transformers' own
modules. The first stand-in that has to make a configuration imports `moeflow.model.compressed`, which registers the real classes.
"""

import sys

TYPE_CHECKING = False  # typing itself takes a while to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

AUTO = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register now if transformers is imported already, otherwise as soon as it is."""
    if AUTO in sys.modules:
        _register(sys.modules[AUTO])
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting:
    """A finder on `sys.meta_path`."""

    def find_spec(self, name: str, path: "Sequence[str] | None", target: "ModuleType | None" = None) -> "ModuleSpec | None":
        if name != AUTO:
            return None
        import importlib.util

        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: "ModuleType") -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register(auto: "ModuleType") -> None:
    from moeflow.arch import COMPRESSED

    for model_type in [*auto.CONFIG_MAPPING_NAMES]:
        name = COMPRESSED + model_type
        if name not in auto.CONFIG_MAPPING:
            auto.CONFIG_MAPPING.register(name, type("StandIn", (_StandIn,), {"model_type": name}))


class _StandIn:
    """Makes instances of the real class instead of its own."""

    model_type: str

    def __new__(cls, *args: "Any", **fields: "Any") -> "Any":
        return cls._real()(*args, **fields)

    @classmethod
    def from_dict(cls, values: "dict[str, Any]", **fields: "Any") -> "Any":
        return cls._real().from_dict(values, **fields)

    @classmethod
    def _real(cls) -> "Any":
        from moeflow.model.compressed import config_class

        return config_class(cls.model_type)
