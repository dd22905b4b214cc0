"""Words beside numbers: what a row of a report means, and how far the compressed model is from the original in it."""

from moeflow.report.figures import Figure, Interval

MEANING = {
    "parameters": "all weights, one by one",
    "active": "the weights that compute one token",
    "bytes": "all weights on disk",
    "expert_bytes": "the weights of the routed experts on disk",
    "experts": "routed experts in a layer, the mean of all layers",
    "layers": "decoder layers",
    "operations": "floating-point operations of one pass over a sequence",
    "cache": "what a token of context takes in memory beside the weights",
    "layer_error": "how far a layer's output moves without the experts that went, the mean of all layers",
    "experts_per_token": "experts that compute a token in a layer",
    "expert_products": "experts that compute a token in all layers together",
    "perplexity": "how surprised the model is by the text: 1 is not at all",
    "loss": "the logarithm of the perplexity",
    "kl": "how far its predictions are from the original's: 0 is not at all",
    "agreement": "how often both find the same next token likeliest",
    "prefill": "how fast a prompt is read",
    "decode": "how fast tokens are written",
    "resident": "all weights in memory once loaded",
    "budget": "what the fit may take at most",
    "taken": "what the fit takes of its budget",
    "predicted_kl": "the divergence that the fit expects, on the calibration's text",
    "measured_kl": "the divergence on the calibration's own text",
    "training_loss": "the first batch of the training beside the last",
}
"""By the word that a gate names a figure by; others are what their task says."""

DISTANCES = ("kl", "layer_error", "agreement", "predicted_kl", "measured_kl")
"""The figures of how far the compressed model is from the original, which is at no distance from itself."""


def meaning(figure: Figure) -> str:
    """What a row means; "" if its name says all that is known here."""
    return MEANING.get(figure.figure, "")


def per_cent(figure: Figure) -> str:
    """The change in per cent of the original; "" where there is none to compare with."""
    if figure.change is None or not figure.original:
        return ""
    change = 100 * figure.change / abs(figure.original)
    if change == 0:
        return "the same"
    return f"{change:+.0f} %" if abs(change) >= 100 else f"{change:+.2g} %" if abs(change) < 10 else f"{change:+.1f} %"


def moved(figure: Figure) -> str:
    """The change in per cent, or that none was measured: of a speed whose quartiles overlap those of the original's."""
    return "no difference measured" if figure.change_interval is None and verdict(figure) == "undecided" else per_cent(figure)


def verdict(figure: Figure) -> str:
    """Whether the change is for the better, or "undecided" where its interval holds both; "" where neither is better.

    What measures the distance from the original can only be worse, and is not called so.
    """
    if not figure.better or not figure.change or figure.figure in DISTANCES:
        return ""
    if any("no difference measured" in note and figure.name in note.partition(":")[0].split() for note in figure.notes):
        return "undecided"  # a speed whose quartiles overlap
    return decided(figure.change, figure.better, figure.change_interval)


def decided(change: float, better: str, interval: Interval | None) -> str:
    """Whether a change is for the better, by which is `better`, "lower" or "higher"; "undecided" where its interval holds both."""
    if interval is not None and interval[0] <= 0 <= interval[1]:
        return "undecided"
    return "better" if (change < 0) == (better == "lower") else "worse"


def change(figure: Figure) -> str:
    """Both in a few words: "-22.0 %, better"."""
    return ", ".join(word for word in (per_cent(figure), verdict(figure)) if word and word != "the same") or per_cent(figure)
