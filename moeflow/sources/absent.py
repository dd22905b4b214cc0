"""What to say of an address at which nothing lies: what it was meant to be, before anybody else is asked. Makes no requests."""

import re
from pathlib import Path

from moeflow.nearest import nearest
from moeflow.sources.places import Kind
from moeflow.store.errors import MissingSource

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@.+)?")
PAGE = re.compile(r"https?://(www\.)?(huggingface\.co|hf\.co)/(datasets/)?([\w.-]+/[\w.-]+)(/(tree|blob|resolve)/([^/]+).*)?/?")
WINDOWS = re.compile(r"[A-Za-z]:[\\/].*|\\\\.*|[^/]*\\.*")
SHOWN = 8  # names of a folder


def is_repository(uri: str, kind: Kind) -> bool:
    """Whether an address at which nothing lies can only be a model's name on the hub.

    Raises MissingSource for one that is meant to be a path: its first part is a folder here. So for the page of a repository.
    """
    if page := PAGE.fullmatch(uri):
        _, _, dataset, name, _, _, revision = page.groups()
        at = f"@{revision}" if revision else ""
        raise MissingSource(f"{uri:.300} is the page of a repository; write {'hf://datasets/' if dataset else ''}{name}{at}")
    if not REPOSITORY.fullmatch(uri):
        return False
    first = uri.partition("/")[0]
    if Path(first).is_dir():
        where = "datasets" if kind == "data" else "models"
        raise MissingSource(
            f"{uri}: the folder {first} is here and holds no {uri.partition('/')[2]}; {advice(Path(uri))}, or write "
            f"hf://{where}/{uri} for the hub's"
        )
    return True


def advice(path: Path) -> str:
    """What may have been meant by a path to nothing: the nearest name beside it, or what there is."""
    if WINDOWS.fullmatch(str(path)) or WINDOWS.fullmatch(path.name):
        return "this is a path of Windows, and on this machine paths are written with /"
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    wanted = path.absolute().relative_to(there).parts[0]
    try:
        names = sorted(p.name for p in there.iterdir() if not p.name.startswith(".") and p.name.isprintable())
    except OSError:
        return "check the path"
    if near := nearest(wanted, names):
        return f"did you mean {there / near}?"
    if not names or there in (Path.cwd(), Path("/")):
        return "check the path"
    more = ", ..." if len(names) > SHOWN else ""
    return f"{there} holds {', '.join(names[:SHOWN])}{more}"
