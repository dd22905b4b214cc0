"""What a run says while it works, on a terminal and elsewhere."""

import io
import subprocess
import sys

import pytest

from moeflow.run.outcome import Outcome, StepOutcome
from moeflow.run.progress import Bars, Lines, Silent, show
from moeflow.run.words import amount, clock, labels
from tests.run import toy


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_plain_lines_say_step_amount_and_time() -> None:
    stream, time = io.StringIO(), Clock()
    steps = [toy.count(to=to) for to in range(12)]
    lines = Lines(stream, clock=time)
    lines.begin(steps, 12, 0)
    for step in steps[:2]:
        lines.start(step.key)
        lines.finish(step.key)
    lines.start(steps[2].key)
    time.now = 12.4
    lines.progress(steps[2].key, 4096, 8192, "tokens")
    lines.finish(steps[2].key)
    assert lines_of(stream)[0] == "12 steps: 12 to do, 0 stored"
    assert lines_of(stream)[-2:] == ["[ 3/12] toy.count to 2  4,096/8,192 tokens  00:12", "[ 3/12] toy.count to 2  done  00:12"]


def test_a_step_that_tells_details_is_shown_with_them_and_the_time_left() -> None:
    stream, time = io.StringIO(), Clock()
    step = toy.count(to=1)
    lines = Lines(stream, clock=time)
    lines.begin([step], 1, 0)
    lines.start(step.key)
    for time.now, done in ((10.0, 4000), (70.0, 7000)):  # it goes on from 4,000
        lines.progress(step.key, done, 10_000, "tokens", "loss 3.214  50 tokens/s")
    assert lines_of(stream)[-2] == "[1/1] toy.count  4,000/10,000 tokens  loss 3.214  50 tokens/s  00:10"
    assert lines_of(stream)[-1] == "[1/1] toy.count  7,000/10,000 tokens  loss 3.214  50 tokens/s  01:10  01:00 left"


def test_plain_lines_are_few() -> None:
    stream, time = io.StringIO(), Clock()
    step = toy.count(to=1000)
    lines = Lines(stream, clock=time, quiet=5)
    lines.begin([step], 1, 0)
    lines.start(step.key)
    for n in range(1000):
        time.now += 0.1
        lines.progress(step.key, n, 1000, "numbers")
    assert len(lines_of(stream)) <= 1 + 100 / 5


def test_a_step_that_starts_again_keeps_its_number() -> None:
    stream = io.StringIO()
    step = toy.count(to=1)
    lines = Lines(stream)
    lines.begin([step], 1, 0)
    lines.start(step.key)
    lines.start(step.key)
    lines.finish(step.key)
    assert lines_of(stream)[-1].startswith("[1/1] toy.count")


def test_the_last_line_sums_up() -> None:
    stream = io.StringIO()
    steps = [StepOutcome(str(n), "toy.count", "run" if n < 10 else "stored") for n in range(12)]
    Lines(stream).end(Outcome(tuple(steps), 34.12))
    assert lines_of(stream) == ["12 steps: 10 run, 2 stored, 34.1 s"]


def test_bars_show_steps_and_the_running_step_in_its_unit() -> None:
    stream = Terminal()
    steps = [toy.count(to=to) for to in (1, 2)]
    bars = Bars(stream)
    bars.begin(steps, 2, 5)
    bars.start(steps[0].key)
    bars.progress(steps[0].key, 4096, 8192, "tokens", "loss 3.2")
    bars.note(steps[0].key, "one expert was never chosen")
    bars.refresh()
    bars.finish(steps[0].key)
    bars.taken([steps[1].key])
    bars.end(Outcome((), 1.0))
    text = stream.getvalue()
    assert "toy.count to 1" in text and "4,096/8,192 tokens" in text and "5 stored" in text and "loss 3.2" in text
    assert "one expert was never chosen" in text
    assert "0 steps: 0 run, 0 stored, 1.0 s" in text


def test_json_output_is_not_disturbed_but_warnings_are_told() -> None:
    stream = io.StringIO()
    silent = Silent(stream)
    silent.begin([], 0, 0)
    silent.start("toy.count-1")
    silent.progress("toy.count-1", 1, 2, "tokens", "loss 3.2")
    silent.finish("toy.count-1")
    silent.taken(["toy.count-2"])
    silent.end(None)
    assert lines_of(stream) == []
    silent.say("warning: this")
    silent.note("toy.count-1", "that")
    assert lines_of(stream) == ["warning: this", "toy.count: that"]


def test_the_stream_decides_how_progress_looks() -> None:
    assert isinstance(show(stream=Terminal()), Bars)
    assert isinstance(show(stream=io.StringIO()), Lines)
    assert isinstance(show(json=True, stream=Terminal()), Silent)


def test_labels_name_what_steps_differ_in() -> None:
    shards = [toy.shards(values=[0, 1, 2, 3]), toy.shards(values=[4, 5, 6, 7]), toy.shards(values=[8])]
    others = [toy.number(n=1), toy.number(n=2), toy.half(toy.number(n=1))]
    names = labels([*shards, *others])
    assert [names[s.key] for s in shards] == ["toy.shards values 0-3", "toy.shards values 4-7", "toy.shards values 8"]
    assert [names[s.key] for s in others] == ["toy.number n 1", "toy.number n 2", "toy.half"]


def test_amounts_and_times_are_for_people() -> None:
    assert amount(1, 0, "layers") == "1 layers"
    assert amount(3 << 20, 3 << 30, "bytes") == "3.0 MiB/3.0 GiB"
    assert (clock(0), clock(72), clock(3723)) == ("00:00", "01:12", "1:02:03")


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_terminal_would_obey_is_written_out(terminal: bool) -> None:
    stream = Terminal() if terminal else io.StringIO()
    shown = show(stream=stream)
    shown.note("make.it-0", "from \x1b[2J\x07 here")
    assert r"from \x1b[2J\x07 here" in stream.getvalue() and "\x1b[2J" not in stream.getvalue()


def test_libraries_draw_no_bars_of_theirs_where_steps_run() -> None:
    """Whatever they draw them with: tqdm itself, the hub's and datasets' own, transformers'."""
    code = (
        "import moeflow.run, tqdm\n"
        "from transformers.utils import logging\n"
        "from huggingface_hub.utils import tqdm as hub\n"
        "from datasets.utils import tqdm as datasets\n"
        "for bar in (tqdm.tqdm, tqdm.trange, logging.tqdm, hub, datasets):\n"
        "    list(bar(3 if bar is tqdm.trange else range(3)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "it/s" not in done.stderr and "%|" not in done.stderr, done.stderr
