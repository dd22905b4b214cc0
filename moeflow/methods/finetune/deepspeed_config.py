"""Translate a DeepSpeed configuration into a recipe and a gang, and back. No torch.

The settings that change the result go into the recipe, and so into the key; the others go into the gang. The configuration that
DeepSpeed gets is made from both again, so two spellings of one run have one key.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from moeflow.methods.finetune.recipe import Gang, Recipe

HOW = (
    "zero_optimization", "activation_checkpointing", "aio", "prescale_gradients", "gradient_predivide_factor",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_allgather", "steps_per_print", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "comms_logger", "flops_profiler", "timers",
)  # fmt: skip
"""Settings passed to DeepSpeed unchanged: they say where and how it computes."""

OPTIMIZER = {"lr": "rate", "betas": "betas", "eps": "epsilon", "weight_decay": "decay"}
"""DeepSpeed's names of optimizer parameters, mapped to the recipe's."""

SCHEDULER = ("total_num_steps", "warmup_num_steps", "cos_min_ratio", "warmup_type", "warmup_min_ratio")
"""DeepSpeed's names of scheduler parameters."""


def read(configuration: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """Read a configuration or its file, without "auto" and null values. Raises ValueError if it is not a JSON object."""
    text = Path(configuration).read_text() if isinstance(configuration, str | Path) else json.dumps(configuration or {})
    try:
        # transformers' Trainer writes "auto" for a value that is set elsewhere
        settings = json.loads(text, object_hook=lambda part: {k: v for k, v in part.items() if v not in ("auto", None)})
    except ValueError as error:
        raise ValueError(f"{configuration} is no JSON ({error}); a DeepSpeed configuration is one JSON object") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{configuration} holds a {type(settings).__name__}; a DeepSpeed configuration is one JSON object")
    return settings


def merged(configuration: Mapping[str, Any], recipe: Recipe, gang: Gang, rows: int) -> tuple[Recipe, Gang]:
    """Apply the configuration to the recipe, for this many rows of data, and to the gang.

    Raises ValueError for settings that are unknown or contradict each other.
    """
    left = dict(configuration)
    changes = _optimizer(left.pop("optimizer", {}))
    if "gradient_clipping" in left:
        changes["clip"] = float(left.pop("gradient_clipping"))
    if left.pop("fp16", {}).get("enabled"):
        raise ValueError("fp16.enabled: fp16 skips steps when it overflows; train in bf16 (bf16.enabled) or fp32")
    bf16 = left.pop("bf16", {}) or left.pop("bfloat16", {})
    if more := sorted(set(bf16) - {"enabled"}):
        raise ValueError(f"bf16.{more[0]} is not known here; leave it out (known: enabled)")
    if "enabled" in bf16:
        changes["dtype"] = "bfloat16" if bf16["enabled"] else "float32"
    recipe, gang = _batches(left, replace(recipe, **changes), gang)
    recipe = replace(recipe, **_schedule(left.pop("scheduler", {}), recipe, rows))
    zero = dict(left.pop("zero_optimization", {}))
    if lossy := sorted(name for name in zero if name.startswith("zero_quantized") and zero[name]):
        raise ValueError(f"zero_optimization.{lossy[0]} changes what is computed, and is not known here; leave it out")
    device = zero.get("offload_optimizer", {}).get("device", "cpu" if gang.offload else "none")
    if device not in ("cpu", "none"):
        raise ValueError(f"zero_optimization.offload_optimizer.device={device!r} is not known here; choose 'cpu' or 'none'")
    gang = replace(gang, zero=cast(Any, int(zero.pop("stage", gang.zero))), offload=device == "cpu")
    if unknown := sorted(set(left) - set(HOW)):
        raise ValueError(f"the DeepSpeed configuration's {unknown[0]!r} is not known here; leave it out (known: HOW in {__name__})")
    how = left | ({"zero_optimization": zero} if zero else {})
    return recipe, replace(gang, deepspeed={**gang.deepspeed, **how})


def used(recipe: Recipe, gang: Gang, length: int) -> dict[str, Any]:
    """The configuration that DeepSpeed gets for sequences of this length. Raises ValueError if gang and batch do not fit.

    In bf16 ZeRO 0 becomes 1, because DeepSpeed's optimizer for 0 is another, with other results.
    """
    gang.check(recipe.batch)
    micro = gang.micro_of(recipe.batch, length)
    adam = {ours: getattr(recipe, name) for ours, name in OPTIMIZER.items()}
    stage = max(gang.zero, 1) if recipe.dtype == "bfloat16" else gang.zero
    zero = {**gang.deepspeed.get("zero_optimization", {}), "stage": stage}
    if gang.offload:
        zero["offload_optimizer"] = {"device": "cpu", **zero.get("offload_optimizer", {})}
    return {
        "steps_per_print": 10**9,
        **gang.deepspeed,
        "train_batch_size": recipe.batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": recipe.batch // (gang.processes * micro),
        "gradient_clipping": recipe.clip,
        "bf16": {"enabled": recipe.dtype == "bfloat16"},
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {**adam, "betas": list(recipe.betas), "torch_adam": not gang.offload}},
    }


def _optimizer(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that this part sets."""
    if (kind := optimizer.get("type", "AdamW")) not in ("AdamW", "Adam"):
        raise ValueError(f"optimizer.type={kind!r} is not known here; choose AdamW")
    params = dict(optimizer.get("params", {}))
    params.pop("torch_adam", None)  # one of several equal implementations
    if not params.pop("adam_w_mode", True) or not params.pop("bias_correction", True) or params.pop("amsgrad", False):
        raise ValueError("optimizer.params: only AdamW with bias correction is known here (adam_w_mode, bias_correction true)")
    if unknown := sorted(set(params) - set(OPTIMIZER)):
        raise ValueError(f"optimizer.params.{unknown[0]} is not known here; known: {', '.join(OPTIMIZER)}")
    try:  # JSON may spell 2e-5 as "2e-5"
        return {OPTIMIZER[n]: tuple(map(float, v)) if n == "betas" else float(v) for n, v in params.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer.params: {error}; write numbers") from None


def _schedule(scheduler: Mapping[str, Any], recipe: Recipe, rows: int) -> dict[str, Any]:
    """The fields of a recipe that this part sets."""
    if not scheduler:
        return {}
    if (kind := scheduler.get("type")) != "WarmupCosineLR":
        raise ValueError(
            f"scheduler.type={kind!r} is not known here: rates rise in a line and fall as a cosine; choose WarmupCosineLR"
        )
    params = scheduler.get("params", {})
    if params.get("warmup_type", "log") != "linear" or params.get("warmup_min_ratio", 0.0):
        raise ValueError("scheduler.params: the warm-up is a line from zero; say warmup_type='linear' and no warmup_min_ratio")
    if unknown := sorted(set(params) - set(SCHEDULER)):
        raise ValueError(f"scheduler.params.{unknown[0]} is not known here; known: {', '.join(SCHEDULER)}")
    steps = int(params.get("total_num_steps", 0)) or recipe.steps_of(rows)
    warm = int(params.get("warmup_num_steps", round(recipe.warmup * steps)))
    floor = float(params.get("cos_min_ratio", 1e-4))
    if warm >= steps:
        raise ValueError(f"a warm-up of {warm} steps must be shorter than the {steps} steps of the training")
    return {"steps": steps, "warmup": warm / steps, "floor": floor, "every": recipe.every if recipe.every < steps else 0}


def _batches(left: dict[str, Any], recipe: Recipe, gang: Gang) -> tuple[Recipe, Gang]:
    """Set the batch sizes of recipe and gang from `left`, and remove them from it."""
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    micro, accumulated, whole = (int(left.pop(name, 0)) for name in names)
    if micro and accumulated:
        product = micro * accumulated * gang.processes
        if whole and whole != product:
            raise ValueError(
                f"train_batch_size={whole} is not train_micro_batch_size_per_gpu={micro} times gradient_accumulation_steps="
                f"{accumulated} times {gang.processes} processes; write train_batch_size={product}, or leave one of them out"
            )
        whole = product
    recipe = replace(recipe, batch=whole or recipe.batch)
    if accumulated and not micro:
        step = accumulated * gang.processes
        micro, left_over = divmod(recipe.batch, step)
        if left_over:
            raise ValueError(
                f"a batch of {recipe.batch} cannot be divided between {gang.processes} processes with gradient_accumulation_steps="
                f"{accumulated}; nearest: {max(step, recipe.batch - left_over)}"
            )
    gang = replace(gang, micro=micro or gang.micro)
    gang.check(recipe.batch)
    return recipe, gang
