"""A pipeline for tests of the command line: halves of numbers, their total, and a report."""

from moeflow.cli import main
from moeflow.step import Step
from tests.report.reporting import report
from tests.run import toy


def build(*, numbers: int = 3, size: int = 8, fail: bool = False, huge: bool = False) -> Step:
    total = toy.total(*(toy.half(toy.number(n=10 * n)) for n in range(1, numbers + 1)), size=1 << 60 if huge else size)
    described = report("quality", ("perplexity", 12.5, 13.25, ""), notes=("without a tokenizer",))
    return (toy.fail(total) if fail else total).reporting(described)


if __name__ == "__main__":
    main(build)
