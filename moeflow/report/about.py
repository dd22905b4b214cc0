"""A version as everything that is told of it needs it: its record, its reports, its checkpoint, and what it was made from."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moeflow.report import layers, usage
from moeflow.report.figures import Figure, figures_of
from moeflow.report.layers import Checkpoint
from moeflow.report.table import raw_reports
from moeflow.run.recipe import model_among, pins
from moeflow.store import Manifest, Store, versions
from moeflow.store.versions import Version

HUB = re.compile(r"hf://models/(?P<name>[^/@]+/[^/@]+)(?:@(?P<commit>[^/]+))?")
LICENCES = re.compile(r"(licen[cs]e|copying|notice|use_policy)[^/]*", re.IGNORECASE)


@dataclass(frozen=True)
class About:
    """One version, or an artifact that no version is, with what is stored of how it was made. What is read is read once."""

    store: Store
    key: str
    version: Version | None

    @property
    def title(self) -> str:
        return self.version.ref if self.version else self.key

    @property
    def record(self) -> Mapping[str, Any]:
        return self.version.record if self.version else {}

    @cached_property
    def manifest(self) -> Manifest:
        return self.store.manifest(self.key)

    @cached_property
    def lineage(self) -> dict[str, Manifest]:
        """The manifests of everything upstream of it, itself first."""
        return versions.lineage(self.store, self.key)

    @cached_property
    def made(self) -> dict[str, Manifest]:
        """The same with what its reports were made from: all that was computed for it."""
        keys = [self.key, *(self.version.reports if self.version else ())]
        return versions.reach(self.store, keys, remembered=True)

    @cached_property
    def raw(self) -> dict[str, Mapping[str, Any]]:
        """Its reports as they are stored, with every fact beside the rows, by key; one that is gone is left out."""
        keys = self.version.reports if self.version else ()
        return dict(raw_reports(self.store, [k for k in keys if k in self.store.manifests(keys)]))

    @property
    def reports(self) -> tuple[Mapping[str, Any], ...]:
        return tuple(self.raw.values())

    def of_kind(self, kind: str) -> list[Mapping[str, Any]]:
        return [raw for raw in self.reports if raw.get("kind") == kind]

    @cached_property
    def figures(self) -> tuple[Figure, ...]:
        return tuple(figure for raw in self.reports for figure in figures_of(raw))

    def figure(self, name: str) -> Figure | None:
        """The first figure with this word, as a gate has it, or name; None if it was not measured."""
        known = (f for f in self.figures if name in (f.figure, f.name) and f.compressed is not None)
        return next(known, None)

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        return layers.read(self.store.artifact(self.key))

    @cached_property
    def usage(self) -> dict[int, tuple[float, ...]]:
        return usage.of_experts(self.store, self.lineage)

    @cached_property
    def sources(self) -> dict[str, dict[str, str]]:
        """Of each source its files with their pins."""
        return pins(self.lineage.values())

    @cached_property
    def model(self) -> str:
        """The address of the model that it was made from; "" if there is none, or more than what is told."""
        told = self.record.get("model")
        if isinstance(told, Mapping) and told.get("uri"):
            return str(told["uri"])
        return model_among(self.sources)

    @property
    def model_name(self) -> str:
        """The model that it was made from, as people call it: org/name on the hub, or its folder."""
        hub = HUB.match(self.model)
        return hub["name"] if hub else self.model.partition("?")[0]

    @property
    def licence(self) -> tuple[str, str]:
        """The licence that the source says, and the file with its text that travels along; "" for what there is not."""
        told = self.record.get("model")
        word = told.get("license", "") if isinstance(told, Mapping) else ""
        file = next((name for name in sorted(self.manifest.files) if LICENCES.fullmatch(name)), "")
        return (word if isinstance(word, str) else ", ".join(word)), file

    @property
    def command(self) -> list[str]:
        """The words of the command that made it; empty if its record does not say."""
        pipeline, given = self.record.get("pipeline"), [str(word) for word in self.record.get("given") or ()]
        if not pipeline:
            return []
        gate = [w for bound in self.record.get("gate") or () for w in ("--gate", str(bound))]
        if str(pipeline) == "fit" or str(pipeline).endswith("moeflow/methods/recipes/fitted.py"):
            model = next((w.partition("=")[2] for w in given if w.startswith("model=")), "MODEL")
            return ["moeflow", "fit", model, *(w for g in given if not g.startswith("model=") for w in ("-p", g)), *gate]
        return ["moeflow", "run", str(pipeline), *(w for g in given for w in ("-p", g)), *gate]


def of(store: Store, ref: str) -> About:
    """The version, or the artifact, that `ref` means; for a key the newest version that published it.

    Raises NotStored, and ValueError if it could mean several.
    """
    target = versions.resolve(store, ref)
    if isinstance(target, Version):
        (known,) = (v for v in versions.list(store, target.name) if v.n == target.n)
        return About(store, target.key, known)
    published = [v for v in versions.list(store) if v.key == target]
    return About(store, target, max(published, key=lambda v: v.created, default=None))
