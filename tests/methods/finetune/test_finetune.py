"""Fine-tuning: what is trained is what a plain loop trains, what is stored is what was trained, and all else is untouched."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from moeflow.arch import Family
from moeflow.methods.checkpoint import steps as checkpoint_
from moeflow.methods.data import steps as data_
from moeflow.methods.fewer_active import steps as fewer_active
from moeflow.methods.finetune import snapshots
from moeflow.methods.finetune.batches import batch_of
from moeflow.methods.finetune.recipe import Gang, Recipe
from moeflow.methods.graph import Model, Pass, Sample
from moeflow.methods.recipes import tune
from moeflow.methods.recipes.tune import Tuned
from moeflow.model.checkpoint import Tensors
from moeflow.run import StepFailed, in_process
from moeflow.step import Artifact, Context, Spec, step, step_of
from moeflow.store import Store, partial
from tests import tiny
from tests.compressed import compress
from tests.methods.finetune.dying import DyingBlobs
from tests.run import toy
from tests.running import alone, array_of, matrix_of, model_in, run, store_in

STEPS, BATCH, RATE = 4, 4, 1e-2


def read(store: Store, tuned: Tuned) -> dict[str, Any]:
    return json.loads(store.artifact(tuned.trained.key).file("training.json").read_text())


def tensors(store: Store, model: Model) -> dict[str, Tensor]:
    """Every tensor of a model, under the hub's names."""
    done = checkpoint_.checkpoint_of(model)
    run(store, alone(done))
    return dict(Tensors(store.artifact(done.key)))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_in(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return matrix_of(tmp_path_factory.mktemp("tokens"), sequences=6, length=12)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("mixtral", tmp_path_factory.mktemp("mixtral"))


def plain(folder: Path, ids_NL: np.ndarray) -> tuple[Any, list[float]]:
    """A model of transformers after the same steps of AdamW in a loop without DeepSpeed, and its losses."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()  # so that no router draws
    model.config._experts_implementation = "eager"
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), weight_decay=0.0)
    losses = []
    for at in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + np.cos(np.pi * at / STEPS)) / 2
        ids = torch.from_numpy(ids_NL[batch_of(at, BATCH, len(ids_NL), 0)])
        loss = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def test_a_full_training_is_that_of_a_plain_loop_in_every_family(family: Path, store: Store, rows: Any, tmp_path: Path) -> None:
    model = model_in(family)
    data = data_.tokens(rows, model, Sample(6, 12))
    tuned = tune.tune(model, data, Recipe(mode="full", steps=STEPS, batch=BATCH, rate=RATE, warmup=0.0))
    run(store, alone(tuned.trained))
    expected, losses = plain(family, array_of(rows))
    expected.save_pretrained(tmp_path)
    after = tensors(store, tuned.model)
    assert read(store, tuned)["losses"] == pytest.approx(losses, rel=1e-5)
    wanted = Tensors(tmp_path)
    assert set(after) == set(wanted)
    before = Tensors(family)
    moved = [n for n in wanted if not torch.equal(wanted[n], before[n])]
    assert len(moved) >= len(wanted) - 3
    for name in wanted:
        assert torch.allclose(after[name], wanted[name], atol=2e-4), name


@pytest.mark.parametrize("kind", [pytest.param("standard", marks=pytest.mark.slow), "compressed"])
def test_the_merged_model_computes_what_lora_trained(kind: str, family: Path, store: Store, rows: Any, tmp_path: Path) -> None:
    """Of standard checkpoints, and of those whose layers differ and have low-rank experts in every combination."""
    model = model_in(family if kind == "standard" else compress(family, tmp_path / family.name))
    targets = ("attention", "router", "experts") + (("shared",) if Family.of(model.config).arch.shared else ())
    data = data_.tokens(rows, model, Sample(6, 12))
    how = Recipe(steps=STEPS, batch=BATCH, rate=RATE, warmup=0.0, rank=4, alpha=32.0, targets=targets, keep="last")
    tuned = tune.tune(model, data, how, validation={"same": data})
    run(store, alone(tuned.trained))
    validations = read(store, tuned)["validations"]
    checkpoint = checkpoint_.checkpoint_of(tuned.model)
    run(store, alone(checkpoint))
    artifact = store.artifact(checkpoint.key)
    loaded = AutoModelForCausalLM.from_pretrained(artifact.folder()).eval()
    ids = torch.from_numpy(array_of(rows))
    with torch.no_grad():
        loss = cross_entropy(loaded(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert validations[1]["mean"] < validations[0]["mean"] - 0.02
    assert loss.item() == pytest.approx(validations[1]["mean"], abs=2e-5)
    after, before = tensors(store, tuned.model), tensors(store, model)
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert not [n for n in changed if "norm" in n or "embed" in n or "lm_head" in n or "bias" in n]
    assert [n for n in changed if "experts" in n] and [n for n in changed if "self_attn" in n]


@pytest.mark.parametrize("mode", ["experts", "router"])
def test_a_mode_trains_its_own_tensors_and_leaves_layers_without_any(mode: str, store: Store, rows: Any, tmp_path: Path) -> None:
    model = model_in(tiny.write("qwen2_moe", tmp_path / "model"))
    data = data_.tokens(rows, model, Sample(6, 12))
    tuned = tune.tune(model, data, Recipe(mode=mode, steps=2, batch=3, rate=RATE))
    assert tuned.model.layers[1] is model.layers[1] and tuned.model.rest is model.rest  # layer 1 is dense
    run(store, alone(tuned.trained))
    after, before = tensors(store, tuned.model), tensors(store, model)
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    stem = ".mlp.experts." if mode == "experts" else ".mlp.gate.weight"
    assert changed == {n for n in after if stem in n}
    done = json.loads(store.artifact(checkpoint_.checkpoint_of(tuned.model).key).file("moeflow.json").read_text())
    assert [entry["layer"] for entry in done["layers"]] == [0, 2]
    assert all(e["done"][-1].items() >= {"step": "finetune.layer", "mode": mode, "steps": 2}.items() for e in done["layers"])


@pytest.mark.slow
def test_processes_divide_the_work_and_one_that_is_killed_changes_nothing(mixtral: Path, rows: Any, tmp_path: Path) -> None:
    """One key. The curve of two processes is that of one but for rounding, and that of a resumed run its own exactly."""
    model = model_in(mixtral)
    data = data_.tokens(rows, model, Sample(6, 12))
    how = Recipe(steps=12, batch=4, rate=3e-3, rank=4, alpha=32.0, every=4)
    results = {}
    for name, gang in {
        "one": Gang(),
        "divided": Gang(processes=2, zero=3, checkpointing=True, save_every=2),
        "killed": Gang(processes=2, zero=3, checkpointing=True, save_every=2),
    }.items():
        trained = tune.tune(model, data, how, validation={"same": data}, gang=gang).trained
        store = store_in(tmp_path / name)
        if name == "killed":  # by then both have stored their parts of the snapshot at step 2
            store = replace(store, blobs=DyingBlobs(Path(store.url), die_at=6, marker=tmp_path / "died"))
        scalars = toy.Scalars(io.StringIO())
        outcome = in_process.run([alone(trained) if name == "one" else trained], store, progress=scalars)
        course = json.loads(store.artifact(trained.key).file("training.json").read_text())
        of_steps = {(at, "loss", loss) for at, loss in enumerate(course["losses"], 1)}
        assert of_steps | {(v["steps"], "heldout/same", v["mean"]) for v in course["validations"]} == {
            number for number in scalars.heard if number[1] not in ("rate", "tokens_per_second")
        }, "what trackers were told is the course, of a training that lost a process, too"
        results[name] = trained.key, course, store.artifact(trained.key).file("layer-002/layer.safetensors").read_bytes()
        notes = [n for s in outcome.steps for n in s.notes]
        assert any(n.startswith("goes on behind step") for n in notes) == (name == "killed")
    assert len({key for key, _, _ in results.values()}) == 1
    one, divided, killed = (results[n][1] for n in ("one", "divided", "killed"))
    assert divided["losses"] == pytest.approx(one["losses"], rel=1e-3)
    assert killed["losses"] == divided["losses"] and killed["validations"] == divided["validations"]
    assert results["killed"][2] == results["divided"][2]
    assert one["losses"][-1] < one["losses"][0] - 0.1


def test_nothing_is_refused_late_that_could_be_refused_early(mixtral: Path, rows: Any, tmp_path: Path) -> None:
    model = model_in(mixtral)
    data = data_.tokens(rows, model, Sample(6, 12))
    long = data_.tokens(matrix_of(tmp_path, sequences=2, length=80), model, Sample(2, 80))
    other = model_in(tiny.write("mixtral", tmp_path / "other", vocab_size=97))
    for change, message in (
        ({"data": long}, "the data has sequences of 80 tokens, the model 64 positions"),
        ({"validation": {"prose": long}}, "prose has sequences of 80 tokens"),
        ({"data": model.rest}, "the data is made by checkpoint.rest, which makes no token matrix"),
        ({"mode": "qlora"}, "mode='qlora' is not known; choose one of lora, full"),
        ({"loss": "mse"}, "loss='mse' is not known; choose one of lm, kl, both"),
        ({"targets": ("q_proj",)}, "target 'q_proj' is not known; choose of attention, router"),
        ({"targets": ("shared",)}, "'shared' matches no matrix of this mixtral; it has attention, experts, router"),
        ({"mode": "compressed_experts"}, "trains nothing of this mixtral: it has no compressed; attach them first"),
        ({"loss": "kl"}, "loss='kl' needs a teacher; pass teacher=original, or choose loss=lm"),
        (
            {"teacher": other, "loss": "kl"},
            "the teacher's vocabulary has 97 tokens, the model's 96; choose one",
        ),
        ({"teacher": model, "loss": "kl", "top": 97}, "top=97 must lie between 1 and the vocabulary's 96 tokens"),
        ({"loss": "both", "mix": 1.0}, "mix=1.0: of both losses each has a part"),
        ({"gang": Gang(processes=3)}, "batch=4 cannot be divided between 3 processes; nearest: 3 or 6"),
        ({"gang": Gang(processes=2, micro=3)}, "micro=3 does not divide the 2 sequences of each process.*nearest: 2"),
        ({"steps": -1}, "steps=-1 or epochs=1 of batch=4: none may be 0 or less"),
        ({"steps": 0, "epochs": 0.1}, "epochs=0.1 of 6 rows in batches of 4 make no step; say steps=1"),
        ({"warmup": 1.0}, "warmup=1.0 is a part of the steps, from 0 to below 1"),
        ({"every": 9, "steps": 0, "epochs": 2, "validation": {"same": data}}, "every=9 must lie between 1 and the 3 steps"),
        ({"rate": 2.0}, "rate=2.0 must lie between 0 and 1"),
        ({"dtype": "float16"}, "dtype='float16' is not known; choose one of auto, float32, bfloat16"),
    ):
        options: dict[str, Any] = {"steps": 4, "batch": 4, "rate": 1e-3, **change}
        inputs = {name: options.pop(name) for name in ("data", "teacher", "validation", "gang") if name in options}
        with pytest.raises(ValueError, match=message) as refused:
            tune.tune(model, inputs.pop("data", data), Recipe(**options), **inputs)
        assert "\n" not in str(refused.value)
    half = model_in(tiny.write("mixtral", tmp_path / "half", dtype=torch.float16))
    with pytest.raises(ValueError, match="dtype='float16': a model is trained in one of float32, bfloat16, whatever"):
        tune.tune(half, data, Recipe())


def test_one_training_has_one_key_however_it_is_said_and_none_is_no_training(mixtral: Path, rows: Any) -> None:
    """What has no effect is in no key, and a recipe by epochs is that by the steps they make."""
    model = model_in(mixtral)
    data = data_.tokens(rows, model, Sample(6, 12))
    how = Recipe(mode="router", epochs=4, batch=4, warmup=0.2, rank=3, mix=0.3, every=2)
    same = Recipe(mode="router", steps=6, batch=4, warmup=1 / 6, targets=("shared",), alpha=1.0)
    keys = {tune.tune(model, data, h, teacher=model).trained.key for h in (how, same)}
    assert len(keys) == 1 and tune.tune(model, data, Recipe(mode="router", steps=7, batch=4)).trained.key not in keys
    left = tune.tuned(model, model, None, Gang(), Pass())
    assert left.model is model and left.trained is None and left.reports == ()


def test_data_with_nothing_to_predict_are_refused_with_the_reason(mixtral: Path, store: Store, rows: Any) -> None:
    model = model_in(mixtral)
    data = masked(data_.tokens(rows, model, Sample(6, 12)), first=0)
    tuned = tune.tune(model, data, Recipe(steps=1, batch=2, rate=1e-3))
    with pytest.raises(StepFailed, match="nothing is to be predicted in the 6 sequences: learned.npy is zero behind"):
        run(store, alone(tuned.trained))


@step("test.masked", version=1, spec=lambda rows, first: Spec(rows))
def masked(context: Context, rows: Artifact, *, first: int) -> None:
    """The same rows, of which all but the first tokens are to be predicted from token `first` on; 0: only the first."""
    ids_NL = np.load(rows.file("tokens.npy"))
    learned_NL = np.zeros(ids_NL.shape, np.uint8)
    learned_NL[:, :1] = 1
    if first:
        learned_NL[:, first:] = 1
    context.link(rows, "tokens.npy")
    np.save(context.out / "learned.npy", learned_NL)


def test_the_loss_is_the_mean_over_what_is_to_be_predicted(mixtral: Path, store: Store, rows: Any) -> None:
    model = model_in(mixtral)
    data = masked(data_.tokens(rows, model, Sample(6, 12)), first=7)
    tuned = tune.tune(model, data, Recipe(mode="router", steps=1, batch=6, rate=1e-3), validation={"same": data})
    run(store, alone(tuned.trained))
    ids = torch.from_numpy(array_of(rows))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(mixtral).eval()(ids).logits
    expected = cross_entropy(logits[:, 6:-1].flatten(0, 1), ids[:, 7:].flatten()).item()
    course = read(store, tuned)
    assert course["losses"][0] == pytest.approx(expected, abs=1e-5)
    assert course["validations"][0]["losses"]["same"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("top", [96, 0])
def test_a_router_learns_from_the_original_what_pruning_took(
    top: int, mixtral: Path, store: Store, rows: Any, tmp_path: Path
) -> None:
    """Router-KD, from a file with the original's whole distribution, or from its states and its head: the loss is the divergence,
    and it falls."""
    original, pruned = model_in(mixtral), model_in(compress(mixtral, tmp_path / "pruned"))
    data = data_.tokens(rows, original, Sample(6, 12))
    how = Recipe(mode="router", loss="kl", top=top, steps=20, batch=6, rate=3e-2, warmup=0.0)
    tuned = tune.tune(pruned, data, how, teacher=original, passed=Pass(2, 4))
    more, names = ([], {"finetune.predictions"}) if top else (["head"], {"calibrate.advance"})
    assert [name for name, _ in tuned.trained.slots] == ["checkpoint", "data", "predictions", *more]
    assert {step_of(i).name for i in tuned.trained.inputs[2:4]} == names
    run(store, alone(tuned.trained))
    ids = torch.from_numpy(array_of(rows))
    with torch.no_grad():
        log_p, log_q = (
            AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits[:, :-1].log_softmax(-1)
            for folder in (mixtral, tmp_path / "pruned")
        )
    losses = read(store, tuned)["losses"]
    assert losses[0] == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-4)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("of_teacher", "of_student"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_whole_predictions_have_the_precision_of_the_teachers_pass_whatever_that_of_the_training(
    of_teacher: str, of_student: Any, mixtral: Path, store: Store, rows: Any, tmp_path: Path
) -> None:
    """As those in a file have; both losses are those of the same predictions."""
    original, pruned = model_in(mixtral), model_in(compress(mixtral, tmp_path / "pruned"))
    data = data_.tokens(rows, original, Sample(6, 12))
    losses = []
    for top in (96, 0):
        how = Recipe(mode="router", loss="kl", top=top, steps=1, batch=6, dtype=of_student)
        tuned = tune.tune(pruned, data, how, teacher=original, passed=Pass(2, 4, dtype=of_teacher))
        run(store, alone(tuned.trained))
        losses += read(store, tuned)["losses"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] > 0


@pytest.mark.slow
def test_a_training_that_overflows_stops_with_the_step_and_keeps_the_state_before(mixtral: Path, rows: Any, tmp_path: Path) -> None:
    model = model_in(mixtral)
    data = data_.tokens(rows, model, Sample(6, 12))
    how = Recipe(mode="full", steps=9, batch=6, rate=0.5, decay=1e12)
    tuned = tune.tune(model, data, how, gang=Gang(zero=0, save_every=1))
    store = store_in(tmp_path)
    said = (
        r"a trained parameter is not finite behind step (\d); the state of step (\d) is kept, and running again .*; lower the rate"
    )
    with pytest.raises(StepFailed, match=said) as failed:
        run(store, tuned.trained)
    broken, kept = map(int, re.findall(r"step (\d)", str(failed.value))[:2])
    (newest, *_) = partial.snapshots(store, tuned.trained.key)
    assert newest.at == kept == broken - 1 > 0
    assert partial.load_parts(store, tuned.trained.key, (newest,), tmp_path / "kept")
    state = torch.load(tmp_path / "kept/engine/mp_rank_00_model_states.pt", weights_only=False)
    assert all(t.isfinite().all() for t in state["module"].values())


def test_a_disk_without_room_for_a_snapshot_is_told_in_a_line(
    mixtral: Path, store: Store, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_in(mixtral)
    data = data_.tokens(rows, model, Sample(6, 12))
    tuned = tune.tune(model, data, Recipe(mode="router", steps=Gang().save_every + 1, batch=1))
    monkeypatch.setattr(snapshots.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        StepFailed, match="no space left on .*; free some, or point MOEFLOW_CACHE / --store to another disk"
    ) as failed:
        run(store, alone(tuned.trained))
    assert "a snapshot needs" in str(failed.value.cause.__cause__)


def test_compressed_experts_learn_alone_and_leave_the_layers_files_untouched(mixtral: Path, store: Store, rows: Any) -> None:
    model = fewer_active.attach(model_in(mixtral))
    data = data_.tokens(rows, model, Sample(6, 12))
    tuned = tune.tune(model, data, Recipe(mode="compressed_experts", steps=4, batch=6, rate=1e-1), validation={"same": data})
    run(store, alone(tuned.trained))
    files = store.artifact(tuned.trained.key).names()
    assert [n for n in files if n.startswith("layer-")] == [f"layer-{i:03d}/routing.safetensors" for i in range(3)]
    validations = read(store, tuned)["validations"]
    assert validations[1]["mean"] < validations[0]["mean"]
    after, before = tensors(store, tuned.model), tensors(store, model)
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed == {n for n in after if ".experts.compressed." in n} and len(changed) == 9


def test_the_best_state_is_kept_and_the_report_says_what_it_gained(mixtral: Path, store: Store, rows: Any) -> None:
    model = model_in(mixtral)
    data = data_.tokens(rows, model, Sample(6, 12))
    other = data_.tokens(rows, model, Sample(6, 12))
    tuned = tune.tune(model, data, Recipe(steps=8, batch=3, rate=3e-2, every=2), validation={"a": data, "b": other})
    run(store, alone(tuned.reports[0]))
    course = read(store, tuned)
    means = {v["steps"]: v["mean"] for v in course["validations"]}
    assert list(means) == [0, 2, 4, 6, 8] and course["best"] == min(means, key=means.__getitem__)
    shown = json.loads(store.artifact(tuned.reports[0].key).file("report.json").read_text())
    rows_of = {row["name"]: (row["original"], row["compressed"]) for row in shown["rows"]}
    assert rows_of["training loss"] == (course["losses"][0], course["losses"][-1])
    assert rows_of["loss while tuning (a)"] == pytest.approx((means[0], means[course["best"]]))
    assert shown["trained_parameters"] == course["trained"] and shown["rows"][0]["unit"] == "nats/token"
