"""Sources on the Hugging Face hub: a branch or tag is pinned to its commit, offline to the commit in the hub's cache.

huggingface_hub, which resumes by itself, downloads a file into a folder of its own, which is removed when the file has been
copied. A file in the user's hub cache is read from there, and verified like a file in a folder. Only files that `places.chosen`
names are downloaded. Code among them is copied and never run.
"""

import fnmatch
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, tqdm

from moeflow.home import home
from moeflow.sources import folder as disk
from moeflow.sources import network
from moeflow.sources.places import Grow, Kind, Pinned, SourceFile, changed, chosen, copy, piece
from moeflow.store.errors import MissingSource, NoNetwork, SourceUnavailable

BY_PARTS = False
FORM = re.compile(r"hf://(?P<type>models|datasets)/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<glob>.+))?")
SHA256 = re.compile(r"[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{40}")
AWAY = (OfflineModeIsEnabled, ConnectionError, LocalEntryNotFoundError, TimeoutError)

MISSING: dict[type[Exception], str] = {  # what the hub's answers mean, the narrower ones first
    GatedRepoError: "its owners ask who downloads it; accept on its page and set HF_TOKEN",
    RepositoryNotFoundError: "no such folder here and no such repository on the hub, or a private one; "
    "check the name, and set HF_TOKEN if it is private",
    RevisionNotFoundError: "the repository has no such revision; name a branch, a tag or a commit",
    RemoteEntryNotFoundError: "the repository has no such file; check the name",
}


def pin(uri: str, kind: Kind) -> Pinned:
    repo, type_, revision, glob = _parts(uri)
    try:
        with _in_words(uri):
            if not constants.HF_HUB_OFFLINE:
                network.check_name(endpoint())
            commit, sizes = _asked(repo, type_, revision, glob)
    except _Away as away:
        commit, sizes = _cached(repo, type_, revision, uri, away)
    left: tuple[str, ...] = ()
    if not glob:
        files, left = chosen(sizes, kind, uri)
    elif not (files := sorted(n for n in sizes if fnmatch.fnmatchcase(n, glob))):
        inside = [n for n in sizes if n.startswith(f"{glob.rstrip('/')}/")]
        if not inside:
            raise MissingSource(f"{uri}: no file matches {glob!r}; there are {', '.join(sorted(sizes)[:10])}, ...")
        files, left = chosen(inside, kind, uri)
    missing = [n for n in files if sizes[n] is None]
    with _in_words(uri), ThreadPoolExecutor(8) as pool:
        sizes.update(zip(missing, pool.map(lambda n: _headers(repo, type_, commit, n)[1], missing), strict=True))
    return Pinned(f"hf://{type_}s/{repo}@{commit}", commit, tuple(SourceFile(n, sizes[n] or 0, commit) for n in files), left)


def _asked(repo: str, type_: str, revision: str, glob: str) -> tuple[str, dict[str, int | None]]:
    """The commit, and the files of the repository with their sizes, None if the hub does not say; one file costs one HEAD."""
    if glob and not set("*?[") & set(glob):
        with suppress(EntryNotFoundError):  # then it is a folder, or does not exist
            commit, size = _headers(repo, type_, revision, glob)
            return commit, {glob: size}
    hub = HfApi(endpoint=endpoint())
    ask = hub.model_info if type_ == "model" else hub.dataset_info
    about = ask(repo, revision=revision, files_metadata=True, timeout=60)
    return str(about.sha), {s.rfilename: s.size for s in about.siblings or ()}


def _headers(repo: str, type_: str, revision: str, name: str) -> tuple[str, int]:
    """The commit of one file at this revision, and its size."""
    about = get_hf_file_metadata(hf_hub_url(repo, name, repo_type=type_, revision=revision, endpoint=endpoint()))
    return about.commit_hash or revision, about.size or 0


def read(uri: str, file: SourceFile, start: int, stop: int) -> bytes:
    repo, type_, commit, _ = _parts(uri)
    if (cached := _in_cache(repo, type_, commit, file)) is not None:
        if file.chunks:
            return piece(cached.resolve(), file, start, stop)
        with cached.open("rb") as opened:
            opened.seek(start)
            return opened.read(max(0, stop - start))
    if (stop := min(stop, file.size)) <= start:
        return b""
    url = hf_hub_url(repo, file.name, repo_type=type_, revision=commit, endpoint=endpoint())
    try:
        with _in_words(f"{uri}/{file.name}"):
            headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}"}
            answer = get_session().get(url, headers=headers, follow_redirects=True, timeout=60)
            hf_raise_for_status(answer)
            got: bytes = answer.content
            return got[start:stop] if answer.status_code == 200 else got  # 200: the server does not know ranges
    except _Away as away:
        raise away.wrong(f"{uri}/{file.name} is not in the hub's cache here, and {away}") from away


def stays(uri: str, file: SourceFile) -> bool:
    repo, type_, commit, _ = _parts(uri)
    return _in_cache(repo, type_, commit, file) is not None


def local(uri: str, file: SourceFile) -> Path | None:
    return None  # what the hub's cache holds is not the user's own


def known(uri: str, file: SourceFile) -> SourceFile:
    repo, type_, commit, _ = _parts(uri)
    if (cached := _in_cache(repo, type_, commit, file)) is None:
        return file
    path = cached.resolve()
    about = disk.file_at(path)
    if SHA256.fullmatch(path.name) and path.name != about.sha256:
        raise _damaged(f"{uri}/{file.name}", path)
    return replace(file, sha256=about.sha256, chunks=about.chunks)


def bring(uri: str, file: SourceFile, to: Path, grow: Grow, start: int, stop: int) -> None:
    repo, type_, commit, _ = _parts(uri)
    if (cached := _in_cache(repo, type_, commit, file)) is not None:
        _copy(cached, file, to, f"{uri}/{file.name}", grow)
        return
    folder = home() / "hub" / hashlib.sha256(f"{uri}/{file.name}".encode()).hexdigest()[:32]
    try:
        with _in_words(f"{uri}/{file.name}"):
            at: dict[str, Any] = {"repo_type": type_, "revision": commit, "cache_dir": folder, "endpoint": endpoint()}
            path = Path(hf_hub_download(repo, file.name, **at, tqdm_class=_progress(grow)))
    except _Away as away:
        raise away.wrong(f"{uri}/{file.name}: {away}; run again when the hub can be reached") from away
    _copy(path, file, to, f"{uri}/{file.name}", lambda n: None)
    shutil.rmtree(folder, ignore_errors=True)


def _copy(path: Path, file: SourceFile, to: Path, what: str, grow: Grow) -> None:
    """Copy and verify: the hub's cache names files by SHA-256, or as git does by the SHA-1 of size and content."""
    name, size = path.resolve().name, path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    known = sha256 if SHA256.fullmatch(name) else git if COMMIT.fullmatch(name) else None
    copy(path, to, grow, known.update if known else len)
    if size != file.size:
        raise changed(what, f"{file.size} bytes", f"{size} bytes")
    if known is not None and known.hexdigest() != name:
        raise _damaged(what, path)


def _damaged(what: str, path: Path) -> MissingSource:
    return MissingSource(f"{what}: {path} holds other bytes than it should; delete it and run again")


def _in_cache(repo: str, type_: str, commit: str, file: SourceFile) -> Path | None:
    """The file in the user's hub cache, or None if it is not there or not whole."""
    path = try_to_load_from_cache(repo, file.name, cache_dir=_cache(), revision=commit, repo_type=type_)
    return Path(path) if isinstance(path, str) and os.path.getsize(path) == file.size else None


def _cached(repo: str, type_: str, revision: str, uri: str, away: "_Away") -> tuple[str, dict[str, int | None]]:
    """The commit of `revision` by the hub's cache, and the files that are in the cache, with their sizes."""
    try:
        snapshot = Path(snapshot_download(repo, repo_type=type_, revision=revision, cache_dir=_cache(), local_files_only=True))
    except LocalEntryNotFoundError:
        here = "give what lies here: a model's folder, or text as in -p tokens=FILE and heldout=FILE"
        why = f"{uri}: {away}, and the hub's cache holds no {revision} of it; go online, or {here}"
        raise away.wrong(why) from None
    return snapshot.name, {p.relative_to(snapshot).as_posix(): p.stat().st_size for p in snapshot.rglob("*") if p.is_file()}


def _parts(uri: str) -> tuple[str, str, str, str]:
    """Repository, type, revision (a branch, a tag or a commit) and glob. Raises ValueError for another form of address."""
    match = FORM.fullmatch(uri)
    if match is None:
        raise ValueError(f"{uri!r}: write hf://datasets/org/name[@revision][/glob] or org/name[@revision] for a model")
    revision = unquote(match["revision"] or "main")
    return match["repo"], match["type"].removesuffix("s"), revision, match["glob"] or ""


def _cache() -> Path:
    return Path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)


def endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _progress(grow: Grow) -> type[Any]:
    class Progress(tqdm):
        """Draws nothing, and reports how many bytes have arrived."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            grow(int(n or 0))
            return None

    return Progress


class _Away(Exception):
    """The hub cannot be reached."""

    def wrong(self, text: str) -> MissingSource:
        """The error to raise: waiting helps unless the user has forbidden to ask the hub."""
        if isinstance(self.__cause__, OfflineModeIsEnabled):
            return MissingSource(text)
        return NoNetwork(text) if network.is_absent(self.__cause__) else SourceUnavailable(text)


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Turn the hub's errors about `what` into MissingSource, in one line with the way out, or _Away."""
    try:
        yield
    except tuple(MISSING) as error:
        raise MissingSource(f"{what}: {next(text for kind, text in MISSING.items() if isinstance(error, kind))}") from error
    except HFValidationError as error:
        raise MissingSource(f"{what}: {_line(error)}; write org/name[@revision]") from error
    except AWAY as error:
        raise _Away(f"the hub cannot be asked ({_line(error)})") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status >= 500 or status == 429:
            raise _Away(f"the hub does not answer ({_line(error)})") from error
        raise MissingSource(f"{what}: {_line(error)}; check the name and HF_TOKEN") from error
    except HTTPError as error:
        raise _Away(f"the hub cannot be asked ({_line(error)})") from error


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
