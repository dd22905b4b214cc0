"""Notices of what a scheduled run has done: JSON posted to a webhook, or given to a command on its standard input.

A notice that does not arrive changes nothing of what it tells. It is tried again with growing pauses, then kept in the store, and
sent behind the next one.
"""

import json
import shlex
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from moeflow.store import Store, StoreError

PAUSES = (1.0, 4.0)  # seconds before the second and the third try
TIMEOUT = 20.0  # seconds for one answer
LONGEST = 600.0  # seconds for a command
KEPT = "notices/"


class NotSent(Exception):
    """The webhook or the command did not take the notice."""


class _Stay(HTTPRedirectHandler):
    """Follows no redirect: one of a POST becomes a GET, which leaves the notice behind."""

    def redirect_request(self, *_: Any) -> None:
        return None


def check_target(target: str) -> None:
    """Raise ValueError unless this is an http(s) address, or a command."""
    if "://" in target:
        try:
            parts = urlsplit(target)
            fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) and target.isascii()
        except ValueError:  # of a port that is none
            fits = False
        if not fits or any(c.isspace() for c in target):
            raise ValueError(f"--notify {target!r}: write https://host/path, or a command")
        return
    try:
        words = shlex.split(target)
    except ValueError as error:
        raise ValueError(f"--notify {target!r} is no command: {error}") from None
    if not words:
        raise ValueError("--notify is empty; write https://host/path, or a command")


def notify(store: Store, target: str, notice: Mapping[str, Any]) -> str:
    """Send this notice and what is kept from earlier runs; return "" or, in a line, why it is not sent and what becomes of it."""
    body = json.dumps(notice).encode()
    try:
        _patiently(target, body)
    except NotSent as error:
        with suppress(StoreError, OSError):
            store.blobs.create(f"{KEPT}{uuid.uuid4().hex}.json", body)
        return f"the notice was not taken: {' '.join(str(error).split())}; it is kept, and sent after the next one"
    with suppress(NotSent, StoreError, OSError):
        for entry in sorted(store.blobs.list(KEPT), key=lambda e: e.modified):
            _send(target, store.blobs.read(entry.name))
            store.blobs.delete([entry.name])
    return ""


def _patiently(target: str, body: bytes) -> None:
    for pause in PAUSES:
        try:
            return _send(target, body)
        except NotSent:
            time.sleep(pause)
    _send(target, body)


def _send(target: str, body: bytes) -> None:
    """One try. Raises NotSent."""
    if "://" not in target:
        return _run(target, body)
    where = urlsplit(target).netloc.rpartition("@")[2]  # the path of a webhook is often its secret
    why: list[str] = []
    beside = threading.Thread(target=lambda: why.append(_post(target, body)), daemon=True)
    beside.start()
    beside.join(TIMEOUT)  # the socket's own limit is for each byte, and an answer may drip
    said = why[0] if why else f"does not answer within {TIMEOUT:g} s"
    if said:
        raise NotSent(f"{where} {said}")


def _post(target: str, body: bytes) -> str:
    """Post to a webhook; returns what is wrong with its answer, "" if it took the notice."""
    request = Request(target, body, {"Content-Type": "application/json", "User-Agent": "moeflow"}, method="POST")
    try:
        with build_opener(_Stay).open(request, timeout=TIMEOUT):
            return ""
    except HTTPError as error:
        moved = ", that it has moved; give its new address" if 300 <= error.code < 400 else ""
        return f"answered {error.code}{moved}"
    except (URLError, OSError) as error:
        return f"cannot be reached ({getattr(error, 'reason', error)})"
    except HTTPException as error:
        return f"answered no HTTP ({type(error).__name__})"


def _run(command: str, body: bytes) -> None:
    words = shlex.split(command)
    try:
        done = subprocess.run(words, input=body, capture_output=True, timeout=LONGEST, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotSent(f"{words[0]}: {error}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise NotSent(f"{words[0]} ended with {done.returncode}" + "".join(f": {line}" for line in said))
