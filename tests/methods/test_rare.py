"""What becomes of experts that too few calibration tokens reach."""

import pytest

from moeflow.methods.rare import check_least, treatments


def test_an_expert_with_too_few_tokens_gets_the_fallback() -> None:
    how = {"method": "gptq", "by_weights": "round_to_nearest"}
    assert treatments([0, 5, 6], 6, "weights", **how) == ["round_to_nearest", "round_to_nearest", "gptq"]
    assert treatments([0, 1, 9], 1, "keep", **how) == ["keep", "gptq", "gptq"]
    with pytest.raises(ValueError, match="least=0 tokens must be at least 1"):
        check_least(0)
