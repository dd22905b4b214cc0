"""A pipeline for tests of what is told of a version: a model with fewer experts, judged on text, with a given speed and writing."""

from moeflow.cli import main
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.evaluate.steps import quality, size
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import naee
from moeflow.sources import Source, Texts
from moeflow.step import Step
from tests.report.reporting import report, reported

MARKUP = "<script>alert('a & b')</script>"
SPEED = (
    ("prefill", 100.0, 130.0, "tokens/s"),
    ("prefill, lower quartile", 90.0, 120.0, "tokens/s"),
    ("prefill, upper quartile", 110.0, 140.0, "tokens/s"),
)

SCORE = {"name": "numbers, exact_match", "figure": "numbers", "unit": "", "original": 0.8, "compressed": 0.6, "better": "higher"}
PAIRED = {"interval": [0.5, 0.7], "change_interval": [-0.3, -0.1], "chance": 0.25, "items": 40, "wins": 1, "losses": 9}
TASKS = {"kind": "tasks", "columns": ["original", "compressed"], "rows": [SCORE | PAIRED], "notes": []}
PROMPTS = {"kind": "prompts", "rows": [], "written": [{"original": f"first {n}", "compressed": f"second {n}"} for n in range(30)]}


def build(
    model: Source, *, tokens: Texts, keep: int = 6, search: Search = Search("frequency", seed=3), prompt: str = MARKUP
) -> Step:
    original, passed = checkpoint.pinned(model), Pass(batch=4, shard=8, stage=3)
    matrix = data.tokens(tokens, original, Sample(8, 16))
    pruned = naee.prune(calibrate.run(original, matrix, passed), keep, search)
    states = (calibrate.hidden_states(m, matrix, passed) for m in (original, pruned))
    judged = quality(original.rest, pruned.rest, matrix, *states, name="prose | notes", note="", dtype="float32")
    counted = size(checkpoint.counted(original), checkpoint.counted(pruned), zeros=[])
    writes = reported(report={"kind": "written", "rows": [], "prompt": prompt, "original": " and so on", "compressed": "```\nno"})
    more = (reported(report=one) for one in (TASKS, PROMPTS))
    return checkpoint.checkpoint_of(pruned).reporting(counted, judged, report("speed", *SPEED), writes, *more)


if __name__ == "__main__":
    main(build)
