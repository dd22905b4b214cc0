"""What may have been meant by a word that names nothing: the nearest of the names that there are. Standard library only."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[object], cutoff: float = 0.6) -> str:
    """The known name that is most like this word; "" if none is at least as like as `cutoff`, from 0 to 1."""
    return next(iter(difflib.get_close_matches(word, map(str, known), 1, cutoff)), "")


def meant(word: str, known: Iterable[object], otherwise: str) -> str:
    """The question whether the nearest known name was meant; what is to be said `otherwise`."""
    near = nearest(word, known)
    return f"did you mean {near}?" if near else otherwise
