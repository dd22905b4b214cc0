"""What an undisturbed run in one process leaves, and how far what a store holds differs from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moeflow.run.pipeline import call, load
from moeflow.sources import How
from moeflow.step import Step, upstream
from moeflow.store import Store, names
from tests import running, tiny
from tests.chaos.driver import ROOT, Driver

PIPELINE = ROOT / "tests" / "prune_pipeline.py"
BESIDE = ("README.md", "recipe.yaml")
"""What pulling writes beside the checkpoint's files: it tells the version and the store."""
KEEPS = (6, 5, 4)
"""The counts of experts that runs keep: one step of six to seven is another's."""


@dataclass(frozen=True)
class Truth:
    """Undisturbed results of one pipeline, by `keep`."""

    words: tuple[str, ...]  # parameters of the pipeline, all but `keep`
    url: str  # of the folder store that holds them all
    keys: Mapping[int, str]  # of the published checkpoint
    digests: Mapping[str, str]  # of every step of the graphs, by key
    files: Mapping[int, Mapping[str, str]]  # SHA-256 of each file of the pulled checkpoint
    seconds: float  # that a whole run took

    def run(self, url: str, keep: int, *more: str) -> list[str]:
        """The words of a run that publishes `chaos`."""
        params = [word for w in (*self.words, f"keep={keep}") for word in ("-p", w)]
        return ["run", str(PIPELINE), "--store", url, "--name", f"chaos-{keep}", "--json", *params, *more]

    def differs(self, url: str, cache: Path, keep: int = 0) -> list[str]:
        """What in a store is not as it should be; with `keep` that checkpoint must be there."""
        store = Store.open(url, cache)
        stored = store.manifests(self.digests)
        wrong = [f"{key} holds {m.digest}" for key, m in stored.items() if m.digest != self.digests[key]]
        if keep and self.keys[keep] not in stored:
            wrong.append(f"{self.keys[keep]} is not stored after exit code 0")
        return wrong

    def pulled_differs(self, folder: Path, keep: int) -> list[str]:
        """What in a pulled folder is not as it should be."""
        pulled, right = {n: d for n, d in sums(folder).items() if n not in BESIDE}, self.files[keep]
        return [
            f"{name} of the pulled folder is {pulled.get(name)}"
            for name in {*pulled, *right}
            if pulled.get(name) != right.get(name)
        ]

    def copy(self, url: str, cache: Path) -> None:
        """Fill an empty store with what the undisturbed run of the first of KEEPS left, as if it had been run there."""
        source, target = Store.open(self.url).blobs, Store.open(url, cache).blobs
        manifests = Store.open(self.url).manifests(s.key for s in _graph(self.words, KEEPS[0]))
        made = {names.blob(f.sha256) for m in manifests.values() for f in m.files.values()}
        made |= {e.name for e in source.list("found/") if e.name.split("/")[1] in manifests}
        for name in [*made, *map(names.manifest, manifests)]:
            target.create(name, source.read(name))


def undisturbed(folder: Path, source: How) -> Truth:
    """Write a tiny Mixtral and tokens, and run the pipeline once for each of KEEPS, with weights that are copied or referred to."""
    folder.mkdir()
    model, tokens = tiny.write("mixtral", folder / "model"), running.matrix_of(folder, sequences=12)
    (folder / "go").touch()
    words = (f"model={model}", f"tokens={tokens.spec}", f"until={folder / 'go'}", f"source={source}")
    truth = Truth(words, str(folder / "undisturbed"), {}, {}, {}, 0)
    store, took = Store.open(truth.url), 0.0
    keys: dict[int, str] = {}
    digests: dict[str, str] = {}
    files: dict[int, dict[str, str]] = {}
    Driver(["ls"], folder / "said").wait(600)  # the first waits for what all are forked from
    for keep in KEEPS:
        ended = Driver(truth.run(truth.url, keep), folder / "said").wait(600)
        if ended.code:
            raise RuntimeError(f"the undisturbed run of keep={keep} ended with {ended.code}: {ended.said[-500:]}")
        took = took or ended.seconds
        steps = _graph(words, keep)
        keys[keep] = steps[-1].key
        digests |= {key: m.digest for key, m in store.manifests(s.key for s in steps).items()}
        store.fetch(keys[keep], folder / f"pulled-{keep}")
        files[keep] = sums(folder / f"pulled-{keep}")
    return replace(truth, keys=keys, digests=digests, files=files, seconds=took)


def sums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path."""
    return {p.relative_to(folder).as_posix(): names.sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _graph(words: Sequence[str], keep: int) -> list[Step]:
    return upstream([call(load(PIPELINE), [*words, f"keep={keep}"])])
