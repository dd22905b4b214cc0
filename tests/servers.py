"""Servers on this machine for tests and benchmarks: S3 (moto, over real HTTP), the model hub, and a proxy that counts.

All bind 127.0.0.1 at a free port. The proxy writes down every request with its bytes, adds latency, and can be told to
answer by itself, to break off, or to drop a header.
"""

import hashlib
import http.client
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

from moto.server import ThreadedMotoServer

from tests import hub_writing

HOP = {"connection", "transfer-encoding", "keep-alive", "server", "date"}


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # with the query
    sent: int  # bytes of the body that came from the client
    received: int  # bytes of the body that went to the client


@dataclass(frozen=True)
class Fault:
    """What the proxy does with one request instead of passing it on, or with its answer."""

    status: int = 0  # answer this
    code: str = ""  # as S3 says it
    hang_up: bool = False  # close the connection without passing the request on
    lose: bool = False  # pass the request on, then close without its answer
    break_off: int = -1  # pass the answer on up to this many bytes, then close
    date: str = ""  # of a `status` that is answered


@dataclass
class Proxy:
    url: str
    requests: list[Request] = field(default_factory=list)
    latency: float = 0.0  # seconds added to every request
    fault: Callable[[str, str], Fault | None] = lambda method, path: None
    drop: set[str] = field(default_factory=set)  # request headers, lower case
    lock: Lock = field(default_factory=Lock)
    conditional: Lock = field(
        default_factory=Lock
    )  # a real server decides on conditional requests one by one, moto's threads do not

    def count(self, method: str = "", path: str = "") -> int:
        return sum(r.method.startswith(method) and path in r.path for r in self.requests)

    def reset(self) -> None:
        self.requests.clear()
        self.latency, self.fault, self.drop = 0.0, lambda method, path: None, set()


@contextmanager
def s3_server() -> Iterator[str]:
    """moto's S3; its address."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def proxy(target: str, latency: float = 0.0) -> Iterator[Proxy]:
    where = urlsplit(target)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60
        disable_nagle_algorithm = True

        def pass_on(self) -> None:
            time.sleep(seen.latency)
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else self._chunks()
            fault = seen.fault(self.command, self.path) or Fault()
            if fault.hang_up:
                self.close_connection = True
                self._note(body, b"")
                return
            if fault.status:
                told = f"<Error><Code>{fault.code}</Code><Message>told to</Message></Error>".encode()
                about = {"Content-Type": "application/xml"} | ({"Date": fault.date} if fault.date else {})
                self._answer(fault.status, about, told, body, fault)
                return
            upstream = http.client.HTTPConnection(where.hostname or "", where.port, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in {*HOP, *seen.drop, "expect"}}
            headers["Content-Length"] = str(len(body))
            alone = seen.conditional if {"if-match", "if-none-match"} & {k.lower() for k in headers} else nullcontext()
            with alone:
                upstream.request(self.command, self.path, body, headers)
                got = upstream.getresponse()
                answer = got.read()
            kept = {k: v for k, v in got.getheaders() if k.lower() not in HOP}
            upstream.close()
            if fault.lose:
                self.close_connection = True
                self._note(body, b"")
                return
            self._answer(got.status, kept, answer, body, fault)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

        def log_message(self, *args: object) -> None:
            pass

        def _answer(self, status: int, headers: dict[str, str], answer: bytes, body: bytes, fault: Fault) -> None:
            if self.command != "HEAD":
                headers = {k: v for k, v in headers.items() if k.lower() != "content-length"}
                headers["Content-Length"] = str(len(answer))
            if fault.break_off >= 0:
                answer, self.close_connection = answer[: fault.break_off], True
            self._note(body, b"" if self.command == "HEAD" else answer)
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer)

        def _note(self, body: bytes, answer: bytes) -> None:
            with seen.lock:
                seen.requests.append(Request(self.command, self.path, len(body), len(answer)))

        def _chunks(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return b""
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

    with _serving(Handler) as url:
        seen = Proxy(url, latency=latency)
        yield seen


@dataclass
class Hub:
    """A model hub with the endpoints that huggingface_hub asks: repositories by type and name, commits by revision."""

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # "models/org/name@commit" -> files
    refs: dict[str, str] = field(default_factory=dict)  # "models/org/name@branch" -> commit
    asked: list[str] = field(default_factory=list)  # "METHOD path"
    gated: set[str] = field(default_factory=set)  # "models/org/name"
    sizes: bool = True  # whether listings tell them
    cut: int = 0  # so many answers break off in the middle
    writers: tuple[str, ...] = ()  # the names under which repositories may be written

    def put(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit on a branch of "models/org/name" or "datasets/org/name"."""
        commit = hashlib.sha1(json.dumps({k: v.hex() for k, v in files.items()}).encode()).hexdigest()
        self.files[f"{repo}@{commit}"] = files
        self.refs[f"{repo}@{branch}"] = self.refs[f"{repo}@{commit}"] = commit
        return commit


@contextmanager
def hub_server(writers: tuple[str, ...] = ()) -> Iterator[Hub]:
    hub = Hub(writers=writers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            path = unquote(urlsplit(self.path).path)
            if about := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/revision/(.+)", path):
                kind, name, revision = about.groups()
                repo = f"{kind}/{name}"
                if (commit := self._commit(repo, revision)) is None:
                    return
                files = hub.files[f"{repo}@{commit}"]
                siblings = [{"rfilename": n} | ({"size": len(b)} if hub.sizes else {}) for n, b in files.items()]
                self._say(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())
            elif about := re.fullmatch(r"(/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                repo = f"{'datasets' if about[1] else 'models'}/{about[2]}"
                if (commit := self._commit(repo, about[3])) is None:
                    return
                data = hub.files[f"{repo}@{commit}"].get(about[4])
                if data is None:
                    self._say(404, b"", {"X-Error-Code": "EntryNotFound"})
                    return
                etag = f'"{hashlib.sha256(data).hexdigest()}"'
                headers = {"X-Repo-Commit": commit, "ETag": etag, "Accept-Ranges": "bytes"}
                if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                    start, stop = int(asked[1]), int(asked[2]) + 1 if asked[2] else len(data)
                    headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
                    self._say(206, data[start:stop], headers)
                else:
                    self._say(200, data, headers)
            else:
                self._say(404, b"")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, said = hub_writing.answer(hub, unquote(urlsplit(self.path).path), body)
            self._say(status, json.dumps(said).encode())

        def log_message(self, *args: object) -> None:
            pass

        def _commit(self, repo: str, revision: str) -> str | None:
            if repo in hub.gated:
                self._say(403, b"", {"X-Error-Code": "GatedRepo"})
            elif not any(at.startswith(f"{repo}@") for at in hub.refs):
                self._say(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif f"{repo}@{revision}" not in hub.refs:
                self._say(404, b"", {"X-Error-Code": "RevisionNotFound"})
            else:
                return hub.refs[f"{repo}@{revision}"]
            return None

        def _say(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response_only(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                if hub.cut and len(body) > 1000:
                    hub.cut -= 1
                    body, self.close_connection = body[: len(body) // 2], True
                self.wfile.write(body)

    with _serving(Handler) as url:
        hub.url = url
        yield hub


class _Server(ThreadingHTTPServer):
    """Says nothing of clients that were killed."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = _Server(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
