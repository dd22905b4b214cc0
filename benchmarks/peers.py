"""moeflow beside llm-compressor, GPTQModel and auto-round: seconds, memory, bytes, and how far the result is from the original.

Each peer runs in an environment of its own, which is made where MOEFLOW_PEERS says (or in the user's cache) and kept; one that does
not install or run is a line of the table with the reason. Two models, both in float32: the Mixtral of 21 M parameters in
../shared/models, and a random one of 730 M in realistic widths, whose KL says little. All are calibrated on the same 24,576 tokens,
on two threads. A time is that of a whole process, the median of rounds in turn; ours is cold, in a fresh store, and again, in the
store that this left. The peak is that of the largest process. Both results are judged alike, on the benchmark's held-out texts.
It takes hours, so it runs where it is named alone: `python -m benchmarks peers`; or a part of it:

    python -m benchmarks.peers [--models mixtral-21m ...] [--methods reap gptq ...] [--rounds N]
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles

import numpy as np
from numpy.typing import NDArray

from benchmarks import peer_models
from benchmarks.peer_environments import HERE, THREADS, NotMeasured, Took, measured, python_with
from benchmarks.peer_models import kl_to, nbytes, with_hub_names
from benchmarks.rows import Row

TORCH = "torch==2.13.0"
SLACK = 1.001
"""What a ratio of bytes or of KL may be above one: the last bits of a sum are nobody's merit."""


@dataclass(frozen=True)
class Peer:
    """Another library: what pip installs for it, the script that runs it, and the format that has to be unpacked, if any."""

    name: str
    requirements: tuple[str, ...]
    script: str
    unpacks: bool = False

    def python(self) -> str:
        return str(python_with(self.name, self.requirements))


LLM_COMPRESSOR = Peer("llm-compressor", (TORCH, "llmcompressor>=0.14,<0.15"), "peer_llmcompressor.py")
GPTQMODEL = Peer("GPTQModel", (TORCH, "gptqmodel>=7.7,<7.8"), "peer_gptqmodel.py", unpacks=True)
AUTO_ROUND = Peer("auto-round", (TORCH, "auto-round>=0.16,<0.17", "compressed-tensors"), "peer_autoround.py")

PRUNING = ("benchmarks/peer_pruning.py", "search=reap", "keep=6", "calibration.record=0")
_SLIM = ("benchmarks/peer_slimming.py", "slim.bits=4", "slim.group=64", "slim.inputs=sequential")
GPTQ = (*_SLIM, "slim=gptq", "slim.activation_order=true", "slim.target=model")
AWQ = (*_SLIM, "slim=awq")
SIZE = "{bytes}"
FIT = ("benchmarks/peer_fitting.py", f"budget.bytes={SIZE}", "offers.measured=6144")
"""What our one dial makes of the original in as many bytes as the peer's result has, which stand in place of `SIZE`."""
CALIBRATION = ("calibration.shard=96", "calibration.dtype=float32")


@dataclass(frozen=True)
class Contest:
    """A method of a peer, and our pipeline with its parameters that does the same in as many bytes, or another thing that does."""

    peer: Peer
    method: str
    ours: tuple[str, ...]
    other: str = ""

    @property
    def name(self) -> str:
        """The method, and what is beside it if that is no such method."""
        return f"{self.method} beside {self.other}" if self.other else self.method


CONTESTS = (
    Contest(LLM_COMPRESSOR, "reap", PRUNING),
    Contest(LLM_COMPRESSOR, "reap-basic", PRUNING),
    Contest(LLM_COMPRESSOR, "gptq", GPTQ),
    Contest(LLM_COMPRESSOR, "awq", AWQ),
    Contest(GPTQMODEL, "gptq", GPTQ),
    Contest(AUTO_ROUND, "signround", GPTQ),
    Contest(AUTO_ROUND, "signround", FIT, "fit"),
)


@dataclass(frozen=True)
class Case:
    """A model, how often each side compresses it, and how many held-out sequences of each text judge it."""

    name: str
    make: peer_models.Make
    rounds: int
    sequences: int
    seconds: float = 1.0
    """What REAP of ours may take, in times of llm-compressor's."""
    memory: float = 1.0
    """What REAP of ours may hold at its peak, in times of llm-compressor's."""


CASES = (
    Case("mixtral-21m", peer_models.trained, rounds=5, sequences=64),
    Case("random Mixtral", peer_models.random, rounds=3, sequences=8, seconds=0.7, memory=0.4),
)


@dataclass(frozen=True)
class Side:
    """What one side's runs took, cold and again, and what came of the last one."""

    cold: list[Took]
    again: list[Took]
    nbytes: int
    kl: list[float]
    """Mean KL to the original on each held-out text, in nats a token."""

    @property
    def seconds(self) -> float:
        return median(t.seconds for t in self.cold)

    @property
    def peak(self) -> float:
        return median(t.peak for t in self.cold)

    @property
    def mean(self) -> float:
        return sum(self.kl) / len(self.kl)


def main(models: Sequence[str] = (), methods: Sequence[str] = (), rounds: int = 0) -> tuple[list[Row], str]:
    """Rows for the claims, and the table; of these models and methods alone, if any are named.

    Raises FileNotFoundError where the model or the texts are absent.
    """
    cases = [replace(c, rounds=rounds or c.rounds) for c in CASES if c.name in models or not models]
    contests = [c for c in CONTESTS if {c.method, c.name} & {*methods} or not methods]
    with tempfile.TemporaryDirectory() as scratch:
        return beside(cases, contests, peer_models.tokens(Path(scratch) / "store"))


def beside(cases: Sequence[Case], contests: Sequence[Contest], matrix_BL: NDArray[np.int32]) -> tuple[list[Row], str]:
    """Rows for the claims, and the table: every contest on every case, calibrated on these token ids, [sequences, length]."""
    rows: list[Row] = []
    lines = ["| model | method | by | seconds | again | peak | bytes | KL to the original |", "|" + "---|" * 8]
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.npy"
        np.save(tokens, matrix_BL)
        for case in cases:
            bench = _Bench(Path(scratch) / case.name.replace(" ", "-"), case, tokens)
            for contest in contests:
                try:
                    ours, theirs = bench.compared(contest)
                except NotMeasured as reason:
                    new = [f"| {case.name} | {contest.name} | {contest.peer.name} | {reason} |" + " |" * 4]
                else:
                    rows += claims(case, contest, ours, theirs)
                    new = [_line(case, contest, contest.peer.name, theirs), _line(case, contest, "moeflow", ours)]
                print(*new, sep="\n", file=sys.stderr, flush=True)  # the next may take an hour
                lines += new
            shutil.rmtree(bench.folder)
    return rows, "\n".join(lines)


def claims(case: Case, contest: Contest, ours: Side, theirs: Side) -> list[Row]:
    """The rows of one contest: our seconds, peak, bytes and KL as multiples of the peer's."""
    reap = contest.method == "reap"
    what = f"{contest.name} of {contest.peer.name} on {case.name}"
    return [
        Row(f"seconds, {what}", ours.seconds / theirs.seconds, "at most", case.seconds if reap else 1.0, "times"),
        Row(f"peak memory, {what}", ours.peak / theirs.peak, "at most", case.memory if reap else 1.0, "times"),
        Row(f"bytes, {what}", ours.nbytes / theirs.nbytes, "at most", SLACK, "times"),
        Row(f"KL to the original, {what}", ours.mean / theirs.mean, "at most", SLACK, "times"),
    ]


class _Bench:
    """One model in a folder, and what both sides make of it."""

    def __init__(self, folder: Path, case: Case, tokens: Path) -> None:
        self.folder, self.case, self.tokens = folder, case, tokens
        self.original = case.make(folder / "original")

    def compared(self, contest: Contest) -> tuple[Side, Side]:
        """Both sides, in turn, as many rounds as the case says. Raises NotMeasured where the peer does not install or run."""
        python, theirs, out = contest.peer.python(), self.folder / "theirs", self.folder / "ours"
        words = [python, str(HERE / contest.peer.script), contest.method, str(self.original), str(self.tokens), str(theirs)]
        cold: list[Took] = []
        ours: tuple[list[Took], list[Took]] = ([], [])
        for _ in range(self.case.rounds):
            shutil.rmtree(theirs, ignore_errors=True)
            cold.append(self._measured(words))
            shutil.rmtree(self.folder / "store", ignore_errors=True)
            for took in ours:
                took.append(self._measured(self._moeflow("run", *self._parameters(contest, nbytes(theirs)), "--name", "ours")))
        shutil.rmtree(out, ignore_errors=True)
        self._measured(self._moeflow("pull", "ours", str(out)))
        size = nbytes(theirs)
        if contest.peer.unpacks:
            dense = self.folder / "dense"
            shutil.rmtree(dense, ignore_errors=True)
            self._measured([*words[:2], "dense", str(theirs), str(self.tokens), str(dense)])
            theirs = dense
        with_hub_names(theirs)
        return Side(*ours, nbytes(out), self._kl(out)), Side(cold, [], size, self._kl(theirs))

    def _kl(self, folder: Path) -> list[float]:
        return kl_to(self.original, folder, self.case.sequences, self.folder / "judged")

    def _parameters(self, contest: Contest, size: int) -> list[str]:
        pipeline, *words = (word.replace(SIZE, str(size)) for word in contest.ours)
        assigned = [f"model={self.original}", f"tokens={self.tokens}", *words, *CALIBRATION]
        return [pipeline, *(w for word in assigned for w in ("-p", word)), "--runner", "process", "--cpus", str(THREADS)]

    def _moeflow(self, *words: str) -> list[str]:
        return [sys.executable, "-c", "from moeflow.cli import main; main()", *words, "--store", str(self.folder / "store")]

    def _measured(self, command: list[str]) -> Took:
        return measured(command, self.folder / "log.txt")


def _line(case: Case, contest: Contest, by: str, side: Side) -> str:
    kl = " ".join(f"{k:.5f}" for k in side.kl)
    figures = [spread(side.cold), spread(side.again), f"{side.peak / 1e9:.2f} GB", f"{side.nbytes / 1e6:.1f} MB"]
    return f"| {case.name} | {contest.name} | {by} | {' | '.join(figures)} | {side.mean:.5f} ({kl}) |"


def spread(took: list[Took]) -> str:
    """The median of the seconds, and the quartiles in brackets."""
    seconds = [t.seconds for t in took]
    if len(seconds) < 2:
        return " ".join(f"{s:.1f}" for s in seconds)
    low, middle, high = quantiles(seconds, n=4, method="inclusive")
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=(), choices=[c.name for c in CASES])
    parser.add_argument("--methods", nargs="*", default=(), choices=sorted({n for c in CONTESTS for n in (c.method, c.name)}))
    parser.add_argument("--rounds", type=int, default=0)
    given = parser.parse_args()
    held, table = main(given.models, given.methods, given.rounds)
    print(*(row.line() for row in held), "", table, sep="\n")
