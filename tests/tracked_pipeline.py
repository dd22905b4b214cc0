"""A pipeline for tests of tracking: a fine-tuning's course, and a report with figures."""

import json

from moeflow.cli import main
from moeflow.step import Artifact, Context, Step, step
from tests.report.reporting import reported


@step("finetune.train", version=1)
def train(context: Context, *, steps: int) -> None:
    losses = [4.0 - n for n in range(steps)]
    validations = [{"steps": steps, "losses": {"prose": 2.5}, "mean": 2.5}]
    course = {"losses": losses, "rates": [1e-4] * steps, "speeds": [10.0] * steps, "validations": validations}
    (context.out / "training.json").write_text(json.dumps(course))


@step("toy.tuned", version=1)
def tuned(context: Context, trained: Artifact) -> None:
    (context.out / "n").write_text(str(len(json.loads(trained.file("training.json").read_text())["losses"])))


def build(*, steps: int = 3) -> Step:
    rows = [
        {
            "name": "KL to the original (prose)",
            "figure": "kl",
            "text": "prose",
            "original": 0.0,
            "compressed": 0.25,
            "unit": "nats",
        },
        {"name": "bytes", "figure": "bytes", "original": 2048, "compressed": 1024, "unit": "B"},
    ]
    report = reported(report={"kind": "quality", "columns": ["original", "compressed"], "rows": rows, "notes": []})
    return tuned(train(steps=steps)).reporting(report)


if __name__ == "__main__":
    main(build)
