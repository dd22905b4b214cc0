"""Models of transformers of the type that a config.json names, tiny or without weights."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from moeflow.arch import Config
from moeflow.arch.by_layer import CHOSEN, EXPERTS
from moeflow.arch.spec import ALIASES
from moeflow.model.skeleton import config_of
from moeflow.model.structure.anatomy import Unfit, Unknown


def built(config: Config, device: str = "cpu") -> Any:
    """A model with random weights, in fp32, ready for inference.

    Raises Unknown if transformers does not know its type, Unfit if it does not build it.
    """
    hf = configuration(config)
    kind: Any = class_of(config, hf)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            return kind._from_config(hf, dtype=torch.float32).eval()
    except Exception as error:  # of any model's own code
        raise Unfit(f"transformers builds no {config['model_type']} of this config.json: {one_line(error)}") from None


def configuration(config: Config) -> PreTrainedConfig:
    """transformers' configuration of a config.json. Raises Unknown if it has none of this type, Unfit if it refuses it."""
    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise Unknown(f"transformers {transformers.__version__} has no model type {model_type!r}")
    try:
        return config_of({k: v for k, v in config.items() if k not in ("quantization_config", "architectures")})
    except Exception as error:  # of any configuration's own checks
        raise Unfit(f"transformers refuses this config.json: {one_line(error)}") from None


def class_of(config: Config, hf: PreTrainedConfig) -> Any:
    """The class that config.json names, or the one that transformers has for language, alone or with images."""
    named = next(iter(config.get("architectures") or ()), "")
    if named and hasattr(transformers, named):
        return getattr(transformers, named)
    nested = inside_of(config)
    mappings = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    for mapping in mappings if nested else mappings[::-1]:
        if type(hf) in mapping:
            found = mapping[type(hf)]
            return found[0] if isinstance(found, tuple) else found
    raise Unknown(f"transformers has no language model class for {config['model_type']}")


def inside_of(config: Config) -> tuple[str, ...]:
    """The keys that lead to the configuration that has the experts; empty if they are in config.json itself."""
    if experts_key(config):
        return ()
    for key in ("text_config", *config):
        value = config.get(key)
        if isinstance(value, Mapping) and experts_key(dict(value)):
            return (key,)
        if isinstance(value, Mapping) and key == "thinker_config" and inside_of(dict(value)):
            return (key, *inside_of(dict(value)))
    return ()


def text_of(config: Config, inside: tuple[str, ...]) -> Config:
    """The configuration of the text model."""
    for key in inside:
        config = config[key]
    return dict(config)


def type_of(config: Config, inside: tuple[str, ...]) -> str:
    """The model type of the text model: as config.json says, or as transformers has it where it knows no such type."""
    said = text_of(config, inside).get("model_type")
    if said in CONFIG_MAPPING or said in ALIASES:
        return str(said)
    hf: Any = configuration(config)
    for key in inside:
        hf = getattr(hf, key)
    return str(type(hf).model_type)  # of the class: an instance repeats what it was told


def whole(config: Config) -> Config:
    """The configuration with everything that transformers takes where it says nothing. Raises Unknown if it refuses it."""
    made = configuration(config).to_dict()
    return _filled(config, {k: v for k, v in made.items() if k != "architectures"})


def _filled(config: Config, made: Mapping[str, Any]) -> Config:
    """`config` with the entries of `made` that it lacks, in nested configurations, too."""
    made = {str(k): v for k, v in made.items()}  # as they are in JSON
    both = {k: v for k, v in made.items() if k not in config and v is not None}
    nested = {k: _filled(v, made[k]) for k, v in config.items() if isinstance(v, dict) and isinstance(made.get(k), Mapping)}
    return config | nested | both


def experts_key(config: Config) -> str:
    """The key for the number of routed experts; "" if there is none. Raises Unknown if it differs by layer."""
    for key in EXPERTS:
        if isinstance(value := config.get(key), list) and len({*map(str, value)}) > 1:
            raise Unknown(f"{key} of config.json is {value!s:.60}: layers have different numbers of experts")
    return next((k for k in EXPERTS if type(config.get(k)) is int and config[k] > 1), "")


def top_k_key(config: Config) -> str:
    """The key for the experts of a token. Raises Unknown if there is none, or it is no number."""
    key = next((k for k in CHOSEN if config.get(k) is not None), "")
    if not key:
        raise Unknown("config.json does not say how many experts a token gets")
    if type(config[key]) is not int:
        raise Unknown(f"{key} of config.json is {config[key]!r:.60}: layers choose different numbers of experts")
    return key


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
