"""What becomes of a fine-tuning towards the original: it is merged, or kept beside packed weights, or left."""

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite

from moeflow.methods.fit.choosing import Fitted
from moeflow.sizes import bytes_text

KEPT, MERGED = "kept", "merged"
WORDS = {KEPT: "fine-tuned, kept beside the packed weights", MERGED: "fine-tuned, and merged", "": "not fine-tuned"}
"""The ways to take what was trained."""


def with_recovered(fitted: Fitted, tried: Mapping[str, float], more: float) -> Fitted:
    """The choice with the way that is closest to the original, if it is closer than the model was.

    `tried`: the measured divergence by each way; `more`: how much more is taken by what is kept beside packed weights, in the unit
    of the budget, which has to have room for it. A divergence that is no number is that of a model which is broken.
    """
    over = max(0.0, fitted.size + more - fitted.budget) if KEPT in tried else 0.0
    open_to = {way: apart for way, apart in tried.items() if isfinite(apart) and (way != KEPT or not over)}
    best = min(open_to, key=lambda way: open_to[way], default="")
    if best and fitted.before is not None and open_to[best] >= fitted.before:
        best = ""
    apart = open_to[best] if best else fitted.before
    return replace(fitted, before=apart, recovered=best, tried=tried, over=over, size=fitted.size + more * (best == KEPT))


def told(before: Fitted, after: Fitted) -> str:
    """What was measured, and what is taken."""
    each = "; ".join(f"{WORDS[way]} {apart:.6f}" for way, apart in after.tried.items())
    amount = f"{after.over:,.0f} operations" if after.unit == "operations" else bytes_text(after.over)
    room = f"; to keep it, the budget would have to be {amount} larger" * bool(after.over)
    return f"KL to the original {before.before:.6f}; {each}{room}: {WORDS[after.recovered]}"
