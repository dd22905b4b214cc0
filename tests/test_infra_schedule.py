"""The files that compress on a schedule are ones that KubeRay, Kubernetes and AWS would take, and their commands are ours."""

import copy
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator
from moto import mock_aws
from typer.testing import CliRunner

from moeflow.cli import app
from moeflow.report.gate import read_gate
from moeflow.run import pipeline
from tests import kubernetes

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
JOB = [*yaml.safe_load_all((INFRA / "rayjob.yaml").read_text())][1]
CRON = yaml.safe_load((INFRA / "raycronjob.yaml").read_text())
HOURLY = yaml.safe_load((INFRA / "cronjob.yaml").read_text())
CLUSTER = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
SCHEDULE = json.loads((INFRA / "eventbridge-schedule.json").read_text())
SENT = json.loads(SCHEDULE["Target"]["Input"])
(POD,) = HOURLY["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]

COMMANDS = {
    "raycronjob": shlex.split(CRON["spec"]["jobTemplate"]["entrypoint"]),
    "cronjob": [*POD["command"], *POD["args"]],
    "eventbridge": shlex.split(SENT["Parameters"]["commands"][0]),
}


def test_the_cron_jobs_are_ones_that_kuberay_and_kubernetes_accept() -> None:
    assert [kubernetes.problems(document) for document in (CRON, HOURLY)] == [[], []]


@pytest.mark.parametrize("document", [CRON, HOURLY], ids=["raycronjob", "cronjob"])
@pytest.mark.parametrize("at", ["spec", "spec.jobTemplate"])
def test_a_field_that_would_be_dropped_without_a_word_is_found(document: dict[str, Any], at: str) -> None:
    changed = copy.deepcopy(document)
    node = changed
    for name in at.split("."):
        node = node[name]
    node["successfulJobHistoryLimit"] = 1
    assert any("successfulJobHistoryLimit" in line for line in kubernetes.problems(changed))


def test_the_nightly_cluster_is_that_of_a_single_job_and_starts_with_a_head_alone() -> None:
    assert CRON["spec"]["jobTemplate"]["rayClusterSpec"] == JOB["spec"]["rayClusterSpec"]
    workers = CRON["spec"]["jobTemplate"]["rayClusterSpec"]["workerGroupSpecs"]
    assert all(group["minReplicas"] == group["replicas"] == 0 for group in workers)
    assert CRON["spec"]["jobTemplate"]["backoffLimit"] == HOURLY["spec"]["jobTemplate"]["spec"]["backoffLimit"] == 0
    assert CRON["spec"]["jobTemplate"]["shutdownAfterJobFinishes"] is True
    assert HOURLY["spec"]["concurrencyPolicy"] == "Forbid"


@pytest.mark.parametrize("where", COMMANDS)
def test_each_file_calls_recompress_with_words_that_it_knows(where: str) -> None:
    words = COMMANDS[where]
    ours = words[words.index("moeflow", words.index("--") if "--" in words else 0) + 1 :]
    root = "/home/ray/moeflow" if where == "eventbridge" else "/moeflow"
    here = [re.sub(rf"(?<![\w/]){root}/", f"{ROOT}/", word) for word in ours]
    here = [re.sub("s3://bucket/finetunes", "absent", word) for word in here]
    (gate,) = (word.removeprefix("--gate=") for word in here if word.endswith("gate.yaml"))
    assert len(read_gate([gate])) == 3 and callable(pipeline.load(Path(here[1])))
    # Ray hands the words to a shell, which would take "<" for a redirection: bounds stand in a file
    assert not any(set("<>|;&$*?()'\"") & {*word} for word in ours)
    here = [re.sub("s3://bucket/prefix", "s3://", word) for word in here]
    result = CliRunner().invoke(app, here, catch_exceptions=False)
    assert result.exit_code == 2 and "names no bucket" in result.output, (
        "the words were read, and the store's address was looked at"
    )


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with mock_aws():
        yield


@pytest.mark.slow
def test_the_schedule_is_one_that_eventbridge_takes_and_its_command_one_that_systems_manager_takes(aws: None) -> None:
    session = get_session()
    for service, name, asked in (("scheduler", "CreateSchedule", SCHEDULE), ("ssm", "SendCommand", SENT)):
        shape = session.create_client(service, region_name="us-east-1").meta.service_model.operation_model(name).input_shape
        assert not ParamValidator().validate(asked, shape).has_errors()
    client = boto3.client("scheduler", region_name=CLUSTER["provider"]["region"])
    client.create_schedule(**SCHEDULE)
    assert client.get_schedule(Name=SCHEDULE["Name"])["Target"]["Arn"] == "arn:aws:scheduler:::aws-sdk:ssm:sendCommand"
    assert {t["Key"]: t["Values"] for t in SENT["Targets"]} == {
        "tag:ray-cluster-name": [CLUSTER["cluster_name"]], "tag:ray-node-type": ["head"],
    }  # fmt: skip
    assert COMMANDS["eventbridge"][:2] == ["docker", "exec"] and CLUSTER["docker"]["container_name"] in COMMANDS["eventbridge"]


def test_its_role_may_do_that_on_the_head_alone_and_only_the_scheduler_takes_it() -> None:
    statements = json.loads((INFRA / "eventbridge-policy.json").read_text())["Statement"]
    assert {action for s in statements for action in s["Action"]} == {"ssm:SendCommand"}
    (document,) = (s["Resource"] for s in statements if "document/" in s["Resource"])
    assert document.endswith(f"document/{SENT['DocumentName']}")
    (head,) = (s["Condition"]["StringEquals"] for s in statements if "Condition" in s)
    assert head == {"ssm:resourceTag/ray-cluster-name": CLUSTER["cluster_name"], "ssm:resourceTag/ray-node-type": "head"}
    (trust,) = json.loads((INFRA / "eventbridge-trust.json").read_text())["Statement"]
    assert trust["Principal"] == {"Service": "scheduler.amazonaws.com"} and "aws:SourceAccount" in str(trust["Condition"])
    assert SCHEDULE["Target"]["RoleArn"].split("::")[1].split(":")[0] == trust["Condition"]["StringEquals"]["aws:SourceAccount"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eventbridge-policy.json", "eventbridge-trust.json", "finetunes-policy.json"])
def test_a_policy_has_only_what_policies_have_and_allows_no_wildcard(name: str, aws: None) -> None:
    document = json.loads((INFRA / name).read_text())
    assert document.keys() == {"Version", "Statement"} and document["Version"] == "2012-10-17"
    for statement in document["Statement"]:
        assert statement.keys() <= {"Sid", "Effect", "Action", "Resource", "Condition", "Principal"}
        assert statement["Effect"] == "Allow" and "*" not in str(statement["Action"])
    iam = boto3.client("iam", region_name="us-east-1")
    trust = (INFRA / ("eventbridge-trust.json")).read_text()
    iam.create_role(RoleName="role", AssumeRolePolicyDocument=trust)
    if "trust" not in name:
        iam.put_role_policy(RoleName="role", PolicyName="one", PolicyDocument=json.dumps(document))
