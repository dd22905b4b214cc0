"""What a run tells Ray's own metrics, which its dashboard, Prometheus and Grafana read: steps, their bytes and seconds, retries."""

from collections import Counter as Counts

from ray.util.metrics import Counter

from moeflow.run.materialize import Done


class Metrics:
    """The counters of one driver; each has the step's name as a tag."""

    def __init__(self) -> None:
        self._steps = _counter("moeflow_steps", "steps that were computed and stored")
        self._read = _counter("moeflow_read_bytes", "bytes that steps read from their inputs")
        self._written = _counter("moeflow_written_bytes", "bytes that steps wrote into the store")
        self._seconds = _counter("moeflow_step_seconds", "seconds that steps took")
        self._retries = _counter("moeflow_retries", "steps that were started again because their worker was lost")
        self._starts: Counts[str] = Counts()

    def started(self, key: str) -> None:
        """A step has started, for the first time or again."""
        self._starts[key] += 1
        if self._starts[key] > 1:
            self._retries.inc(1, {"step": _name(key)})

    def postponed(self, key: str) -> None:
        """A step that had started waits for another run, and will start again: that is no retry."""
        self._starts[key] -= 1

    def done(self, done: Done) -> None:
        """A step is stored, by this run or meanwhile by another."""
        if not done.ran:
            return
        tag = {"step": _name(done.key)}
        for counter, value in (
            (self._steps, 1),
            (self._read, done.reads),
            (self._written, done.writes),
            (self._seconds, done.seconds),
        ):
            if value > 0:  # as a counter asks
                counter.inc(value, tag)


def _counter(name: str, about: str) -> Counter:
    return Counter(name, description=about, tag_keys=("step",))


def _name(key: str) -> str:
    """The name of the step whose key this is."""
    return key.rpartition("-")[0]
