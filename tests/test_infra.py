"""The files that start a cluster are ones that Ray, Kubernetes, EC2 and S3 would take."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import ray.autoscaler
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator
from moto import mock_aws
from ray.autoscaler._private import util
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

import moeflow
from moeflow.store import Store, s3
from tests import kubernetes, servers

ROOT = Path(__file__).parents[1]
CLUSTER = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
ACCOUNT, JOB = yaml.safe_load_all((ROOT / "infra" / "rayjob.yaml").read_text())
DOCKERFILE = (ROOT / "infra" / "Dockerfile").read_text()
VERSION = moeflow.__version__


def policy(name: str) -> list[dict[str, Any]]:
    statements: list[dict[str, Any]] = json.loads((ROOT / "infra" / name).read_text())["Statement"]
    return statements


def allowed(name: str) -> set[str]:
    return {action for statement in policy(name) for action in statement["Action"]}


def values(node: Any, name: str) -> Iterator[Any]:
    """Every value of a field of this name, wherever it stands."""
    if isinstance(node, dict):
        for field, value in node.items():
            yield from [value] if field == name else values(value, name)
    elif isinstance(node, list):
        for one in node:
            yield from values(one, name)


# The cluster file


def test_the_cluster_file_is_one_that_ray_accepts() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(CLUSTER, schema)
    util.validate_config(util.prepare_config(copy.deepcopy(CLUSTER)))
    assert CLUSTER["available_node_types"] and not any(w in str(CLUSTER).lower() for w in ("mixtral", "prune", "calibrate"))


def test_its_nodes_are_ones_that_ec2_accepts() -> None:
    operation = get_session().create_client("ec2", region_name="us-east-1").meta.service_model.operation_model("RunInstances")
    for kind in CLUSTER["available_node_types"].values():
        asked = kind["node_config"] | {"MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(asked, operation.input_shape).has_errors()
        assert asked["ImageId"], "without one Ray takes an image of 2022, which has no driver for these GPUs"


def test_what_is_downloaded_lies_on_the_disk_that_is_mounted() -> None:
    run = CLUSTER["docker"]["run_options"]
    (outside, inside), *_ = (word.removeprefix("--volume=").split(":") for word in run if word.startswith("--volume="))
    caches = dict(word.removeprefix("--env=").split("=", 1) for word in run if word.startswith("--env="))
    assert any(outside in command for command in CLUSTER["initialization_commands"])
    for name in ("MOEFLOW_CACHE", "HF_HOME", "TORCH_EXTENSIONS_DIR"):
        assert caches[name].startswith(f"{inside}/") and f"{name}={inside}/" in DOCKERFILE


def test_every_node_asks_for_the_token() -> None:
    assert "--env=RAY_AUTH_MODE=token" in CLUSTER["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in CLUSTER["file_mounts"]
    assert JOB["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """EC2 as moto has it; the actions that were asked for, as IAM calls them."""
    asked: set[str] = set()
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with mock_aws():
        boto3.setup_default_session()
        session = boto3.DEFAULT_SESSION
        assert session is not None
        session.events.register("before-call.ec2", lambda model, **_: asked.add(f"ec2:{model.name}"))
        yield asked


def test_the_heads_role_may_do_what_ray_does_to_start_and_stop_nodes(ec2: set[str]) -> None:
    region = CLUSTER["provider"]["region"]
    subnet = boto3.client("ec2", region_name=region).describe_subnets()["Subnets"][0]["SubnetId"]
    profile = CLUSTER["available_node_types"]["gpu"]["node_config"]["IamInstanceProfile"]["Name"]
    iam = boto3.client("iam")
    iam.create_role(RoleName=profile, AssumeRolePolicyDocument=(ROOT / "infra" / "ec2-trust.json").read_text())
    iam.create_instance_profile(InstanceProfileName=profile)
    iam.add_role_to_instance_profile(InstanceProfileName=profile, RoleName=profile)
    ec2.clear()
    provider = AWSNodeProvider(CLUSTER["provider"] | {"region": region}, CLUSTER["cluster_name"])
    config = CLUSTER["available_node_types"]["gpu"]["node_config"] | {"SubnetIds": [subnet]}
    provider.create_node(config, {"ray-node-kind": "worker"}, 1)
    (node,) = provider.non_terminated_nodes({})
    provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
    provider.internal_ip(node)
    provider.terminate_nodes([node])
    assert ec2 >= {"ec2:RunInstances", "ec2:CreateTags", "ec2:DescribeInstances", "ec2:TerminateInstances"}
    assert ec2 <= allowed("head-policy.json")


def test_the_heads_role_may_give_the_workers_theirs_and_is_another() -> None:
    kinds = CLUSTER["available_node_types"]
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in kinds.items()}
    head = profiles.pop(CLUSTER["head_node_type"])
    (passed,) = (s for s in policy("head-policy.json") if "iam:PassRole" in s["Action"])
    for worker in profiles.values():
        assert passed["Resource"].endswith(f":role/{worker}") and worker != head, "else every worker could start more"
    tagged = [c["StringEquals"]["ec2:ResourceTag/ray-cluster-name"] for c in values(policy("head-policy.json"), "Condition")
              if "ec2:ResourceTag/ray-cluster-name" in c["StringEquals"]]  # fmt: skip
    assert tagged == [CLUSTER["cluster_name"]]
    if any(kind["node_config"]["ImageId"].startswith("resolve:ssm:") for kind in kinds.values()):
        assert "ssm:GetParameters" in allowed("head-policy.json")


# The Kubernetes job and the image


def test_the_kubernetes_files_are_ones_that_kuberay_and_kubernetes_accept() -> None:
    assert [kubernetes.problems(document) for document in (ACCOUNT, JOB)] == [[], []]


@pytest.mark.parametrize(
    "path",
    [
        "",
        "rayClusterSpec",
        "rayClusterSpec.autoscalerOptions",
        "rayClusterSpec.authOptions",
        "rayClusterSpec.workerGroupSpecs.0",
        "rayClusterSpec.headGroupSpec.template.spec.containers.0",
        "rayClusterSpec.workerGroupSpecs.0.template.spec.volumes.0.ephemeral",
    ],
)
def test_a_field_that_the_operator_would_drop_without_a_word_is_found(path: str) -> None:
    job = copy.deepcopy(JOB)
    node = job["spec"]
    for name in filter(None, path.split(".")):
        node = node[int(name)] if name.isdigit() else node[name]
    node["enableAutoscaling"] = True
    assert any("enableAutoscaling" in line for line in kubernetes.problems(job))


def test_the_kubernetes_job_grows_ends_and_is_cleaned_up() -> None:
    spec = JOB["spec"]
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0, "KubeRay takes a ttl only with it"
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] < group["maxReplicas"]


def test_every_pod_runs_as_a_user_without_root_and_has_a_volume_where_the_image_keeps_its_cache() -> None:
    cluster = JOB["spec"]["rayClusterSpec"]
    (cache,) = set(re.findall(r"MOEFLOW_CACHE=(/\w+)/", DOCKERFILE))
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.M)[-1:] == ["1000"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] == ACCOUNT["metadata"]["name"]
        assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000}
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounts[cache] in {volume["name"] for volume in pod["volumes"]}


def test_the_kubernetes_job_runs_a_pipeline_of_the_image_on_the_ray_that_is_pinned() -> None:
    script = Path(JOB["spec"]["entrypoint"].split()[1])
    (workdir,) = re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, re.M)
    inside = script.relative_to(workdir)
    assert (ROOT / inside).is_file() and inside.parts[0] in copied()
    pins = (ROOT / "constraints.txt").read_text().split()
    assert f"ray=={JOB['spec']['rayClusterSpec']['rayVersion']}" in pins
    assert any(f"ray=={tag}" in pins for tag in re.findall(r":([\d.]+)-", CLUSTER["docker"]["image"]))


def test_no_image_has_a_floating_tag() -> None:
    images = [*values(JOB, "image"), *values(CLUSTER, "image"), *re.findall(r"^FROM (\S+)", DOCKERFILE, re.M)]
    assert len(images) == 4
    for image in images:
        assert re.search(r":\d+\.\d+\.\d+[\w.-]*$|@sha256:[0-9a-f]{64}$", image), image
    assert {image.rpartition(":")[2] for image in values(JOB, "image")} == {VERSION}


def copied() -> set[str]:
    """The files and folders of the tree that the image gets."""
    return {name for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.M) for name in line.split()[:-1]}


def test_docker_is_sent_what_the_image_copies_and_nothing_else() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*", "all is left out that is not named"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == copied()
    assert all((ROOT / name).exists() for name in copied())
    assert all(ignored in rules for ignored in ("**/__pycache__", "**/*.pyc"))


# The bucket

NEEDS = {
    "HeadBucket": "s3:ListBucket", "ListObjectsV2": "s3:ListBucket", "ListObjectVersions": "s3:ListBucketVersions",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads", "HeadObject": "s3:GetObject", "GetObject": "s3:GetObject",
    "PutObject": "s3:PutObject", "CopyObject": "s3:PutObject", "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject", "UploadPartCopy": "s3:PutObject", "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject", "DeleteObjects": "s3:DeleteObject",
}  # fmt: skip
"""What S3 wants to be allowed for each operation."""


def test_the_bucket_policy_allows_what_the_store_does(server: servers.Proxy, bucket: str, tmp_path: Path) -> None:
    client, asked = s3.client(server.url), set()
    client.meta.events.register("before-call.s3", lambda model, **_: asked.add(model.name))
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    asked.clear()
    store = Store.open(f"s3://{bucket}/prefix?endpoint={server.url}")
    store.check()
    blobs, large = store.blobs, tmp_path / "large"
    large.write_bytes(bytes((64 << 20) + 1))
    blobs.upload(large, "blobs/large")
    blobs.download("blobs/large", tmp_path / "again")
    blobs.create("blobs/one", b"1")
    blobs.touch("blobs/one")
    blobs.sweep(0)
    blobs.delete([entry.name for entry in blobs.list("")])
    assert asked >= {"HeadBucket", "ListObjectsV2", "GetObject", "PutObject", "CreateMultipartUpload", "ListMultipartUploads"}
    assert {NEEDS[name] for name in asked} <= allowed("bucket-policy.json")


def test_the_bucket_policy_is_for_one_prefix_and_one_key() -> None:
    objects = [s for s in policy("bucket-policy.json") if any(a.endswith(("Object", "ObjectVersion")) for a in s["Action"])]
    assert [s["Resource"] for s in objects] == ["arn:aws:s3:::bucket/prefix/*"]
    (listing,) = (s for s in policy("bucket-policy.json") if "s3:ListBucket" in s["Action"])
    assert listing["Condition"] == {"StringLikeIfExists": {"s3:prefix": ["prefix", "prefix/*"]}}
    (key,) = (s for s in policy("bucket-policy.json") if "kms:Decrypt" in s["Action"])
    assert "kms:GenerateDataKey" in key["Action"] and key["Resource"].startswith("arn:aws:kms:")


@pytest.mark.parametrize("name", ["bucket-policy.json", "head-policy.json", "ec2-trust.json"])
def test_a_policy_has_only_what_policies_have_and_allows_no_wildcard(name: str) -> None:
    document = json.loads((ROOT / "infra" / name).read_text())
    assert document.keys() == {"Version", "Statement"} and document["Version"] == "2012-10-17"
    for statement in document["Statement"]:
        assert statement.keys() <= {"Sid", "Effect", "Action", "Resource", "Condition", "Principal"}
        assert statement["Effect"] == "Allow" and "*" not in str(statement["Action"])
        assert re.fullmatch(r"\w*", statement.get("Sid", "")), "IAM takes letters and digits"


def test_the_lifecycle_is_one_that_s3_accepts_and_spares_what_is_current(server: servers.Proxy, bucket: str) -> None:
    rules = json.loads((ROOT / "infra" / "bucket-lifecycle.json").read_text())
    s3.client(server.url).put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=rules)
    for rule in rules["Rules"]:
        assert rule["Filter"] == {"Prefix": "prefix/"}
        assert not rule.keys() & {"Expiration", "Transitions", "NoncurrentVersionTransitions"}, "results are used for years"
