"""Load what moeflow wrote, of any form, as transformers loads what it knows. Importing this module imports no torch."""

from os import PathLike
from typing import Any

from moeflow.model import autoload
from moeflow.model.quiet import quiet, quiet_hooks


def model_in(folder: str | PathLike[str], **options: Any) -> Any:
    """The model in a folder, in its own precision, ready to use; `options` are those of transformers' `from_pretrained`.

    Of a model that reads images, too, everything is loaded. Raises what transformers raises, and TypeError for a `device`.
    """
    if "device" in options:
        raise TypeError(f"device={options['device']!r}: where a model is loaded is said by device_map={str(options['device'])!r}")
    autoload.register()
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText
    if not getattr(config, "quantization_config", None):
        return auto.from_pretrained(folder, **options).eval()
    with quiet():
        model = auto.from_pretrained(folder, **options).eval()
    quiet_hooks(model)
    return model


def tokenizer_in(folder: str | PathLike[str], **options: Any) -> Any:
    """The tokenizer in a folder; `options` are those of transformers' `from_pretrained`."""
    autoload.register()
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder, **options)
