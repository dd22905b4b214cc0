"""A recipe: what makes a version again, in one file that travels with its checkpoint. `moeflow run RECIPE.yaml` runs it.

It names the pipeline and every one of its parameters, those left at their defaults too, so that a default that changes later
changes nothing; and the key that has to come out, with the pins of the sources and the versions of the steps, so that what differs
can be told. `record` is what a version keeps for it; `moeflow.report.recipe` writes the file. Knows no model and no method.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import moeflow
from moeflow import options
from moeflow.model_files import ADAPTERS, named_like
from moeflow.run import pipeline
from moeflow.run.opening import pipeline_file, shipped
from moeflow.run.outcome import CannotRun
from moeflow.sources import Texts
from moeflow.sources.card import facts_of
from moeflow.step import Step, upstream

ENDINGS = (".yaml", ".yml")
PACKAGE = Path(moeflow.__file__).parent
ON_THE_HUB = re.compile(r"^(?:hf://(?:models|datasets)/)?([^/@#,\s]+/[^/@#,\s]+)(?:@[^/#,\s*]+)?")

FIELDS: Mapping[str, tuple[Any, str, bool]] = {
    "pipeline": (str, "the path of a pipeline", True),
    "parameters": (dict, "a mapping of names to values", True),
    "key": (str, "the key that it makes", True),
    "name": (str, "a name", False),
    "directory": (str, "a folder", False),
    "pipeline_sha256": (str, "a digest", False),
    "sources": (list, "a list", False),
    "steps": (dict, "a mapping of names to versions", False),
    "engine": (str, "what is to load it, as in vllm or vllm,tp=2", False),
}
"""What a recipe says: the type of each entry, in words, and whether it must be there."""


@dataclass(frozen=True)
class Recipe:
    """A recipe as its file says it."""

    file: Path
    pipeline: str
    """The name of one that comes with moeflow, or the pipeline's file, relative to `directory` unless absolute."""
    parameters: Mapping[str, str]
    """Every parameter as a word, as after `-p`."""
    key: str
    """The key that it made."""
    name: str = ""
    """The name that its version had."""
    directory: str = ""
    """Where it was run; relative paths among the parameters begin there, if it is still there."""
    sources: tuple[Mapping[str, Any], ...] = ()
    """Of each source its `uri`, and its `files` with their pins."""
    steps: Mapping[str, int] = field(default_factory=dict)
    """The version of each step, by name."""
    pipeline_sha256: str = ""
    """Of the pipeline's file."""
    engine: str = ""
    """What it was made for, as in vllm or vllm,tp=2; "" for no engine in particular."""

    @property
    def words(self) -> list[str]:
        return [f"{name}={word}" for name, word in self.parameters.items()]

    @property
    def place(self) -> Path:
        """The pipeline's file on this machine. Raises FileNotFoundError."""
        if self.pipeline in (known := shipped()):
            return known[self.pipeline]
        given = Path(self.pipeline)
        tried = [Path(self.directory) / given, given, self.file.parent / given]
        if "moeflow" in given.parts and given.is_absolute():  # one of the package's own, wherever that is installed
            tried.insert(0, PACKAGE.joinpath(*given.parts[len(given.parts) - given.parts[::-1].index("moeflow") :]))
        if found := next((path for path in tried if path.is_file()), None):
            return found.absolute()
        raise FileNotFoundError(
            f"{self.file}: its pipeline {self.pipeline} lies neither in {self.directory or 'this folder'} nor here; run this where "
            f"{self.pipeline} is, or change `pipeline` in {self.file.name}"
        )

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """In the folder where it was run, if that is on this machine."""
        there = Path(self.directory) if self.directory else None
        with chdir(there) if there is not None and there.is_dir() else nullcontext():
            yield

    def changed_by(self, words: Sequence[str]) -> list[str]:
        """All parameters as words, with these in place of the recipe's own."""
        given = {word.partition("=")[0] for word in words}
        names = (n for n in self.parameters if not given & {n, n.partition(".")[0]})  # options as a whole replace their fields
        return [*(f"{n}={self.parameters[n]}" for n in names), *words]

    def check(self, target: Step) -> None:
        """Raise CannotRun if the graph's key is not that of the recipe; the message says what differs."""
        if target.key == self.key:
            return
        raise CannotRun(
            f"{self.file.name} made {self.key}, and would make {target.key} now: {self._difference(target)}; "
            f"to run it all the same, give a parameter anew, as in -p {next(iter(self.words), 'NAME=VALUE')}"
        )

    def _difference(self, target: Step) -> str:
        steps = [*upstream([target])]
        now = pins(steps)
        for source in self.sources:
            uri, files = source.get("uri", ""), source.get("files") or {}
            if uri not in now:
                others = sorted({*now} - {s.get("uri") for s in self.sources})
                return f"{uri} is read no more, and {', '.join(others) or 'nothing'} instead"
            if other := next((n for n in files if now[uri].get(n) != files[n]), None):
                return f"{other} at {uri} was {files[other]} and is {now[uri].get(other, 'gone')}"
            if new := next((n for n in now[uri] if n not in files), None):
                return f"{uri} has {new} now"
        versions = {s.name: s.version for s in steps}
        for name, version in self.steps.items():
            if versions.get(name) != version:
                here = f"is version {versions[name]} here" if name in versions else "is no part of it here"
                return f"the step {name} was version {version} and {here}, in moeflow {moeflow.__version__}"
        code = hashlib.sha256(self.place.read_bytes()).hexdigest()
        if self.pipeline_sha256 and code != self.pipeline_sha256:
            return f"{self.pipeline} is another file than it was, of SHA-256 {self.pipeline_sha256[:12]}..."
        return f"a parameter in {self.file.name} was changed, or what {self.pipeline} imports"


def pins(steps: Iterable[Any]) -> dict[str, dict[str, str]]:
    """Of each source that these steps, or their manifests, bring, by its address: its files, and how each is pinned."""
    found: dict[str, dict[str, str]] = {}
    for step in steps:
        name, params = getattr(step, "step", None) or step.name, step.params
        if not name.startswith("sources."):
            continue
        files = params.get("files") or [params.get("file") or params]
        of = found.setdefault(str(params["uri"]), {})
        of |= {f["name"]: f["pin"] for f in files if isinstance(f, Mapping)}
        of |= {name: pin for name, _, pin in (f for f in files if not isinstance(f, Mapping))}
    return {uri: dict(sorted(files.items())) for uri, files in sorted(found.items())}


def model_among(sources: Mapping[str, Mapping[str, str]]) -> str:
    """The address of the model among sources with their files: what has weights that are no adapter's; "" if there is none."""
    weights = (
        (uri, [n for n in files if n.endswith(".safetensors") and not named_like(n, ADAPTERS)]) for uri, files in sources.items()
    )
    return next((uri for uri, names in weights if names), "")


@dataclass(frozen=True)
class Asked:
    """What is to be run: the graph, and what a version of it keeps of how it was asked for."""

    target: Step
    record: Callable[[], dict[str, Any]]
    name: str
    """The name of its version, unless another is given."""
    engine: str = ""
    """What a recipe says is to load it, unless another engine is given."""


def asked(file: Path, words: Sequence[str], own: pipeline.Build | None = None) -> Asked:
    """The graph of a pipeline file with these parameters, or that of a recipe with these in place of its own.

    `own`: the pipeline's `build`, if its file is running already. Raises ValueError, and CannotRun if a recipe that nothing changes
    would make another key than it says.
    """
    if not is_recipe(file):
        build = own or pipeline.load(pipeline_file(file))
        target = pipeline.call(build, words)
        return Asked(target, lambda: record(file, words, build, target), file.stem)
    recipe = read(file)
    place, every = recipe.place, recipe.changed_by(words)
    build = pipeline.load(place)
    with recipe.at_home():
        target = pipeline.call(build, every)
    if not words:
        recipe.check(target)

    def again() -> dict[str, Any]:
        with recipe.at_home():
            same = recipe.pipeline in shipped() or Path(recipe.pipeline).is_file()
            return record(Path(recipe.pipeline) if same else place, telling(build, every), build, target)

    return Asked(target, again, recipe.name or file.stem, recipe.engine)


def is_recipe(file: Path) -> bool:
    """Whether a file is a recipe by its name, and no pipeline."""
    return file.suffix in ENDINGS


def build_of(file: Path) -> pipeline.Build:
    """A pipeline's function, or that of the pipeline that a recipe names. Raises ValueError and FileNotFoundError."""
    return pipeline.load(read(file).place if is_recipe(file) else pipeline_file(file))


def read(path: Path) -> Recipe:
    """Read a recipe. Raises ValueError and FileNotFoundError, in one line, with the file and the field."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {path}; a pulled checkpoint has one, recipe.yaml")
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML ({' '.join(str(error).split())}); a recipe is what `moeflow pull` writes") from None
    for name, (kind, what, required) in FIELDS.items():
        value = raw.get(name) if isinstance(raw, dict) else None
        absent = value is None or value == ""
        if (absent and required) or not (absent or isinstance(value, kind)):
            said = "is missing" if value is None else f"is {str(value)[:60]!r}"
            raise ValueError(f"{path}: its `{name}` {said}, and must be {what}; a recipe is what `moeflow pull` writes")
    words = {str(name): word_of(value) for name, value in raw["parameters"].items()}
    about = {n: raw[n] for n in ("name", "directory", "steps", "pipeline_sha256", "engine") if raw.get(n)}
    given = tuple(s for s in raw.get("sources") or () if isinstance(s, dict))
    return Recipe(path, raw["pipeline"], words, raw["key"], sources=given, **about)


def record(file: Path, words: Sequence[str], build: pipeline.Build, target: Step) -> dict[str, Any]:
    """What a version keeps of how it was asked for: the pipeline, the parameters that were given, all parameters, where, with what.

    Of the model that it is made from also what its own card says of licence, language and base model, if it has one.
    """
    model = model_among(pins(upstream([target])))
    code = pipeline_file(file)
    return {
        "pipeline": str(file),
        "given": [*words],
        "parameters": parameters(build, words, target),
        "directory": str(Path.cwd()),
        "pipeline_sha256": hashlib.sha256(code.read_bytes()).hexdigest() if code.is_file() else "",
        "moeflow": moeflow.__version__,
        **({"model": {"uri": model, **facts_of(model)}} if model else {}),
    }


def parameters(build: pipeline.Build, words: Sequence[str], target: Step | None = None) -> dict[str, str]:
    """Every parameter of a pipeline as a word, given or not; what the graph `target` pinned on the hub has its commit's name."""
    pinned = [uri for uri in pins(upstream([target]))] if target is not None else []
    made = pipeline.flat(build, pipeline.values(build, words))
    return {name: with_commits(word_of(value), pinned) for name, value in made.items()}


def telling(build: pipeline.Build, words: Sequence[str]) -> list[str]:
    """Those of these words without which a parameter would have another value: a recipe says what is left at its default, too."""
    kept, made = [*words], pipeline.flat(build, pipeline.values(build, words))
    for word in words:
        fewer = [one for one in kept if one != word]
        with suppress(ValueError, TypeError):  # what is needed
            if pipeline.flat(build, pipeline.values(build, fewer)) == made:
                kept = fewer
    return kept


def word_of(value: Any) -> str:
    """A value as the word that `options.read` makes it of again."""
    if isinstance(value, Texts):
        return value.spec
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    if isinstance(value, tuple | list | dict):
        return json.dumps(options.plain(value))
    return repr(value) if isinstance(value, float) else str(value)


def with_commits(word: str, pinned: Iterable[str]) -> str:
    """A word with the names on the hub in it at the commits that were pinned."""
    commits = {m[1]: uri for uri in pinned if uri.startswith("hf://") and (m := ON_THE_HUB.match(uri))}

    def at_commit(part: str) -> str:
        match = ON_THE_HUB.match(part.strip())
        uri = commits.get(match[1]) if match else None
        commit = re.search(r"@([0-9a-f]{40})", uri) if uri else None
        if match is None or commit is None or Path(part).exists():
            return part
        head = match[0].partition("@")[0]
        return f"{head}@{commit[1]}{part.strip()[match.end() :]}"

    return ",".join(map(at_commit, word.split(","))) if commits else word
