"""A pipeline for tests of tracking: a fine-tuning's course, and a report with figures."""

import json
import time
from pathlib import Path

from moeflow.cli import main
from moeflow.step import Artifact, Context, Step, step
from tests.report.reporting import reported


@step("finetune.train", version=1)
def train(context: Context, *, steps: int, until: str = "") -> None:
    """Its losses are reported as they come; with `until` it goes on behind the first when that file is there."""
    losses = []
    for n in range(steps):
        losses.append(4.0 - n)
        context.scalars(n + 1, {"loss": losses[-1]})
        for _ in range(600 if until else 0):
            if Path(until).exists():
                break
            time.sleep(0.1)
        else:
            assert not until, f"nobody has seen the loss of step {n + 1} within a minute"
    validations = [{"steps": steps, "losses": {"prose": 2.5}, "mean": 2.5}]
    course = {"losses": losses, "rates": [1e-4] * steps, "speeds": [10.0] * steps, "validations": validations}
    (context.out / "training.json").write_text(json.dumps(course))


@step("toy.tuned", version=1)
def tuned(context: Context, trained: Artifact) -> None:
    (context.out / "n").write_text(str(len(json.loads(trained.file("training.json").read_text())["losses"])))


def build(*, steps: int = 3, until: str = "") -> Step:
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
    return tuned(train(steps=steps, until=until)).reporting(report)


if __name__ == "__main__":
    main(build)
