"""One gang of two processes, which waits for a file half way."""

from moeflow.cli import main
from moeflow.step import Step
from tests.run import gangs


def build(*, until: str, trace: str) -> Step:
    return gangs.keep(to=4, hold=2, until=until, trace=trace).on(processes=2)


if __name__ == "__main__":
    main(build)
