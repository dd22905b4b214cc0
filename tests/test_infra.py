"""The files that start a cluster are ones that Ray, Kubernetes and S3 would take."""

import json
from pathlib import Path

import yaml
from ray.autoscaler._private import util

ROOT = Path(__file__).parents[1]


def test_the_cluster_file_is_one_that_ray_accepts() -> None:
    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    util.validate_config(util.prepare_config(config))
    assert config["available_node_types"] and not any(w in str(config).lower() for w in ("mixtral", "prune", "calibrate"))


def test_the_kubernetes_job_runs_a_pipeline_that_exists_on_the_ray_that_is_pinned() -> None:
    job = yaml.safe_load((ROOT / "infra" / "rayjob.yaml").read_text())["spec"]
    assert (ROOT / job["entrypoint"].split()[1]).is_file()
    assert f"ray=={job['rayClusterSpec']['rayVersion']}" in (ROOT / "constraints.txt").read_text().split()


def test_the_bucket_policy_allows_what_the_store_does() -> None:
    policy = json.loads((ROOT / "infra" / "bucket-policy.json").read_text())
    allowed = {action for statement in policy["Statement"] for action in statement["Action"]}
    assert {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"} <= allowed
