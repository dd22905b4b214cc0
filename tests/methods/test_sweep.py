"""What one layer's change costs the whole model, measured in one pass, is what the whole changed model says."""

import json
from math import hypot
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from moeflow.arch import Family
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.calibrate.chains import Alternatives, Forks, taken_of_parts
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.prune import reception
from moeflow.methods.prune.counts import Counts, legal_counts
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import moei2
from moeflow.methods.recipes.sequence import in_sequence
from moeflow.methods.records import Candidates, Combinations, Curves, Shortlist
from moeflow.model.layout import Folder, read_config
from moeflow.step import Context, Spec, Step, step, step_of, upstream
from tests import running, tiny


@torch.inference_mode()
def test_a_forks_divergence_and_loss_are_those_of_the_model_with_that_layer_changed(family: Path, tmp_path: Path) -> None:
    model, store = running.model_in(family), running.store_in(tmp_path)
    matrix = running.matrix_of(tmp_path)
    calibration = calibrate.run(model, data.tokens(matrix, model, Sample(8, 16)), Pass(batch=2, shard=4, stage=2))
    last, keep = model.moe_layers[-1], 6
    pruned = moei2.prune(calibration, Counts(keep / 8, rule="uniform"), Search("enumerate"))
    searched = {
        i: next(s for s in upstream([c]) if s.name == "prune.candidates")
        for i, c in zip(model.moe_layers, pruned.choices, strict=True)
    }
    alternatives = {i: Alternatives(Forks("sets", (str(keep),)), (searched[i],)) for i in searched}
    each = {last: Alternatives(Forks("each", tuple(map(str, range(8)))))}
    sets, single = (calibrate.curves(calibration, a, tokens=128) for a in (alternatives, each))
    running.run(store, sets, single, pruned.layers[last])
    measured = json.loads(store.artifact(sets.key).file("curves.json").read_text())
    one_gone = json.loads(store.artifact(single.key).file("curves.json").read_text())

    ids = torch.from_numpy(running.array_of(matrix))
    config = read_config(Folder(family))
    original = AutoModelForCausalLM.from_pretrained(family).eval()
    theirs = original(ids).logits[:, :-1]
    choice = json.loads(store.artifact(pruned.choices[-1].key).file("choice.json").read_text())["keep"]

    def without(gone: list[int]) -> torch.Tensor:
        """The logits where these experts of the last layer are forbidden, by transformers' own router."""
        from moeflow.model.checkpoint import Tensors, read_moe

        moe = read_moe(Tensors(family), config, last)
        block = original.model.layers[last].get_submodule(Family.of(config).arch.block)
        allowed = torch.ones(8, dtype=torch.bool)
        allowed[gone] = False
        hook = block.register_forward_hook(lambda _, args, __: moe(args[0].flatten(0, -2), allowed).view(args[0].shape))
        try:
            return original(ids).logits[:, :-1]
        finally:
            hook.remove()

    def apart(logits: torch.Tensor) -> float:
        return float(kl_div(logits.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean())

    changed = without([e for e in range(8) if e not in choice])
    assert measured["curves"][str(last)][str(keep)] == pytest.approx(apart(changed), rel=1e-3, abs=1e-7)
    loss = float(cross_entropy(changed.flatten(0, 1), ids[:, 1:].flatten()))
    assert measured["losses"][str(last)][str(keep)] == pytest.approx(loss, rel=1e-5)
    assert measured["loss"] == pytest.approx(float(cross_entropy(theirs.flatten(0, 1), ids[:, 1:].flatten())), rel=1e-5)
    if "deepseek" not in family.name:  # there, a group without one of its experts cannot serve its tokens
        for expert in (0, 5):
            assert one_gone["curves"][str(last)][str(expert)] == pytest.approx(apart(without([expert])), rel=1e-3, abs=1e-7)


def test_every_stage_begins_a_chain_from_the_calibrations_own_states_and_takes_as_many_tokens_as_told(tmp_path: Path) -> None:
    source, store = tiny.write("mixtral", tmp_path / "model"), running.store_in(tmp_path)
    model = running.model_in(source)
    calibration = calibrate.run(
        model, data.tokens(running.matrix_of(tmp_path), model, Sample(8, 16)), Pass(batch=2, shard=4, stage=1)
    )
    pruned = moei2.prune(calibration, Counts(0.5, grid=3, measured=64))
    forks = [s for s in upstream([pruned.choices[0]]) if s.name == "calibrate.forks"]
    read = [[step_of(i).key for i in s.inputs] for s in forks]
    for first, of_chain in enumerate(read):
        assert {s.key for s in calibration.states[first]} <= {*of_chain}
        assert [layer.key in of_chain for layer in model.layers] == [i >= first for i in range(3)]
        assert not {s.key for s in (*forks, *calibration.ends)} & {*of_chain} and forks[first].spec.writes < 1000
    running.run(store, *pruned.choices)
    curves = next(s for s in upstream([pruned.choices[0]]) if s.name == "calibrate.curves")
    record = json.loads(store.artifact(curves.key).file("curves.json").read_text())
    assert record["tokens"] == 4 * 15  # two sequences of 16 from each of two shards, and the last token predicts nothing
    measured = record["curves"]
    assert {i: sorted(c) for i, c in measured.items()} == {str(i): ["2", "5", "7"] for i in range(3)}  # three of 2 to 7, evenly
    assert legal_counts(model, Counts(0.5))[0] == [2, 3, 4, 5, 6, 7, 8]
    for curve in measured.values():
        assert curve["2"] > curve["7"] > 0


@pytest.mark.parametrize("around", [False, True])
def test_chains_that_hold_few_forks_measure_what_one_does(around: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the model is another one, of which a layer goes back to what it was."""
    model, store = running.model_in(tiny.write("mixtral", tmp_path / "model")), running.store_in(tmp_path)
    calibration = calibrate.run(
        model, data.tokens(running.matrix_of(tmp_path), model, Sample(8, 16)), Pass(batch=2, shard=4, stage=3)
    )
    pruned = moei2.prune(calibration, Counts(5 / 8, rule="uniform"), Search("swap"))
    alternatives = {i: Alternatives(Forks("each", tuple("01234"))) for i in (0, 2)}
    if around:
        two = {i: (model.layers[i], pruned.layers[i]) for i in range(3)}
        alternatives = {i: Alternatives(Forks("files", ("own", "cut"), replaced=True), two[i], whole=two[i][0]) for i in two}
    read = []
    for most in (20 << 30, 2 * 128 * 32 * 4):
        monkeypatch.setattr(calibrate, "HELD", most)
        curves = calibrate.curves(calibration, alternatives, tokens=128, around=pruned if around else None)
        running.run(store, curves)
        read.append(json.loads(store.artifact(curves.key).file("curves.json").read_text()))
        names = [s.name for s in upstream([curves])]
        assert names.count("calibrate.forks") == (1 if most > 1 << 20 else 6 if around else 10)
    one, many = read
    assert many == one and one["tokens"] == 8 * 15
    if around:
        for i in range(3):
            assert one["curves"][str(i)]["cut"] == pytest.approx(one["apart"], rel=1e-4) != 0
            assert one["curves"][str(i)]["own"] != pytest.approx(one["apart"], rel=1e-3)
    else:
        assert sorted(one["curves"]) == ["0", "2"] and sorted(one["curves"]["2"]) == [*"01234"] and "apart" not in one


def test_a_shortlist_says_what_is_measured(tmp_path: Path) -> None:
    model, store = running.model_in(tiny.write("mixtral", tmp_path / "model")), running.store_in(tmp_path)
    calibration = calibrate.run(
        model, data.tokens(running.matrix_of(tmp_path), model, Sample(8, 16)), Pass(batch=2, shard=4, stage=2)
    )
    cut = [moei2.prune(calibration, Counts(n / 8, rule="uniform"), Search("swap")) for n in (6, 5, 4)]
    files = {i: tuple(c.layers[i] for c in cut) for i in range(3)}
    alternatives = {i: Alternatives(Forks("files", ("6", "5", "4")), files[i]) for i in files}
    named = {0: ("5", "4"), 1: ("6",), 2: ("4", "6")}
    every = calibrate.curves(calibration, alternatives, tokens=128)
    some = calibrate.curves(
        calibration,
        alternatives,
        tokens=128,
        shortlist=shortlisted(named={str(i): [*names] for i, names in named.items()}).part(Shortlist.FILE),
        listed=2,
    )
    running.run(store, every, some)
    whole, part = (Curves.read(store.artifact(s.key)).curves for s in (every, some))
    assert {i: {*by_name} for i, by_name in part.items()} == {i: {*names} for i, names in named.items()}
    assert all(part[i][name] == pytest.approx(whole[i][name], rel=1e-6) for i, names in named.items() for name in names)
    reads, fewer = (sum(s.spec.reads for s in upstream([c]) if s.name == "calibrate.forks") for c in (every, some))
    assert fewer < reads


@step("test.shortlisted", version=1, spec=lambda *, named: Spec(writes=100))
def shortlisted(context: Context, *, named: dict[str, list[str]]) -> None:
    Shortlist({int(i): tuple(names) for i, names in named.items()}).write(context.out)


def test_a_model_whose_last_states_are_there_already_is_measured_without_another_pass(tmp_path: Path) -> None:
    """As those of a model that was rewritten layer by layer, each behind the rewritten ones before it."""
    model, store = running.model_in(tiny.write("mixtral", tmp_path / "model")), running.store_in(tmp_path)
    calibration = calibrate.run(
        model, data.tokens(running.matrix_of(tmp_path), model, Sample(8, 16)), Pass(batch=2, shard=4, stage=2)
    )
    pruned = moei2.prune(calibration, Counts(5 / 8, rule="uniform"), Search("swap"))
    layers, ends = in_sequence(calibration, lambda i, *_: pruned.layers[i])
    around = model.with_layers(layers)
    passed, there = (calibrate.curves(calibration, {}, tokens=64, around=around, ends=e) for e in ((), ends))
    running.run(store, passed, there)
    one, two = (Curves.read(store.artifact(s.key)) for s in (passed, there))
    assert two.tokens == one.tokens == 4 * 15 and two.apart == pytest.approx(one.apart, rel=1e-5) != 0
    assert two.loss == pytest.approx(one.loss, rel=1e-6)
    assert "calibrate.start" in {s.name for s in upstream([passed])} - {s.name for s in upstream([there])}


def test_a_span_compares_its_combinations_on_about_as_many_tokens_as_told(tmp_path: Path) -> None:
    model, store = running.model_in(tiny.write("mixtral", tmp_path / "model")), running.store_in(tmp_path)
    calibration = calibrate.run(
        model, data.tokens(running.matrix_of(tmp_path), model, Sample(8, 16)), Pass(batch=2, shard=4, stage=2)
    )

    def spans(measured: int) -> list[Step]:
        pruned = moei2.prune(calibration, Counts(0.75, rule="uniform"), Search("swap", span=2, best=2, measured=measured))
        return [s for s in upstream([pruned.choices[2]]) if s.name == "prune.span"]

    (part,), (whole,), (also,) = spans(60), spans(0), spans(128)
    assert whole.key == also.key != part.key
    (sample,), shards = (tuple(map(step_of, span.inputs)) for span in (part, whole))
    assert sample.name == "prune.span_of_shard" and len(shards) == 2  # all tokens: shard by shard, beside each other
    running.run(store, part, whole)
    each = [{c.sets: c.loss for c in Combinations.read(store.artifact(s.key)).combinations} for s in (*shards, whole)]
    assert each[2] == {sets: pytest.approx(hypot(each[0][sets], each[1][sets])) for sets in each[2]}
    together = Combinations.read(store.artifact(part.key)).combinations
    starts = [load_file(store.artifact(s.key).file("hidden.safetensors")) for s in calibration.states[2]]
    save_file({name: torch.cat([s[name][:2] for s in starts]) for name in starts[0]}, tmp_path / "states")
    (searched,) = (s for s in sample.inputs if step_of(s).name == "prune.candidates")
    sets = {2: [s.keep for s in Candidates.read(store.artifact(searched.key)).only.best[:2]]}
    file = running.read(store, model.layers[2])
    found = reception.losses(
        dict(model.config), [(2, file)], sets, tmp_path / "states", None, batch=2, dtype="float32", progress=lambda *_: None
    )
    assert {tuple(c.sets): c.loss for c in together} == {sets: pytest.approx(loss, rel=1e-6) for sets, loss in found.items()}
    assert [c.loss for c in together] == sorted(c.loss for c in together)


def test_sets_that_are_judged_on_do_not_enter_the_counts(tmp_path: Path) -> None:
    """The held-out text is nowhere upstream of what is decided."""
    model = running.model_in(tiny.write("mixtral", tmp_path / "model"))
    calibration = calibrate.run(
        model, data.tokens(running.matrix_of(tmp_path), model, Sample(8, 16)), Pass(batch=2, shard=4, stage=2)
    )
    pruned = moei2.prune(calibration, Counts(0.75))
    heldout = data.tokens(running.matrix_of(tmp_path, seed=1), model, Sample(8, 16))
    ends = calibrate.hidden_states(pruned, heldout, Pass(batch=2, shard=4))
    judged = {s.key for s in upstream(ends) if s.name == "data.matrix"}
    decided = {s.key for s in upstream([checkpoint.checkpoint_of(pruned)]) if s.name == "data.matrix"}
    assert judged >= {heldout.key} and decided == {calibration.tokens.key}


def test_states_of_smaller_shards_are_cut_to_the_sequences_that_are_measured() -> None:
    """The first of every shard: also where they end in the midst of a part, and where the last shard is short."""
    assert taken_of_parts([(0, 3), (8, 3), (16, 1)], [2, 2, 2, 2, 2, 2, 2, 2, 1]) == [2, 1, 0, 0, 2, 1, 0, 0, 1]
    assert taken_of_parts([(0, 8)], [4, 4]) == [4, 4]
