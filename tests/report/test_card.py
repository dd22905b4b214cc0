"""What travels with a checkpoint: a card that holds for it, and a recipe that makes it again."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from moeflow.report import about, card, layers, loading
from moeflow.report.layers import Checkpoint
from moeflow.run import pipeline, recipe
from moeflow.run.opening import shipped
from moeflow.store import Store
from tests.report.conftest import PIPELINE, call, last_json


@pytest.fixture(scope="module")
def pulled(told: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pulled") / "out"
    printed = last_json(call(told, "pull", "told_pipeline@1", out, "--json"))
    assert printed["described"] == ["README.md", "recipe.yaml"]
    return out


def test_the_card_has_the_metadata_of_the_hub_and_takes_the_licence_from_the_source(pulled: Path) -> None:
    data = ModelCard.load(pulled / "README.md").data
    assert (data.license, data.base_model, data.language) == ("apache-2.0", "org/first", ["en"])
    assert data.library_name == "transformers" and {"moeflow", "pruned"} <= {*data.tags} and "quantized" not in data.tags
    assert (pulled / "LICENSE").exists()


def test_the_card_tells_what_was_done_how_good_it_is_and_the_exact_command(pulled: Path) -> None:
    text = (pulled / "README.md").read_text()
    assert "The source's own card" not in text
    assert "| 0 to 2 | 8 | 6 | 6 of 8 experts stay |" in text
    assert f"moeflow run {shlex.quote(str(PIPELINE))} -p model=model -p tokens=tokens-8-16-0.npy -p keep=6" in text
    (divergence,) = [line for line in text.splitlines() if line.startswith("| KL to the original")]
    assert "prose &#124; notes" in divergence, "a bar in a text's name ends no cell"
    assert "| numbers, exact\\_match | 0.8 | 0.6 (0.5 to 0.7) | -25.0 %, worse |" in text
    assert "judged by its predictions on text" not in text, "it was judged by a task, too"
    assert "It was not fine-tuned" in text and "import moeflow" not in text
    assert "\n````text\n" in text, "what a model writes may hold fences of its own"


def test_a_card_of_what_was_multiplied_out_claims_no_saving(told: Path) -> None:
    of = about.of(Store.open(str(told / "store")), "told_pipeline@1")
    assert of.checkpoint is not None
    plain, dense = (card.card(of, of.checkpoint, dense=is_so) for is_so in (False, True))
    assert "Its weights take" in plain and "Its weights take" not in dense
    assert "as large and as fast as if they were whole" in dense and "Sizes and speeds above are those of" in dense


def test_a_recipe_makes_the_same_key_again_from_anywhere(told: Path, pulled: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load((pulled / "recipe.yaml").read_text())
    assert raw["parameters"]["keep"] == 6 and raw["parameters"]["search.parents"] == "0.2", "defaults are there, too"
    pins = {source["uri"]: source["files"] for source in raw["sources"]}
    assert raw["seeds"] == {"search.seed": 3} and pins[str(told / "model")]["LICENSE"].startswith("sha256:")
    again = last_json(call(told, "run", pulled / "recipe.yaml", "--name", "again", "--json"))
    assert (again["key"], again["version"], again["steps"]["run"]) == (raw["key"], 1, 0)
    made = last_json(call(tmp_path, "plan", pulled / "recipe.yaml", "--json"))
    assert made["key"] == raw["key"] and made["steps"]["stored"] == 0, "in a store that has nothing of it, too"


def test_a_recipe_with_another_parameter_makes_another_version(told: Path, pulled: Path) -> None:
    (five,) = [v for v in json.loads(call(told, "ls", "--json").stdout) if v["ref"] == "told_pipeline@2"]
    assert last_json(call(told, "plan", pulled / "recipe.yaml", "-p", "keep=5", "--json"))["key"] == five["key"]


def test_a_recipe_whose_source_has_changed_is_refused_with_what_has_changed(told: Path, pulled: Path, tmp_path: Path) -> None:
    shutil.copytree(told / "model", tmp_path / "model")
    shutil.copy(told / "tokens-8-16-0.npy", tmp_path)
    (tmp_path / "model" / "LICENSE").write_text("Ask us first.\n")
    text = (pulled / "recipe.yaml").read_text().replace(str(told), str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(text)
    refused = call(told, "run", tmp_path / "recipe.yaml")
    (line,) = refused.stderr.splitlines()
    assert refused.exit_code == 2 and f"LICENSE at {tmp_path / 'model'} was sha256:" in line and "-p model=model" in line


def test_a_recipe_that_somebody_has_changed_is_no_longer_that_of_its_key(told: Path, pulled: Path, tmp_path: Path) -> None:
    text = (pulled / "recipe.yaml").read_text()
    for before, after, said in (
        ("keep: 6", "keep: 5", "a parameter in recipe.yaml was changed"),
        ("prune.choose: ", "prune.choose: 9", "the step prune.choose was version 9"),
    ):
        assert before in text
        (tmp_path / "recipe.yaml").write_text(text.replace(before, after).replace("key: checkpoint", "key: other"))
        refused = call(told, "plan", tmp_path / "recipe.yaml")
        assert refused.exit_code == 2 and said in refused.stderr, refused.stderr
    assert call(told, "plan", tmp_path / "recipe.yaml", "-p", "keep=6").exit_code == 0, "a parameter that is given anew is meant so"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a list", "its `pipeline` is missing"),
        ("pipeline: {", "is no YAML"),
        ("pipeline: a.py\nparameters: [keep]\nkey: k", "its `parameters` is \"['keep']\", and must be a mapping"),
        ("pipeline: a.py\nparameters: {}", "its `key` is missing"),
        ("pipeline: none.py\nparameters: {}\nkey: k", "its pipeline none.py lies neither in"),
        ("pipeline: {here}\nparameters: {{kep: 6, model: model}}\nkey: k", "did you mean 'keep'?"),
    ],
)
def test_a_recipe_that_is_none_is_told_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text.format(here=PIPELINE) if "{here}" in text else text)
    refused = call(tmp_path, "run", tmp_path / "recipe.yaml")
    (line,) = refused.stderr.splitlines()
    assert refused.exit_code == 2 and said.replace('"', "").replace("\\", "") in line.replace('"', "")


def test_names_on_the_hub_are_kept_at_their_commits() -> None:
    commit = "0" * 40
    pinned = [f"hf://models/org/name@{commit}", f"hf://datasets/org/text@{commit}"]
    assert recipe.with_commits("org/name", pinned) == recipe.with_commits("org/name@main", pinned) == f"org/name@{commit}"
    assert recipe.with_commits("hf://datasets/org/text@main/a.jsonl#x*2,other/one", pinned) == (
        f"hf://datasets/org/text@{commit}/a.jsonl#x*2,other/one"
    )


@pytest.mark.parametrize("name", ["mixtral", "fit", "qwen15_moe_unified"])
def test_all_parameters_of_a_shipped_pipeline_are_words_that_are_read_as_the_same_again(name: str) -> None:
    build = pipeline.load(shipped()[name])
    given = ["model=m", "tasks=a.jsonl", "tasks.tokens=12", "prompts=none", "recover.loss=kl" if name == "fit" else "tune=lora"]
    given += ["budget.ratio=0.1234567891"] * (name == "fit")
    every = recipe.parameters(build, given)
    assert (every["tasks.tokens"], every["tasks.names"], every["prompts"]) == ("12", "a.jsonl", "none")
    words = [f"{name}={word}" for name, word in every.items()]
    assert pipeline.values(build, words) == pipeline.values(build, given)


def form(config: dict[str, Any], kept: tuple[int, ...] | None = None) -> Checkpoint:
    layer = layers.Layer(0, 0, 8, kept, (), {}, None, None, None, None)
    return Checkpoint({"model_type": "mixtral", **config}, (layer,), (), ("config.json", "tokenizer.json"))


def packed(bits: int, group: int) -> dict[str, Any]:
    weights = {"num_bits": bits, "group_size": group}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}}


def test_how_to_load_a_checkpoint_is_what_holds_for_its_form() -> None:
    plain = loading.of(form({}, kept=(0, 1, 2)))
    assert plain.library == "transformers" and "vllm serve" in plain.engine and "divides 3" in plain.caveats[0]
    differ = loading.of(form({"model_type": "moeflow_mixtral", "moeflow_layers": [{"experts": 8}, {"experts": 6}]}))
    assert differ.library == "moeflow" and differ.code.startswith("import moeflow") and "refuse" in differ.engine
    assert "--dense" not in differ.engine and "different numbers of experts" in differ.caveats[0]
    both = packed(4, 16)
    both["quantization_config"]["config_groups"] |= {"group_1": {"weights": {"num_bits": 3, "group_size": 16}}}
    both |= {"model_type": "moeflow_mixtral", "auto_map": {"AutoConfig": "moeflow.Config"}}
    assert loading.of(form(both)).caveats[1:] == ("Its experts are stored in 3 or 4 bits, in groups of 16.",)
    three = [layers.Layer(i, i, 8, None, (), {}, bits, None, None, None) for i, bits in enumerate((8, None, 8))]
    some = Checkpoint({"model_type": "mixtral", **packed(8, 16)}, tuple(three), (), ("config.json",))
    (told,) = loading.of(some).caveats
    assert told == "Its experts are stored in 8 bits, in groups of 16, but for layer 1, where they are not quantized."
    assert "has never run" in loading.of(form({"auto_map": {"AutoConfig": "theirs.Config"}})).caveats[-1]
    low = form({"model_type": "moeflow_mixtral", "moeflow_layers": [{"experts": 8, "ranks": {"up": [4] * 8}}]})
    assert "moeflow pull small@1 DIR --dense" in loading.of(low, ref="small@1").engine
    assert (
        "vllm serve" in loading.of(form(packed(4, 32))).engine and "compressed-tensors" in loading.of(form(packed(4, 32))).packages
    )
    three = loading.of(form(packed(3, 32))).engine
    assert three.startswith("vLLM does not load it: experts are packed in 3 bits") and three.endswith("by moeflow, vllm-moeflow.")
    assert "AutoModelForImageTextToText" in loading.of(form({"vision_config": {}, "text_config": {}})).code
