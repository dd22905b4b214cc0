"""What both models are asked, and how: tasks with a right answer, and prompts that they go on from."""

from dataclasses import dataclass
from pathlib import Path

from moeflow.options import check_at_least

ROWS = (".jsonl", ".ndjson")
"""The endings of files of rows, one JSON object on a line."""
YAML = (".yaml", ".yml")


def names_of(words: str) -> list[str]:
    """The names in a list that is joined by commas. Raises ValueError for one that is there twice."""
    names = [name for part in words.split(",") if (name := part.strip())]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice} is named twice; leave one out")
    return names


def is_rows(name: str) -> bool:
    """Whether a task is named by a file of rows."""
    return name.lower().endswith(ROWS)


def _check_file(what: str, name: str) -> None:
    if "://" not in name and not Path(name).expanduser().is_file():
        raise ValueError(f"{what}={name}: there is no such file; check the path")


@dataclass(frozen=True)
class Tasks:
    """Tasks with a right answer that the original and the compressed model do, on the same requests. Raises ValueError."""

    names: str
    """Names of tasks, groups or tags of lm-evaluation-harness, files of such a task (.yaml), and files of rows (.jsonl), several
    joined by commas; see docs/evaluate.md."""
    folder: str = ""
    """A folder of files of lm-evaluation-harness's tasks, which may then be named like its own (its --include_path)."""
    shots: int | None = None
    """Examples in front of each question (its --num_fewshot); none: as each task says. Of a file of questions and answers they are
    its first rows, which are then not asked."""
    limit: int | None = None
    """The first so many items of each task; none: all."""
    metrics: str = ""
    """The metrics of lm-evaluation-harness that are reported, joined by commas, the first for the gate; none: as each task says."""
    batch: int = 8
    """Requests at once."""
    tokens: int = 256
    """Tokens of an answer to a row of a file, at most."""
    chat: bool = False
    """Put questions into the model's chat template (its --apply_chat_template)."""
    unsafe: bool = False
    """Also tasks of lm-evaluation-harness that run what the model writes, which it does without a sandbox."""
    seconds: float = 10.0
    """How long the tests of one row of code may run, in the sandbox."""

    def __post_init__(self) -> None:
        if not names_of(self.names):
            raise ValueError(f"names={self.names!r} names no task; give one, or none for no tasks")
        names_of(self.metrics)
        check_at_least(self, batch=1, tokens=1, seconds=0.1)
        for name in ("shots", "limit"):
            if (value := getattr(self, name)) is not None and value < (name == "limit"):
                raise ValueError(f"{name}={value} must be at least {int(name == 'limit')}, or none")

    def check_files(self) -> None:
        """Raise ValueError for a file or folder that should be on this machine and is not."""
        if self.folder and not Path(self.folder).expanduser().is_dir():
            raise ValueError(f"tasks.folder={self.folder}: there is no such folder; check the path")
        for name in names_of(self.names):
            if is_rows(name) or name.endswith(YAML):
                _check_file("tasks", name)


@dataclass(frozen=True)
class Prompts:
    """Prompts that both models go on from: how long they agree, how long they write, and whether they repeat themselves."""

    files: str
    """Files of prompts (.jsonl, docs/evaluate.md), several joined by commas; each gets its own report."""
    limit: int | None = None
    """The first so many prompts of each file; none: all."""
    tokens: int = 128
    """Tokens that are written behind each prompt, at most."""
    batch: int = 8
    """Prompts at once."""
    temperature: float = 1.0
    """Of the sampled texts; both models draw with the same random numbers."""
    seed: int = 0
    """Of these random numbers."""
    ngram: int = 4
    """A text repeats itself where the same so many tokens stand again."""

    def __post_init__(self) -> None:
        if not names_of(self.files):
            raise ValueError(f"files={self.files!r} names no file of prompts; give one, or none for no prompts")
        check_at_least(self, batch=1, tokens=1, ngram=1)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1, or none")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must lie above 0; what is likeliest is written in any case")

    def check_files(self) -> None:
        """Raise ValueError for a file that should be on this machine and is not, and for one that holds no rows."""
        for name in names_of(self.files):
            if not is_rows(name):
                raise ValueError(f"prompts={name} is no file of rows; it ends in {' or '.join(ROWS)}")
            _check_file("prompts", name)
