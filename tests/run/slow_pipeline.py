"""A pipeline whose middle waits for a file: three numbers, each quartered by two halvings, and their total."""

from moeflow.cli import main
from moeflow.step import Step
from tests.run import toy


def build(*, until: str, trace: str, numbers: int = 3) -> Step:
    first = toy.number(n=4, trace=trace)
    slow = [toy.slow(first, n=n, until=until, trace=trace) for n in range(10, 10 + numbers)]
    return toy.total(first, *(toy.half(toy.half(s)) for s in slow), trace=trace)


if __name__ == "__main__":
    main(build)
