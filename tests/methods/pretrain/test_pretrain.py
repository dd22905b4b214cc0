"""The small model that a graph can train for itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.graph import Model
from moeflow.methods.pretrain import mixtral
from moeflow.methods.pretrain import steps as pretrain
from moeflow.methods.pretrain.steps import Pretraining, Shape
from moeflow.methods.recipes import pretrained
from moeflow.model.checkpoint import Tensors
from moeflow.run import StepFailed
from moeflow.sources import Texts
from tests import running

SHAPE = Shape(width=32, ffn=32, layers=2, heads=2, experts=4, vocabulary=300)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text("".join(f"def function_{i}(value):\n    return value + {i}\n\n\n" for i in range(600)))
    return Texts(str(file))


def made(texts: Texts, steps: int = 12, **options: Any) -> Model:
    return pretrained.mixtral(texts, Pretraining(steps, batch=4, length=32, **options), SHAPE)


def test_it_learns_and_becomes_a_checkpoint_like_any_other(texts: Texts, tmp_path: Path) -> None:
    model, store = made(texts), running.store_in(tmp_path)
    target = checkpoint.checkpoint_of(model)
    outcome = running.run(store, target)
    (note,) = (n for s in outcome.steps if s.name == "pretrain.mixtral" for n in s.notes)
    first, last = (float(x) for x in note.rsplit("loss ", 1)[1].split(" to "))
    assert last < first - 0.3
    store.fetch(target.key, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert target.spec.output.parameters == sum(p.numel() for p in loaded.parameters())
    words = AutoTokenizer.from_pretrained(tmp_path / "out")("def function_1(value):")["input_ids"]
    assert 3 < len(words) < 22


def test_the_names_and_shapes_that_the_graph_expects_are_those_that_are_written(texts: Texts, tmp_path: Path) -> None:
    store, model = running.store_in(tmp_path), made(texts, steps=1)
    running.run(store, model.rest, *model.layers)
    trained = next(s for s in model.rest.inputs if s.key.startswith("pretrain.mixtral") and "/" not in s.key)
    written = Tensors(store.artifact(trained.key))
    assert {n: (i.dtype, i.shape) for n, i in written.info.items()} == pretrain.table_of(model.config)


@contextmanager
def interrupted_behind(step: int) -> Iterator[None]:
    """Interrupts a training behind this optimizer step, which torch itself counts."""
    left = iter(range(step - 1))

    def count(*_: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    handle = register_optimizer_step_post_hook(count)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        handle.remove()


def test_an_interrupted_training_goes_on_and_ends_with_the_same_weights(
    texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixtral, "SAVED_EVERY", 5)
    whole, parts = (running.store_in(tmp_path / n) for n in ("whole", "parts"))
    model = made(texts)
    running.run(whole, *model.layers)
    with interrupted_behind(9):
        running.run(parts, *model.layers)
    outcome = running.run(parts, *model.layers)
    assert any("goes on behind step 5" in n for s in outcome.steps for n in s.notes)
    for layer in model.layers:
        assert whole.manifest(layer.key).digest == parts.manifest(layer.key).digest


def test_too_little_text_and_a_wrong_rate_are_refused(texts: Texts, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rate=3: there must be"):
        made(texts, rate=3)
    (tmp_path / "short.txt").write_text("hello")
    with pytest.raises(StepFailed, match="the texts give .* tokens; a sequence needs 33"):
        running.run(running.store_in(tmp_path), *made(Texts(str(tmp_path / "short.txt"))).layers)
