"""Pickles what cannot be sent between processes by name: functions that workers do not have, and errors of any kind."""

import sys
import traceback

from ray import cloudpickle

from moeflow.run.call import Call


def take_along(call: Call) -> None:
    """Pickle a function outside moeflow together with its module, because workers may not have that module."""
    if not isinstance(call.code, str):
        module = sys.modules.get(call.code.__module__)
        if module is not None and module.__name__ != "__main__":
            cloudpickle.register_pickle_by_value(module)


def packed(call: Call) -> bytes:
    """The call as bytes that `pickle` reads. Raises TypeError or AttributeError if something in it cannot be pickled."""
    take_along(call)
    return cloudpickle.dumps(call)


def portable(error: BaseException) -> Exception:
    """The error itself if it can be pickled; else, and for SystemExit and the like, a RuntimeError with its text."""
    if not isinstance(error, Exception):
        return RuntimeError(f"the step ended its process: {type(error).__name__} {error}".rstrip())
    try:
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception as why:  # an exception's own pickling code may raise anything
        return RuntimeError(f"{type(error).__name__}: {error} (as text, because it cannot be pickled: {why})")
    return error


def packed_error(error: BaseException) -> bytes:
    """The error as bytes that `pickle` reads, with its traceback as a note, because pickling drops it."""
    error.add_note("".join(traceback.format_exception(error)))
    return cloudpickle.dumps(portable(error))
