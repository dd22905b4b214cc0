"""What plans are made of."""

from moeflow.model.spec import NAMES, element_bytes


def test_a_number_has_eight_four_or_two_bytes_in_the_precision_of_a_run() -> None:
    assert {name: element_bytes({}, name) for name in NAMES.values()} == {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
    assert element_bytes({"dtype": "bfloat16"}, "auto") == 2 and element_bytes({}, "auto") == 4
