"""The shards that a DeepSpeed ZeRO run saved, converted into a checkpoint that transformers loads: by DeepSpeed's own code.

A program of its own, `python -m moeflow.methods.finetune.zero FOLDER OUT`. The shards are pickles, which run code when they are
read: convert only what you have trained. The whole model has to fit into memory, in fp32.
"""

import shutil
import sys
from pathlib import Path

from moeflow.model_files import READ, named_like, of_model


def convert(folder: Path, out: Path) -> None:
    """Write the model whose ZeRO shards lie in `folder`, beside its config.json, to `out`, in the precision of its config.json.

    Raises ValueError for shards that are not those of that model, OSError, and what DeepSpeed raises for shards that are not whole.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has ZeRO shards and no config.json; copy the model's config.json and tokenizer beside them")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from transformers import AutoConfig, AutoModelForCausalLM

    tag = None if (folder / "latest").is_file() else max((p.name for p in folder.glob("global_step*")), key=_step)
    state = {name.removeprefix("module."): t for name, t in get_fp32_state_dict_from_zero_checkpoint(str(folder), tag).items()}
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if name not in (model._tied_weights_keys or ())]
    if missing or unexpected:
        raise ValueError(
            f"{folder} holds the shards of another model than its config.json says: it lacks {missing[:2] or 'nothing'} and has "
            f"{unexpected[:2] or 'nothing'} besides; train again, or put the right config.json there"
        )
    model.save_pretrained(out)
    for name in of_model(p.name for p in folder.iterdir() if p.is_file()):
        if not named_like(name, READ):  # its tokenizer, licence and so on
            shutil.copyfile(folder / name, out / name)


def _step(name: str) -> int:
    digits = name.removeprefix("global_step")
    return int(digits) if digits.isdigit() else -1


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:  # DeepSpeed raises what it likes for shards that do not fit together
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))
