"""Whether Kubernetes and KubeRay would take a document, by their own schemas in tests/schemas."""

import gzip
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft4Validator

SCHEMAS = Path(__file__).parent / "schemas"
DEFINITIONS = {
    ("v1", "ServiceAccount"): "io.k8s.api.core.v1.ServiceAccount",
    ("v1", "PodTemplate"): "io.k8s.api.core.v1.PodTemplate",
    ("batch/v1", "Job"): "io.k8s.api.batch.v1.Job",
    ("batch/v1", "CronJob"): "io.k8s.api.batch.v1.CronJob",
}
RESOURCES = {
    ("ray.io/v1", "RayJob"): "ray.io_rayjobs.yaml.gz",
    ("ray.io/v1", "RayCronJob"): "ray.io_raycronjobs.yaml.gz",
}


def problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with a document, a line each: unknown fields too, which a server drops without a word."""
    kind = document["apiVersion"], document["kind"]
    schema = of_kuberay(RESOURCES[kind]) if kind in RESOURCES else kubernetes(DEFINITIONS[kind])
    found = [*_errors(schema, document)]
    for where, template in _templates(document):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        found += [f"{where}: {line}" for line in _errors(kubernetes(DEFINITIONS["v1", "PodTemplate"]), pod)]
    return found


@cache
def kubernetes(name: str) -> dict[str, Any]:
    definitions = json.loads(gzip.decompress((SCHEMAS / "kubernetes.json.gz").read_bytes()))["definitions"]
    return {"$ref": f"#/definitions/{name}", "definitions": closed(definitions)}


@cache
def of_kuberay(file: str) -> dict[str, Any]:
    """KubeRay's schema of a resource; its metadata are Kubernetes' own."""
    resource = yaml.load(gzip.decompress((SCHEMAS / file).read_bytes()), yaml.CSafeLoader)
    (version,) = (v for v in resource["spec"]["versions"] if v["name"] == "v1" and v["served"])
    schema: dict[str, Any] = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return schema


def closed(schema: Any) -> Any:
    """The same schema, in which an object has the fields that it names and no others, unless it says that it keeps unknown ones."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string") or schema.get("format") == "int-or-string":
        return {"type": ["integer", "string"]}
    made = {name: closed(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def _errors(schema: dict[str, Any], document: Any) -> Iterator[str]:
    for error in Draft4Validator(schema).iter_errors(document):
        yield f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}"


def _templates(node: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every pod template in a document, with where it stands."""
    for name, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        here = f"{at}.{name}".lstrip(".")
        if isinstance(value, dict) and "containers" in value.get("spec", {}):
            yield here, value
        yield from _templates(value, here)
