"""The families of checkpoints that moeflow can read. Adding one: a constant, a line below, a tiny model in tests/."""

from moeflow.arch.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from moeflow.arch.mixtral import MIXTRAL, PHIMOE
from moeflow.arch.qwen_moe import OLMOE, QWEN2_MOE, QWEN3_MOE
from moeflow.arch.spec import COMPRESSED, LAYERS, MAIN, MATRICES, Arch, Config, essential

FAMILIES = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, PHIMOE, DEEPSEEK_V2, DEEPSEEK_V3)


def arch_of(config: Config) -> Arch:
    """The family of the checkpoint with this config.json, compressed by moeflow or not.

    Raises ValueError, with the known families, where there is none.
    """
    for arch in FAMILIES:
        if arch.model_type == str(config.get("model_type")).removeprefix(COMPRESSED):
            return arch
    known = ", ".join(a.model_type for a in FAMILIES)
    raise ValueError(f"no family for model_type {config.get('model_type')!r}; known: {known}")


__all__ = ["COMPRESSED", "FAMILIES", "LAYERS", "MAIN", "MATRICES", "Arch", "Config", "arch_of", "essential"]
