"""What has to be done for a graph, decided from listings.

It decides which steps are stored, which reuse what another recipe made from the same contents, and which must run, in an
order that respects their inputs. Only this module decides, for `plan` and both runners; it starts nothing itself.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from moeflow.run.call import Call
from moeflow.run.outcome import State
from moeflow.run.words import count
from moeflow.step import Part, Step, step_of, upstream
from moeflow.store import Index, Manifest, Store, part_digest

EARLIER = 512
"""Of so many earlier results of a step at most a plan reads the manifests, to foretell what will be the same again."""


@dataclass(frozen=True)
class Alias:
    """`call` need not run: the same step made the artifact `of` from the same contents."""

    call: Call
    of: str


class Schedule:
    """The states of a graph: `settle`, write the `aliases`, run the `ready`, and report each with `present` or `made`."""

    def __init__(self, targets: Iterable[Step], store: Store, index: Index | None = None) -> None:
        targets = list(targets)
        self.steps = {s.key: s for s in upstream(targets)}
        self.index = index or store.index(sorted({s.name for s in self.steps.values()}))
        self._store = store
        self._states: dict[str, State] = {}
        self._targets = [t.key for t in targets]
        self._needed(targets)
        self._position = {key: n for n, key in enumerate(self.steps)}
        self._readers: dict[str, list[str]] = defaultdict(list)
        self._prefixes: dict[str, set[str]] = defaultdict(set)  # by step: the parts of its output that are read
        self._unknown: dict[str, int] = {}  # by step: how many inputs have contents not yet known
        self._absent: dict[str, int] = {}  # by step: how many inputs are not yet stored under their own key
        self._contents = dict(self.index.contents)  # content key -> the stored step that has it
        self._claimed: dict[str, str] = {}  # content key -> the step of this run that will make it
        self._followers: dict[str, list[Call]] = defaultdict(list)  # that step -> other calls with the same content key
        self._informed: dict[str, set[str]] = defaultdict(set)  # by step: the readers to which the parts they read were foretold
        self._homes: dict[str, str] = {}  # by step: the key whose manifest lists its files
        self._digests: dict[str, str] = {}  # by input name: the digest of its contents
        self._fresh: list[str] = []  # steps to decide: the contents of all inputs are known
        self._decided: dict[str, Call] = {}  # steps to run that wait for an input to be stored
        self._ready: list[tuple[int, str]] = []
        self._calls: dict[str, Call] = {}
        self._aliases: list[Alias] = []
        self._connect()

    @property
    def states(self) -> dict[str, State]:
        """The state of every step, in the graph's order; "run" if its inputs are not made yet."""
        return {key: self._states.get(key, "run") for key in self.steps}

    def relied(self) -> list[str]:
        """The stored steps that the run uses: targets, and inputs of steps that are not stored yet.

        Garbage collection keeps everything upstream of them, too, while their manifests are young.
        """
        return [key for key in dict.fromkeys([*self._targets, *self._readers]) if self._states.get(key) == "stored"]

    def settle(self) -> None:
        """Decide all that can be decided now. Requests: the manifests of inputs that are read in part."""
        while self._fresh:
            wave = [self.steps[key] for key in sorted(self._fresh, key=self._position.__getitem__)]
            self._fresh = []
            self._look_up(wave)
            for step in wave:
                self._decide(step)

    def foretell(self) -> None:
        """Settle, and decide for a plan also what reads such parts of steps that are to run as do not depend on what has changed.

        The contents of such a part (`Spec.parts`) are those that an earlier run of the step made from the same first inputs; the
        run itself asks what was really made. Requests: the manifests of these earlier runs.
        """
        self.settle()
        tried: set[str] = set()
        while new := [k for k, state in self._states.items() if state == "run" and k not in tried and self.steps[k].spec.parts]:
            tried.update(new)
            earlier = self._earlier({self.steps[key].name for key in new})
            for key in new:
                self._foretold(key, earlier)
            self.settle()

    def aliases(self) -> list[Alias]:
        """The aliases to write now, in any order; each is returned once."""
        taken, self._aliases = self._aliases, []
        return taken

    def ready(self, most: int) -> list[Call]:
        """At most `most` steps whose inputs are all stored, in the order of the graph; each is returned once."""
        return [self._calls[heapq.heappop(self._ready)[1]] for _ in range(min(most, len(self._ready)))]

    def present(self, key: str) -> None:
        """Report that `key` is stored under its own name: steps that read it may start."""
        for reader in self._readers[key]:
            self._absent[reader] -= 1
            if self._absent[reader] == 0 and reader in self._decided:
                self._push(self._decided.pop(reader))

    def made(self, key: str, digest: str, parts: dict[str, str]) -> None:
        """Report that a step from `ready` is stored with these contents; `parts`: their digests by prefix."""
        for prefix, part in parts.items():
            self._digests.setdefault(f"{key}/{prefix}", part)  # what was foretold stays
        self._contents[self._calls[key].record.content] = key
        self._known(key, digest, home=key)
        self.present(key)
        for follower in self._followers.pop(key, []):
            self._take_over(follower, key, digest)

    def warnings(self) -> list[str]:
        """The results in use that another source of their step made; one line for each step name."""
        others: Counter[str] = Counter()
        for key, state in self._states.items():
            owner = self._homes.get(key, key)
            listed = self.index.keys.get(owner)
            source = self.steps[key].source
            if state in ("stored", "same content") and listed and source and not source.startswith(listed.source):
                others[self.steps[key].name] += 1
        versions = {s.name: s.version for s in self.steps.values()}
        return [
            f"{name}: {count(n, 'stored result')} of version {versions[name]} came from another source of this step, "
            "and are used as they are; raise its version if the same arguments must now give another output"
            for name, n in sorted(others.items())
        ]

    def _needed(self, targets: list[Step]) -> None:
        """Stored steps need no inputs: only steps that something not yet stored needs are considered."""
        needed: set[str] = set()
        stack = [t for t in targets if t.key not in self.index.keys]
        while stack:
            step = stack.pop()
            if step.key not in needed:
                needed.add(step.key)
                stack.extend(s for i in step.inputs if (s := step_of(i)).key not in self.index.keys)
        for key in self.steps:
            if key not in needed:
                self._states[key] = "stored" if key in self.index.keys else "not needed"

    def _connect(self) -> None:
        for key, step in self.steps.items():
            if key in self._states:
                continue
            inputs = dict.fromkeys(step_of(i).key for i in step.inputs)
            self._unknown[key] = self._absent[key] = len(inputs)
            for producer in inputs:
                self._readers[producer].append(key)
            for i in step.inputs:
                if isinstance(i, Part):
                    self._prefixes[i.step.key].add(i.prefix)
            if not inputs:
                self._fresh.append(key)
        for key in list(self._readers):
            if self._states.get(key) == "stored":
                self._known(key, self.index.keys[key].digest, home=key)
                self.present(key)

    def _known(self, key: str, digest: str, *, home: str) -> None:
        self._homes[key] = home
        self._digests[key] = digest
        for reader in self._readers[key]:
            if reader not in self._informed[key]:
                self._inform(reader)

    def _inform(self, reader: str) -> None:
        """Of one more of its inputs the contents are known."""
        self._unknown[reader] -= 1
        if self._unknown[reader] == 0:
            self._fresh.append(reader)

    def _look_up(self, wave: list[Step]) -> None:
        """Read the digests of parts, which listings do not contain, from manifests in parallel."""
        lacking = {i.key: step_of(i).key for step in wave for i in step.inputs if i.key not in self._digests}
        if lacking:
            manifests = self._store.manifests({self._homes[key] for key in lacking.values()})
            for name, key in lacking.items():
                home = self._homes[key]
                # one that was deleted since it was listed is asked for again, which says so
                manifest = manifests.get(home) or self._store.manifest(home)
                self._digests[name] = part_digest(manifest, name.partition("/")[2])

    def _earlier(self, names: set[str]) -> list[Manifest]:
        """The manifests of the newest stored results of these steps, newest first."""
        stored = sorted(self.index.modified, key=lambda key: -self.index.modified[key])
        return [*self._store.manifests([k for k in stored if k.rpartition("-")[0] in names][:EARLIER]).values()]

    def _foretold(self, key: str, earlier: list[Manifest]) -> None:
        """Take the contents of those parts for known that an earlier run made from the same contents."""
        step, record = self.steps[key], self._calls[key].record
        digests, known = [i.digest for i in record.inputs], set()
        for prefix in self._prefixes[key] & {*step.spec.parts}:
            first = digests[: step.spec.parts[prefix]]
            for m in earlier:
                same = m.version == step.version and m.params == step.params and [i.digest for i in m.inputs[: len(first)]] == first
                if same and m.step == step.name:
                    self._digests[f"{key}/{prefix}"] = part_digest(m, prefix)
                    known.add(prefix)
                    break
        for reader in self._readers[key]:
            read = [i for i in self.steps[reader].inputs if step_of(i).key == key]
            if all(isinstance(i, Part) and i.prefix in known for i in read):
                self._informed[key].add(reader)
                self._inform(reader)

    def _decide(self, step: Step) -> None:
        digests = [self._digests[i.key] for i in step.inputs]
        call = Call.of(step, digests, sorted(self._prefixes[step.key]))
        self._calls[step.key] = call
        content = call.record.content
        owner = self._contents.get(content)
        if owner is not None and owner != step.key:
            self._take_over(call, owner, self._digests.get(owner) or self.index.keys[owner].digest)
        elif content in self._claimed:
            self._states[step.key] = "same content"
            self._followers[self._claimed[content]].append(call)
        else:
            self._claimed[content] = step.key
            self._states[step.key] = "run"
            if self._absent[step.key] == 0:
                self._push(call)
            else:
                self._decided[step.key] = call

    def _take_over(self, call: Call, owner: str, digest: str) -> None:
        self._states[call.key] = "same content"
        self._aliases.append(Alias(call, owner))
        self._known(call.key, digest, home=owner)

    def _push(self, call: Call) -> None:
        heapq.heappush(self._ready, (self._position[call.key], call.key))
