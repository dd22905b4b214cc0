"""Two checkpoints are measured in vLLM, as the step does it, in a process of its own."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moeflow.methods.evaluate.options import Serving
from moeflow.methods.evaluate.served import measured, rows_of
from tests.serve import forms

pytest.importorskip("vllm", reason="needs vLLM; `make test-serve` makes an environment with it")
pytestmark = pytest.mark.serve


EAGER = '{"enforce_eager": true}'
"""Without compiling either model, which takes a minute: one of the forms is compiled, as by default."""


@pytest.mark.parametrize(
    "form, way, options",
    [("counts", "native", ""), ("low_rank", "native", EAGER), ("skipping", "general", EAGER)],
    ids=["counts", "low_rank", "skipping"],
)
def test_what_is_served_is_what_transformers_computes_and_its_speed_is_measured(
    form: str, way: str, options: str, tmp_path: Path
) -> None:
    original = forms.original("mixtral", tmp_path / "original")
    made = forms.FORMS_OF[form](original, tmp_path / form)
    how = Serving(sys.executable, (1, 8), prompt=16, tokens=8, rounds=2, dtype="float32", options=options)
    context: Any = SimpleNamespace(settings={"python": sys.executable, "minutes": 10}, scratch=tmp_path, progress=lambda *_: None)
    ids = np.random.default_rng(0).integers(3, 96, (8, 32))
    result = measured((original, made), ids, how, context)
    assert result.facts["ways"] == ["stock", way] and result.facts["together"] and result.facts["engine"].startswith("vllm")
    assert not result.notes, "transformers was asked, too"
    rows, _ = rows_of(result, how)
    found = {(row["figure"], row.get("text", "")): row for row in rows if "figure" in row}
    for side in ("original", "compressed"):
        assert found["served_agreement", ""][side] == 1 and found["served_apart", ""][side] < 5e-4
        for n in ("1", "8"):
            assert all(found[word, n][side] > 0 for word in ("served_prefill", "served_decode", "served_memory"))
    on_disk = sum(f.stat().st_size for f in original.glob("*.safetensors"))
    assert found["served_resident", ""]["original"] == pytest.approx(on_disk, rel=0.05)
    if form != "skipping":
        assert found["served_resident", ""]["compressed"] < found["served_resident", ""]["original"]
