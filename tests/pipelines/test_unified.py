"""The unified framework's recipes, in both orders, each on a small model of its family."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.unified import TOGETHER
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.slim.methods import Slimming
from moeflow.model.formats import layer_formats
from moeflow.model.layout import Folder, read_config
from moeflow.run import pipeline
from moeflow.step import Step
from moeflow.store import Store
from tests import running, tiny
from tests.pipelines import words
from tests.run import toy

PIPELINES = Path(__file__).parents[2] / "pipelines"
SMALL = [*words.SMALL, "slim.group=8", "decompose.multiple=8"]
LAYERS, BLOCKS = ["trim=moe_blocks", "trim.dropped=1"], ["trim=decoder_layers", "trim.dropped=1"]
EXPERTS = ["trim=experts", "trim.dropped=2"]


@pytest.mark.parametrize(
    ("name", "family", "orders", "recipe"),
    [
        ("mixtral_unified", "mixtral", ("slim,trim", "trim,slim"), LAYERS),
        ("deepseek_v2_lite_unified", "deepseek_v2", ("slim,trim",), LAYERS),
        ("deepseek_v2_lite_unified", "deepseek_v2", ("trim,slim",), BLOCKS),
        pytest.param("qwen15_moe_unified", "qwen2_moe", ("trim,slim",), EXPERTS, marks=pytest.mark.slow),
        pytest.param("mixtral_unified", "mixtral", ("slim,trim", "trim,slim"), BLOCKS, marks=pytest.mark.slow),
        pytest.param("mixtral_unified", "mixtral", ("slim,trim", "trim,slim"), EXPERTS, marks=pytest.mark.slow),
        pytest.param("deepseek_v2_lite_unified", "deepseek_v2", ("trim,slim",), LAYERS, marks=pytest.mark.slow),
        pytest.param("deepseek_v2_lite_unified", "deepseek_v2", ("slim,trim",), BLOCKS, marks=pytest.mark.slow),
        pytest.param("deepseek_v2_lite_unified", "deepseek_v2", ("slim,trim", "trim,slim"), EXPERTS, marks=pytest.mark.slow),
        pytest.param("qwen15_moe_unified", "qwen2_moe", ("slim,trim", "trim,slim"), LAYERS, marks=pytest.mark.slow),
        pytest.param("qwen15_moe_unified", "qwen2_moe", ("slim,trim", "trim,slim"), BLOCKS, marks=pytest.mark.slow),
        pytest.param("qwen15_moe_unified", "qwen2_moe", ("slim,trim",), EXPERTS, marks=pytest.mark.slow),
    ],
)
@torch.inference_mode()
def test_a_recipe_runs_on_a_small_model_of_its_family(
    name: str, family: str, orders: tuple[str, ...], recipe: list[str], tmp_path: Path
) -> None:
    plain = {"mlp_only_layers": []} if family == "qwen2_moe" else {}
    source, matrix = tiny.write(family, tmp_path / "model", **plain), running.matrix_of(tmp_path)
    build = pipeline.load(PIPELINES / f"{name}.py")
    store = running.store_in(tmp_path)
    for order in orders:
        target = pipeline.call(build, [f"model={source}", f"tokens={matrix.spec}", *SMALL, *recipe, f"order={order}"])
        running.run(store, target)
        check(store, target, family, recipe, tmp_path / order)


@pytest.mark.slow
@torch.inference_mode()
def test_low_rank_experts_are_packed_by_the_recipe_that_we_add(tmp_path: Path) -> None:
    source, matrix = tiny.write("mixtral", tmp_path / "model", intermediate_size=96), running.matrix_of(tmp_path)
    store, out = running.store_in(tmp_path), tmp_path / "out"
    ours = ["order=decompose,slim", "slim=gptq", "decompose=0.3"]
    target = pipeline.call(
        pipeline.load(PIPELINES / "mixtral_unified.py"), [f"model={source}", f"tokens={matrix.spec}", *SMALL, *ours]
    )
    running.run(store, target)
    store.fetch(target.key, out)
    config = read_config(Folder(out))
    assert config["model_type"] == "moeflow_mixtral" and config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert any(f is not None and f.low_rank for f in layer_formats(config))
    report = running.reports(store, target)["expert bytes"]
    assert report["compressed"] < 0.25 * report["original"]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.isfinite(model(torch.arange(3, 12)[None]).logits).all()


@pytest.mark.parametrize("name", ["mixtral_unified", "deepseek_v2_lite_unified", "qwen15_moe_unified"])
def test_the_recipe_that_we_add_is_the_one_that_was_measured(name: str) -> None:
    """By the words in its description, with the defaults of every pipeline that takes it."""
    about = " ".join((PIPELINES / "mixtral_unified.py").read_text().partition("beside it:")[2].partition("takes three")[0].split())
    cited = re.findall(r"-p (\S+=[^\s`]+)", about)
    defaults = {n: p.default for n, p in inspect.signature(pipeline.load(PIPELINES / f"{name}.py")).parameters.items()}
    asked: dict[str, Any] = {}

    def build(
        *, order: str = "", slim: Slimming | None = defaults["slim"], decompose: Decomposition = defaults["decompose"]
    ) -> Step:
        asked.update(order=order, slim=slim, decompose=decompose)
        return toy.number(n=1)

    pipeline.call(build, cited)
    decomposed, slimmed = (stage.keywords["how"] for stage in TOGETHER["low rank, three tenths, then GPTQ"])
    assert asked == {"order": "decompose,slim", "slim": slimmed, "decompose": decomposed}


def check(store: Store, target: Step, family: str, recipe: list[str], out: Path) -> None:
    store.fetch(target.key, out)
    config, report = read_config(Folder(out)), running.reports(store, target)
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["num_hidden_layers"] == (2 if "trim=decoder_layers" in recipe else 3)
    if "trim=experts" not in recipe:  # of which as many may have gone from each layer
        assert config["model_type"] == (family if "trim=decoder_layers" in recipe else f"moeflow_{family}")
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(out)(torch.arange(3, 12)[None]).logits).all()
    assert report["expert bytes"]["compressed"] < 0.4 * report["expert bytes"]["original"]
    saved = 1 - report["operations at 2,048 tokens"]["compressed"] / report["operations at 2,048 tokens"]["original"]
    assert 0 < saved < 0.01 if "trim=experts" in recipe else saved > 0.01  # rows of routers only, or whole matrices


def test_what_is_no_recipe_is_refused_in_one_line(tmp_path: Path) -> None:
    source, matrix = tiny.write("mixtral", tmp_path / "model"), running.matrix_of(tmp_path)
    build = pipeline.load(PIPELINES / "mixtral_unified.py")
    for word, message in {
        "order=slim,prune": "'prune' is no stage; write slim,trim or trim,slim",
        "trim=heads": "trim.what=heads: choose one of experts, moe_blocks, decoder_layers",
        "trim.dropped=1.5": "dropped=1.5 moe_blocks is no whole number",
        "slim=int4": "slim.method=int4: choose one of magnitude, wanda",
        "order=slim,slim": "layer 0 is packed in 4 bits, groups of 8; slim the model",
        "slim.group=5": "group=5 does not divide 32 columns",
        "tune.rows=8": "order='slim,trim' has no stage 'tune'; say where the model is fine-tuned",
        "slim.bitz=3": "-p slim has no 'bitz'; did you mean 'bits'?",
    }.items():
        with pytest.raises(ValueError, match=message) as refused:
            arguments = [w for w in [*SMALL, "trim.dropped=1"] if w.split("=")[0] != word.split("=")[0]]
            pipeline.call(build, [f"model={source}", f"tokens={matrix.spec}", *arguments, word])
        assert "\n" not in str(refused.value)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.slow
def test_gptq_by_activation_order_and_grids_with_zero_points_are_reached_from_the_command_line(tmp_path: Path) -> None:
    source, matrix = tiny.write("mixtral", tmp_path / "model"), running.matrix_of(tmp_path)
    build, store = pipeline.load(PIPELINES / "mixtral_unified.py"), running.store_in(tmp_path)
    arguments = [f"model={source}", f"tokens={matrix.spec}", *SMALL, "order=slim", "slim=gptq"]
    keys = set()
    for more in ([], ["slim.activation_order=true"], ["slim.symmetric=false", "slim.packed=false"]):
        target = pipeline.call(build, [*arguments, *more])
        running.run(store, target)
        keys.add(store.manifest(target.key).digest)
    assert len(keys) == 3


@pytest.mark.slow
def test_what_trimming_left_is_fine_tuned_before_it_is_slimmed(tmp_path: Path) -> None:
    source, matrix = tiny.write("mixtral", tmp_path / "model"), running.matrix_of(tmp_path)
    store, out = running.store_in(tmp_path), tmp_path / "out"
    arguments = [*SMALL, *words.TUNED, *EXPERTS, "order=trim,tune,slim", "tune=experts", f"tune.text={matrix.spec}", "slim=gptq"]
    build = pipeline.load(PIPELINES / "mixtral_unified.py")
    target = running.alone(pipeline.call(build, [f"model={source}", f"tokens={matrix.spec}", *arguments]))
    running.run(store, target)
    store.fetch(target.key, out)
    done = [fact["step"] for fact in json.loads((out / "moeflow.json").read_text())["layers"][0]["done"]]
    assert done == ["rewrite.experts", "finetune.layer", "slim.layer"]
    assert "training loss" in running.reports(store, target)
