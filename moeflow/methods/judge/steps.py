"""Judge a compressed model beside its original by what both answer: one step for each model and task, and one that compares.

What the original answered is stored under its own key, so that another compression of it asks the original nothing again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moeflow.methods.judge import harness_files, harness_tasks
from moeflow.methods.judge.answers import Answers
from moeflow.methods.judge.options import Prompts, Tasks, is_rows, names_of
from moeflow.methods.judge.task_files import METRICS, Kind, figure_of, read, shot, strict
from moeflow.methods.reports import figures, write_report
from moeflow.model.memory import on_device
from moeflow.model.spec import CheckpointSpec, precision
from moeflow.options import only
from moeflow.sources import Source, pin
from moeflow.step import Artifact, Context, Spec, Step, step

ROOM = 1.2
"""What a model and its activations take, as a multiple of its bytes on disk."""
ITEM, ITEMS = 400, 1000
"""About how many tokens an item of a harness's task has, and how many items, where nobody knows."""


@dataclass(frozen=True)
class Judged:
    """The checkpoints to be compared, as transformers loads them, and the precision in which they run."""

    original: Step
    compressed: Step
    dtype: str
    without_tokenizer: str = ""  # why text cannot become tokens, if it cannot
    has_template: bool = False  # whether the tokenizer renders conversations


def reports(judged: Judged, tasks: Tasks | None, prompts: Prompts | None) -> tuple[Step, ...]:
    """The steps that report on tasks and prompts. Raises ValueError for tasks that do not exist and files that cannot be read."""
    if judged.without_tokenizer and (tasks or prompts):
        raise ValueError(f"{judged.without_tokenizer}, so it can be asked nothing; leave tasks and prompts away")
    made: list[Step] = []
    if tasks is not None:
        _check_template(judged, "tasks.chat=true", needed=tasks.chat)
        leaves, groups = harness_tasks.resolved(tasks)
        commits: dict[str, str] = {}
        asked = {leaf.name: _of_harness(judged, harness_files.needed(leaf, commits), leaf.name, tasks) for leaf in leaves}
        metrics = names_of(tasks.metrics)
        for leaf in leaves:
            made.append(_of_leaf(*asked[leaf.name], leaf, metrics))
        for group in groups:
            first, second = zip(*(asked[name] for name in group.tasks), strict=True)
            _, known = harness_tasks.figures(next(leaf for leaf in leaves if leaf.name == group.tasks[0]))
            order = [str(a["metric"]) for a in group.aggregates]
            order = [m for m in metrics if m in order] or order
            words = _words(group.name, [pair for m in order for pair in known if pair[0] == m])
            aggregates = [dict(a) for a in group.aggregates if a["metric"] in order]
            made.append(of_group(first, second, name=group.name, aggregates=aggregates, metrics=order, figures=words))
        made += [_of_rows(judged, file, tasks) for file in names_of(tasks.names) if is_rows(file)]
    if prompts is not None:
        made += [_of_prompts(judged, file, prompts) for file in names_of(prompts.files)]
    words = [word for s in made for word in s.spec.figures]
    if twice := next((word for word in words if words.count(word) > 1), None):
        raise ValueError(
            f"two tasks or files of prompts have the figure {twice}, so that no gate could tell them apart; rename one"
        )
    return tuple(made)


def _words(task: str, metrics: Sequence[tuple[str, ...]]) -> list[str]:
    """The words by which a gate names a task's figures: its metrics, with the ways in which answers are found."""
    return [figure_of(task, *pair, main=i == 0) for i, pair in enumerate(metrics)] or [figure_of(task)]


def _check_template(judged: Judged, what: str, *, needed: bool) -> None:
    if needed and not judged.has_template:
        raise ValueError(f"{what} needs a chat template, and the tokenizer has none; put chat_template.jinja beside the checkpoint")


def _of_leaf(first: Step, second: Step, leaf: harness_tasks.Leaf, metrics: list[str]) -> Step:
    own, known = harness_tasks.figures(leaf)
    listed = [pair for name in metrics for pair in known if pair[0] == name] or known
    order, only = (metrics, True) if {*metrics} & {*own} else (own, False)
    return compared(first, second, task=leaf.name, metrics=order, only=only, figures=_words(leaf.name, listed)).noting(*first.notes)


def _of_harness(judged: Judged, needed: harness_files.Needed, task: str, tasks: Tasks) -> tuple[Step, Step]:
    files = None if needed.files is None else needed.files.group(needed.files.names())
    how = replace(only(tasks, "names", "shots", "limit", "batch", "chat", "unsafe"), names=task)
    first, second = (
        of_harness(
            model, files, task=task, yaml=needed.yaml, changes=needed.changes, data=needed.data,
            harness=harness_tasks.version(), how=how, dtype=judged.dtype,
        )
        for model in (judged.original, judged.compressed)
    )  # fmt: skip
    return first.noting(*needed.notes), second


def _file(address: str) -> tuple[Source, str, str]:
    """A pinned file of rows, its name in it, and what it is called in reports."""
    source = pin(address, kind="data")
    if len(source.files) != 1:
        raise ValueError(f"{address} is {len(source.files)} files; name one file of rows")
    name = source.files[0].name
    return source, name, name.rpartition("/")[2].partition(".")[0]


def _of_rows(judged: Judged, address: str, tasks: Tasks) -> Step:
    source, file, name = _file(address)
    kind, items = read(file, source.read(file))
    if kind == "prompts":
        raise ValueError(f"{address} holds prompts alone, nothing to judge an answer by; give it as prompts={address}")
    shots = (tasks.shots or 0) if kind == "answers" else 0
    shot(items, shots, file)
    _check_template(judged, f"{address}, which holds messages,", needed=any(isinstance(i.asked, list) for i in items))
    how = replace(only(tasks, "names", "limit", "batch", "tokens", "chat", "seconds"), names=name)
    first, second = (
        of_rows(model, source.file(file), file=file, kind=kind, shots=shots, how=how, dtype=judged.dtype)
        for model in (judged.original, judged.compressed)
    )
    metrics = [*METRICS[kind]][: 1 if kind == "answers" and not strict(items) else None]
    words = _words(name, [key.partition(",")[::2] for key in metrics])
    return compared(first, second, task=name, metrics=[], only=False, figures=words)


def _of_prompts(judged: Judged, address: str, prompts: Prompts) -> Step:
    source, file, name = _file(address)
    _, items = read(file, source.read(file))
    _check_template(judged, f"{address}, which holds messages,", needed=any(isinstance(i.asked, list) for i in items))
    how = replace(prompts, files=name)
    first, second = (
        of_prompts(model, source.file(file), file=file, how=how, dtype=judged.dtype)
        for model in (judged.original, judged.compressed)
    )
    return compared_prompts(first, second, name=name)


def _model_spec(model: CheckpointSpec, tokens: int, dtype: str) -> Spec:
    need = int(model.loaded(dtype) * ROOM)
    return Spec(
        reads=model.nbytes, writes=tokens, memory=need, device=on_device(need),
        operations={precision(model.config, dtype): 2 * tokens * model.active},
    )  # fmt: skip


def _harness_spec(
    model: CheckpointSpec, files: Any = None, *, task: str, yaml: str, changes: Any, data: Any, harness: str, how: Tasks, dtype: str
) -> Spec:
    return _model_spec(model, ITEM * (how.limit or ITEMS), dtype)


@step("judge.of_harness", version=1, spec=_harness_spec, gpus=1)
def of_harness(
    context: Context, model: Artifact, files: Artifact | None = None, *, task: str, yaml: str, changes: Mapping[str, Any],
    data: Mapping[str, Any], harness: str, how: Tasks, dtype: str,
) -> None:  # fmt: skip
    """What one model answers to one task of lm-evaluation-harness of the version `harness`, item by item: `answers.json`.

    `yaml`: the task's file within `files`, or within the harness's own tasks; `changes`: what is said otherwise; `data`: its data
    files, by their names within `files`. Raises ValueError if the harness here has another version.
    """
    from moeflow.methods.judge.harness import asked

    if (here := harness_tasks.version()) != harness:
        raise ValueError(f"lm_eval is {here} here and was {harness} where the run was planned; install the same on both")
    inside = None if files is None else files.folder()
    file = harness_tasks.own_folder() / yaml if inside is None else inside / yaml
    changed = harness_files.placed(changes, data, inside, context.scratch)
    flags = {"chat": how.chat, "unsafe": how.unsafe}
    asked(
        model.folder(), task, file, changed, context.scratch,
        dtype=dtype, batch=how.batch, shots=how.shots, limit=how.limit, how=flags,
    ).write(context.out)  # fmt: skip


def _rows_spec(model: CheckpointSpec, file_: Any, *, file: str, kind: str, shots: int, how: Tasks, dtype: str) -> Spec:
    _check_room(model, how.tokens, "tasks.tokens")
    return _model_spec(model, (ITEM + how.tokens) * (how.limit or ITEMS), dtype)


def _check_room(model: CheckpointSpec, tokens: int, name: str) -> None:
    positions = model.config.get("max_position_embeddings")
    if positions and tokens >= positions:
        raise ValueError(f"{name}={tokens} leaves no room for a prompt in the model's {positions} positions; take fewer")


@step("judge.of_rows", version=1, spec=_rows_spec, gpus=1)
def of_rows(
    context: Context, model: Artifact, rows: Artifact, *, file: str, kind: Kind, shots: int, how: Tasks, dtype: str
) -> None:
    """What one model answers to the rows of a file, each judged by the file's kind: `answers.json`.

    The likeliest tokens are written. The number in an answer is found as the harness finds it for GSM8K, code runs with its tests
    in a process of its own (`sandbox` says what that does not protect from), and a tool call has to be JSON that names a given
    tool.
    """
    from moeflow.methods.judge.asking import answered

    _, items = read(file, rows.file(file).read_bytes())
    items = shot(items, shots, file)[: how.limit]
    answered(model.folder(), how.names, kind, items, how, dtype, context.progress).write(context.out)


def _prompts_spec(model: CheckpointSpec, file_: Any, *, file: str, how: Prompts, dtype: str) -> Spec:
    _check_room(model, how.tokens, "prompts.tokens")
    return _model_spec(model, 2 * (ITEM + how.tokens) * (how.limit or ITEMS), dtype)


@step("judge.of_prompts", version=1, spec=_prompts_spec, gpus=1)
def of_prompts(context: Context, model: Artifact, rows: Artifact, *, file: str, how: Prompts, dtype: str) -> None:
    """What one model writes behind the prompts of a file, by its likeliest tokens and by drawn ones: `answers.json`."""
    from moeflow.methods.judge.asking import continued

    _, items = read(file, rows.file(file).read_bytes())
    continued(model.folder(), how.files, items[: how.limit], how, dtype, context.progress).write(context.out)


def _compared_spec(original: Any, compressed: Any, *, figures: list[str], **_: Any) -> Spec:
    return Spec(reads=1 << 20, writes=2000, memory=1 << 28, figures=tuple(figures))


@step("judge.compared", version=1, spec=_compared_spec)
def compared(
    context: Context, original: Artifact, compressed: Artifact, *, task: str, metrics: list[str], only: bool, figures: list[str]
) -> None:
    """Both models' figures on one task, paired by item: wins, losses, the interval of each and of the change, and chance.

    `metrics`: which come first; `only`: and no others; `figures`: what a gate may name, as far as it is known beforehand.
    """
    from moeflow.methods.judge.comparing import rows

    first, second = Answers.read(original), Answers.read(compressed)
    notes = "; ".join(dict.fromkeys([*first.notes, *second.notes]))
    write_report(context, "tasks", rows(first, second, metrics, only=only), note=notes, task=task)


def _group_spec(original: Any, compressed: Any, *, figures: list[str], **_: Any) -> Spec:
    return Spec(reads=len(original) << 20, writes=2000, memory=1 << 28, figures=tuple(figures))


@step("judge.of_group", version=1, spec=_group_spec)
def of_group(
    context: Context, original: tuple[Artifact, ...], compressed: tuple[Artifact, ...],
    *, name: str, aggregates: list[dict[str, Any]], metrics: list[str], figures: list[str],
) -> None:  # fmt: skip
    """Both models' figures on a group of tasks, made of those of its tasks as the harness makes them; see `compared`."""
    from moeflow.methods.judge import comparing

    first, second = ([Answers.read(a) for a in side] for side in (original, compressed))
    write_report(context, "tasks", comparing.of_group(name, first, second, aggregates, metrics), task=name)


def _compared_prompts_spec(original: Any, compressed: Any, *, name: str) -> Spec:
    words = figures("greedy_prefix", "sampled_prefix", "length", "repetition", text=name)
    return Spec(reads=1 << 20, writes=2000, memory=1 << 28, figures=words)


@step("judge.prompts", version=1, spec=_compared_prompts_spec)
def compared_prompts(context: Context, original: Artifact, compressed: Artifact, *, name: str) -> None:
    """How long both models agree behind the prompts of a file, how long they write, how far they repeat themselves; their texts."""
    from moeflow.methods.judge.comparing import of_prompts as rows

    first, second = Answers.read(original), Answers.read(compressed)
    texts = [{"original": a.text, "compressed": b.text} for a, b in zip(first.items, second.items, strict=True)]
    write_report(context, "prompts", rows(first, second, name), text=name, written=texts)
