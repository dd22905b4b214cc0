"""Whether this machine has a network at all, asked in a time that is bounded and that a signal ends.

The name of a host is resolved in C, where no signal of Python is heard, and without a network that may take a minute and more.
"""

import errno
import socket
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

BOUND = 10.0  # seconds for a name to be resolved
GONE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)


def check_name(url: str) -> None:
    """Raise ConnectionError if the host of an address has no name here; a proxy that stands between resolves names by itself."""
    at = urlsplit(url)
    host, proxies = at.hostname or "", getproxies()
    if (at.scheme in proxies or "all" in proxies) and not proxy_bypass(host):
        return
    failed: list[OSError] = []

    def resolve() -> None:
        try:
            socket.getaddrinfo(host, at.port or at.scheme)
        except OSError as error:
            failed.append(error)

    thread = Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(BOUND)
    if thread.is_alive():
        failed.append(socket.gaierror(socket.EAI_AGAIN, f"{host} was not resolved in {BOUND:g} s"))
    if failed:
        raise ConnectionError(str(failed[0])) from failed[0]


def is_absent(error: BaseException | None) -> bool:
    """Whether an error says, or was raised because, a name cannot be resolved or no network is there."""
    while error is not None:
        if isinstance(error, socket.gaierror) or (isinstance(error, OSError) and error.errno in GONE):
            return True
        error = error.__cause__ or error.__context__
    return False
