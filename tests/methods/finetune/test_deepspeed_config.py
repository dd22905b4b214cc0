"""A DeepSpeed configuration that is given: what it says of the result is in the key, the rest is not, and nothing gets lost."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moeflow.methods.data import steps as data_
from moeflow.methods.finetune import deepspeed_config
from moeflow.methods.finetune.recipe import Gang, Recipe
from moeflow.methods.graph import Sample
from moeflow.methods.recipes import tune
from tests import tiny
from tests.recipes import RECIPE
from tests.running import matrix_of, model_in

CONFIGURATION: dict[str, Any] = {
    "train_batch_size": 32,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.5,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000},
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": 50, "warmup_num_steps": 5, "cos_min_ratio": 0.1, "warmup_type": "linear"},
    },
    "wall_clock_breakdown": False,
}


def test_what_changes_the_result_goes_to_the_recipe_and_the_rest_to_the_gang() -> None:
    recipe, gang = deepspeed_config.merged(CONFIGURATION, RECIPE, Gang(processes=2), 999)
    assert recipe == replace(
        RECIPE, batch=32, clip=0.5, dtype="bfloat16", rate=2e-5, betas=(0.9, 0.95), epsilon=1e-6, decay=0.1, steps=50, warmup=0.1,
        floor=0.1,
    )  # fmt: skip
    assert (gang.zero, gang.offload, gang.micro, gang.processes) == (3, True, 4, 2)
    used = deepspeed_config.used(recipe, gang, 2048)
    assert used["train_micro_batch_size_per_gpu"] * used["gradient_accumulation_steps"] * 2 == used["train_batch_size"] == 32
    assert used["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000}
    assert used["optimizer"] == {"type": "AdamW", "params": {**CONFIGURATION["optimizer"]["params"], "torch_adam": False}}
    assert used["bf16"] == {"enabled": True} and used["gradient_clipping"] == 0.5 and used["wall_clock_breakdown"] is False


def test_what_is_used_gives_itself_when_it_is_given() -> None:
    recipe, gang = deepspeed_config.merged(CONFIGURATION, RECIPE, Gang(processes=2), 999)
    used = deepspeed_config.used(recipe, gang, 2048)
    again = deepspeed_config.merged(used, recipe, Gang(processes=2), 999)
    assert again[0] == recipe and deepspeed_config.used(*again, 2048) == used


def test_auto_leaves_a_value_to_the_arguments() -> None:
    auto = {"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    assert deepspeed_config.merged(deepspeed_config.read(auto), RECIPE, Gang(), 999) == (RECIPE, Gang())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 3}, "train_batch_size=32 is not .* times 2 processes; write train_batch_size=24, or"),
        ({"gradient_accumulation_steps": 5}, "a batch of 32 cannot be divided between 2 processes with .*=5; nearest: 30"),
        (
            {"train_batch_size": 33, "gradient_accumulation_steps": 0},
            "batch=33 cannot be divided between 2 processes; nearest: 32 or 34",
        ),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type='Lamb' is not known here; choose AdamW"),
        ({"optimizer": {"params": {"momentum": 0.9}}}, "optimizer.params.momentum is not known here; known: lr, betas"),
        ({"optimizer": {"params": {"adam_w_mode": False}}}, "only AdamW with bias correction is known here"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type='OneCycle' is not known here.*; choose WarmupCosineLR"),
        ({"scheduler": {"type": "WarmupCosineLR"}}, "the warm-up is a line from zero; say warmup_type='linear'"),
        ({"fp16": {"enabled": True}}, "train in bf16 .bf16.enabled. or fp32"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "device='nvme' is not known here; choose 'cpu' or 'none'",
        ),
        ({"curriculum_learning": {"enabled": True}}, "'curriculum_learning' is not known here; leave it out"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        deepspeed_config.merged({**CONFIGURATION, **change}, RECIPE, Gang(processes=2), 999)
    assert "\n" not in str(refused.value)


def test_two_spellings_of_a_run_have_one_key_and_where_it_runs_has_none(tmp_path: Path) -> None:
    model = model_in(tiny.write("mixtral", tmp_path / "model"))
    data = data_.tokens(matrix_of(tmp_path, sequences=8), model, Sample(8, 16))
    plain = tune.tune(model, data, Recipe(steps=20, batch=8, rate=2e-3, warmup=0.1, decay=0.1, clip=0.5, dtype="bfloat16"))
    said = {
        "train_batch_size": 8, "gradient_clipping": 0.5, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupCosineLR", "params": {"warmup_num_steps": 2, "warmup_type": "linear", "cos_min_ratio": 0.0},
        },
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(said))
    for spelling in (said, tmp_path / "ds.json", str(tmp_path / "ds.json")):
        gang = Gang(processes=2, zero=3, offload=True, checkpointing=True, save_every=7, device_memory=10**9, gpus=0, cpus=2)
        other = tune.tune(model, data, Recipe(steps=20, batch=4, rate=0.1), deepspeed=spelling, gang=gang)
        assert other.trained is not None and plain.trained is not None and other.trained.key == plain.trained.key
        resources = other.trained.resources
        assert (resources.processes, resources.cpus, resources.settings["zero"], resources.settings["micro"]) == (2, 2, 1, 2)
    assert tune.tune(model, data, Recipe(steps=20, batch=8, rate=3e-3)).trained.key != plain.trained.key
    (tmp_path / "ds.json").write_text("[]")
    with pytest.raises(ValueError, match="ds.json holds a list; a DeepSpeed configuration is one JSON object"):
        tune.tune(model, data, Recipe(steps=20, batch=8, rate=3e-3), deepspeed=tmp_path / "ds.json")
