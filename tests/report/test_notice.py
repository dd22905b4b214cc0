"""A notice that a webhook does not take is kept and told in a line, whatever the webhook does instead, and soon."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moeflow.report import notice
from moeflow.store import Store


@contextmanager
def answering(words: bytes, drips: int = 0) -> Iterator[str]:
    """The address of a server that answers every request so, and goes on with this many bytes, one every tenth of a second."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.recv(65536)
                    client.sendall(words)
                    for _ in range(drips):
                        time.sleep(0.1)
                        try:
                            client.sendall(b"x")
                        except OSError:
                            break

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/secret"


@pytest.mark.parametrize(
    ("words", "drips", "said"),
    [
        (b"HTTP/1.1 200 OK\r\nX-Long: ", 100, "does not answer within 0.5 s"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 0, "answered no HTTP (BadStatusLine)"),
        (b"", 0, "cannot be reached ("),  # closed, or reset where it had not read all
        (
            b"HTTP/1.1 301 Moved\r\nLocation: http://127.0.0.1:1/\r\n\r\n",
            0,
            "answered 301, that it has moved; give its new address",
        ),
    ],
)
def test_a_webhook_that_hangs_or_answers_nonsense_is_told_and_the_notice_is_kept(
    words: bytes, drips: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notice, "PAUSES", ())
    monkeypatch.setattr(notice, "TIMEOUT", 0.5)
    store = Store.open(str(tmp_path / "store"))
    with answering(words, drips) as url:
        told = notice.notify(store, url, {"event": "promoted"})
    assert said in told and "it is kept, and sent after the next one" in told and "secret" not in told and "\n" not in told
    (kept,) = store.blobs.list(notice.KEPT)
    assert store.blobs.read(kept.name) == b'{"event": "promoted"}'


@pytest.mark.parametrize(
    "target", ["http://", "https://:443/x", "http://host:port/x", "http://host:99999/x", "http://ho st/", "http://höst/"]
)
def test_an_address_that_cannot_be_one_is_refused_before_the_run(target: str) -> None:
    with pytest.raises(ValueError, match=r"--notify .*: write https://host/path, or a command"):
        notice.check_target(target)
