"""Whole models are loaded whole, or not at all."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from moeflow.model.quiet import load_whole
from tests import tiny


def test_a_checkpoint_that_lacks_a_weight_is_refused_where_transformers_would_draw_it(tmp_path: Path) -> None:
    folder = tiny.write("mixtral", tmp_path / "model")
    assert load_whole(folder).config.model_type == "mixtral"
    tensors = load_file(folder / "model.safetensors")
    gone = next(n for n in sorted(tensors) if n.endswith("norm.weight"))
    save_file({n: t for n, t in tensors.items() if n != gone}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 of the weights that transformers loads for a mixtral, as {gone}: fetch the"):
        load_whole(folder)
