"""recipe.yaml, which travels with a checkpoint and makes it again: `moeflow run recipe.yaml` (`moeflow.run.recipe` reads it)."""

from typing import Any

import yaml

from moeflow.report.about import About
from moeflow.report.lineage import libraries

FILE = "recipe.yaml"
HEAD = """\
# What made this checkpoint. The same again, under the same key, where its sources are what they were: moeflow run recipe.yaml
# Another of its kind: moeflow run recipe.yaml -p NAME=VALUE. All parameters are here, also those that were left at their defaults;
# what stands below them, but for the key, is there to say what differs if another key comes out.
"""


def text(about: About) -> str:
    """The recipe of a version; "" if it has no record of how it was asked for.

    Of versions that were made before a record had every parameter, it has those that were given.
    """
    record = about.record
    if not record.get("pipeline"):
        return ""
    given = dict(str(word).partition("=")[::2] for word in record.get("given") or ())
    parameters = {name: _value(word) for name, word in (record.get("parameters") or given).items()}
    seeds = {name: value for name, value in parameters.items() if name.rpartition(".")[2] == "seed"}
    made: dict[str, Any] = {
        "name": about.version.name if about.version else "",
        "pipeline": record["pipeline"],
        "directory": record.get("directory", ""),
        "pipeline_sha256": record.get("pipeline_sha256", ""),
        "engine": record.get("engine", ""),
        "parameters": parameters,
        "seeds": seeds,
        "key": about.key,
        "contents": about.manifest.digest,
        "sources": [{"uri": uri, "files": files} for uri, files in about.sources.items()],
        "steps": {m.step: m.version for m in sorted(about.lineage.values(), key=lambda m: m.step)},
        "libraries": {name: ", ".join(found) for name, found in libraries(about.lineage).items()},
    }
    kept = {name: value for name, value in made.items() if value not in ("", {}, [])}
    kept.setdefault("parameters", {})
    return HEAD + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=1000)


def _value(word: str) -> Any:
    """A parameter's word as the YAML value that people write: a number or truth where that is the same word again."""
    if word in ("true", "false"):
        return word == "true"
    if word.lstrip("-").isdigit() and str(int(word)) == word:
        return int(word)
    return word
