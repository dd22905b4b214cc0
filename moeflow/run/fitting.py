"""The words of a fit: a model and one budget, as parameters of the pipeline `fit`. For the command line and for Python alike."""

from collections.abc import Sequence

from moeflow.engines import engine_word

PIPELINE = "fit"
"""The pipeline that comes with moeflow under this name."""


def budget_words(*, bytes: str = "", ratio: float | None = None, resident: str = "", speed: str = "") -> list[str]:
    """The words of a budget, of what is given of it."""
    budget = {"bytes": bytes, "ratio": "" if ratio is None else ratio, "resident": resident, "speed": speed.removesuffix("x")}
    return [f"budget.{unit}={word}" for unit, word in budget.items() if word != ""]


def engine_words(engine: str = "", tp: int = 1, ep: int = 1) -> list[str]:
    """The words that say what is to load the result, and on how many devices. Raises ValueError as `engine_word`."""
    engine_word(engine, tp, ep)
    given = {"engine": engine, "tp": tp if tp > 1 else "", "ep": ep if ep > 1 else ""}
    return [f"offers.{name}={word}" for name, word in given.items() if word != ""]


def fit_words(model: str, budget: Sequence[str], *, engine: Sequence[str] = (), recover: bool = False) -> list[str]:
    """The words that fit this model into a budget; `engine`: those of `engine_words`."""
    return [f"model={model}", *budget, *engine, *["recover.loss=kl"] * recover]


def check_budget(words: Sequence[str]) -> None:
    """Raise ValueError if none of the words gives a budget."""
    if not any(word.startswith("budget.") for word in words):
        raise ValueError("give one budget: --bytes 24GB, --ratio 0.25, --resident 24GB or --speed 1.5x")
