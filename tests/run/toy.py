"""Steps without models, whose bytes and side effects are known exactly."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moeflow.run.progress import Lines
from moeflow.step import Context, Spec, step
from moeflow.store.errors import SourceUnavailable


def log(path: str, line: str) -> None:
    """One line, whole, also when several processes write."""
    if path:
        with open(path, "a") as file:
            file.write(line + "\n")


def wait(happens: Callable[[], bool]) -> None:
    """Return as soon as that is true."""
    while not happens():
        time.sleep(0.02)


class Scalars(Lines):
    """Lines, and in `heard` the numbers that steps report, each with its place and name."""

    def scalars(self, key: str, at: int, values: Mapping[str, float]) -> None:
        self.heard = [*getattr(self, "heard", ()), *((at, name, value) for name, value in values.items())]


def sized(*inputs: int | None, size: int = 8, **_: Any) -> Spec:
    """Toy steps read their inputs whole and leave `size` bytes."""
    return Spec(output=size, reads=sum(i or 0 for i in inputs), writes=size, memory=1000)


@step("toy.number", version=1, spec=sized)
def number(context: Context, *, n: int, size: int = 8, trace: str = "") -> None:
    """`n`, in a file of `size` bytes."""
    log(trace, f"number {n}")
    (context.out / "n").write_text(str(n).rjust(size))


@step("toy.total", version=1, spec=sized)
def total(context: Context, *parts: Any, size: int = 8, trace: str = "") -> None:
    """The sum of the inputs."""
    log(trace, f"total of {len(parts)}")
    (context.out / "n").write_text(str(sum(int(p.file("n").read_text()) for p in parts)).rjust(size))


@step("toy.half", version=1, spec=sized)
def half(context: Context, part: Any, *, size: int = 8, trace: str = "") -> None:
    """The input halved and rounded down, so that different inputs have the same output."""
    log(trace, "half")
    (context.out / "n").write_text(str(int(part.file("n").read_text()) // 2).rjust(size))


@step("toy.more", version=1, spec=sized)
def more(context: Context, part: Any, *, size: int = 8) -> None:
    (context.out / "n").write_text(str(int(part.file("n").read_text()) + 1).rjust(size))


@step("toy.fail", version=1)
def fail(context: Context, *parts: Any, message: str = "no such expert", trace: str = "") -> None:
    log(trace, "fail")
    raise ArithmeticError(message)


class Sent(ArithmeticError):
    """An error that makes a file when it is sent to the driver; by then no other step may start."""

    def __reduce__(self) -> tuple[Any, ...]:
        Path(self.args[1]).touch()
        return Sent, self.args


@step("toy.fail_and_send", version=1)
def fail_and_send(context: Context, *, sent: str, trace: str) -> None:
    log(trace, "fail")
    raise Sent("no such expert", sent)


class Unpicklable(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


@step("toy.odd", version=1)
def odd(context: Context) -> None:
    raise Unpicklable("this", "that")


@step("toy.span", version=1)
def span(context: Context, *, n: int, trace: str, beside: int = 1) -> None:
    """Takes a tenth of a second, and ends only when `beside` such steps have begun."""
    log(trace, "+1")
    time.sleep(0.1)
    wait(lambda: Path(trace).read_text().count("+1") >= beside)
    log(trace, "-1")
    (context.out / "n").write_text(str(n))


@step("toy.meet", version=1)
def meet(context: Context, *, me: str, other: str, folder: str) -> None:
    """Ends only when both of two such steps run at the same time."""
    (Path(folder) / me).touch()
    wait((Path(folder) / other).exists)
    (context.out / "met").write_text(other)


@step("toy.shards", version=1)
def shards(context: Context, *, values: list[int]) -> None:
    """A file for each value, in a folder of its own."""
    for n, value in enumerate(values):
        (context.out / f"shard-{n}").mkdir()
        (context.out / f"shard-{n}" / "n").write_text(str(value))


@step("toy.read", version=1)
def read(context: Context, part: Any, *, trace: str = "") -> None:
    """Reads every file of its input."""
    log(trace, "read " + " ".join(part.names()))
    (context.out / "n").write_text("+".join(part.file(name).read_text() for name in part.names()))


@step("toy.slice", version=1)
def slice_(context: Context, part: Any, *, start: int, stop: int) -> None:
    (context.out / "n").write_bytes(part.read("n", start, stop))


@step("toy.assemble", version=1)
def assemble(context: Context, *parts: Any) -> None:
    """The inputs' files under their numbers, without moving a byte, and one file of its own."""
    for n, part in enumerate(parts):
        context.link(part, "n", f"{n}.n")
    (context.out / "index").write_text(str(len(parts)))


@step("toy.count", version=1)
def count(context: Context, *, to: int, die_at: int = 0, marker: str = "", trace: str = "") -> None:
    """Counts, keeping what it has; kills its own process once at `die_at`, unless `marker` says that it has done so."""
    kept = context.resume()
    begin = int((kept / "n").read_text()) if kept else 0
    log(trace, f"from {begin}")
    for n in range(begin + 1, to + 1):
        state = context.scratch / "state"
        state.mkdir(exist_ok=True)
        (state / "n").write_text(str(n))
        context.save(state)
        context.progress(n, to, "numbers")
        context.scalars(n, {"number": n})
        if n == die_at and marker and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), 9)
    (context.out / "n").write_text(str(to))


@step("toy.flaky", version=1)
def flaky(context: Context, *, to: int, marker: str, trace: str = "") -> None:
    """Raises once half way, having kept what it had."""
    kept = context.resume()
    begin = int((kept / "n").read_text()) if kept else 0
    log(trace, f"from {begin}")
    state = context.scratch / "state"
    state.mkdir()
    (state / "n").write_text(str(to // 2))
    context.save(state)
    if not Path(marker).exists():
        Path(marker).touch()
        raise ConnectionError("the hub went away")
    (context.out / "n").write_text(str(to))


@step("toy.threads", version=1)
def threads(context: Context, *, tag: str = "") -> None:
    """How many threads numerical libraries would use here."""
    import numpy  # noqa: F401  # loads a BLAS
    from threadpoolctl import threadpool_info

    threads = sorted({info["num_threads"] for info in threadpool_info()})
    (context.out / "n").write_text(f"{threads} {os.environ['OMP_NUM_THREADS']}")


@step("toy.talk", version=1)
def talk(context: Context, *, tokens: int) -> None:
    context.note("one expert was never chosen")
    for n in range(1, tokens + 1):
        context.progress(n, tokens, "tokens")
    (context.out / "n").write_text(str(tokens))


@step("toy.slow", version=1, spec=sized)
def slow(context: Context, *parts: Any, n: int, until: str, size: int = 8, trace: str = "") -> None:
    """A number that takes until the file `until` is there."""
    log(trace, f"begin {n}")
    wait(Path(until).exists)
    log(trace, f"end {n}")
    (context.out / "n").write_text(str(4 * n).rjust(size))


@step("toy.gate", version=1, spec=lambda before, until: Spec(before))
def gate(context: Context, before: Any, *, until: str) -> None:
    """Its input, as soon as the file `until` is there."""
    wait(Path(until).exists)
    for name in before.names():
        context.link(before, name)


@step("toy.patient", version=1)
def patient(context: Context, *, trace: str, until: int) -> None:
    """Read from a source that answers at the attempt `until`; each attempt is a line of the trace."""
    log(trace, "asked")
    if len(Path(trace).read_text().splitlines()) < until:
        raise SourceUnavailable("the hub does not answer (502)")
    (context.out / "n").write_text("1")
