"""What becomes of a fine-tuning towards the original: it is merged, or kept beside packed weights, or left."""

from collections.abc import Mapping
from dataclasses import replace
from math import inf, isfinite

from moeflow.methods.fit.choosing import Fitted
from moeflow.sizes import bytes_text

KEPT, MERGED = "kept", "merged"
WORDS = {KEPT: "fine-tuned, kept beside the packed weights", MERGED: "fine-tuned, and merged", "": "not fine-tuned"}
"""The ways to take what was trained."""


def with_recovered(fitted: Fitted, tried: Mapping[str, float], more: float, unseen: Mapping[str, float] | None = None) -> Fitted:
    """The choice with the way that is closest to the original, if it is closer than the model was.

    `tried`: the measured divergence by each way; `more`: how much more is taken by what is kept beside packed weights, in the unit
    of the budget, which has to have room for it. A divergence that is no number is that of a model which is broken. `unseen`: the
    same on other tokens, and of the model as it was (""); both count alike then, for the first ones were calibrated on, which
    flatters the model as it was, and the others are of the kind that was trained on.
    """
    over = max(0.0, fitted.size + more - fitted.budget) if KEPT in tried else 0.0
    apart = {way: kl + (unseen or {}).get(way, 0.0) for way, kl in {"": fitted.before, **tried}.items() if kl is not None}
    best = min((way for way in tried if isfinite(apart[way]) and (way != KEPT or not over)), key=lambda way: apart[way], default="")
    if best and apart[best] >= apart.get("", inf):
        best = ""
    return replace(
        fitted, before=tried[best] if best else fitted.before, recovered=best, tried=tried, unseen=unseen or {}, over=over,
        size=fitted.size + more * (best == KEPT),
    )  # fmt: skip


def told(before: Fitted, after: Fitted) -> str:
    """What was measured, and what is taken."""
    each = "; ".join(f"{WORDS[way]} {apart:.6f}" for way, apart in after.tried.items())
    amount = f"{after.over:,.0f} operations" if after.unit == "operations" else bytes_text(after.over)
    room = f"; to keep it, the budget would have to be {amount} larger" * bool(after.over)
    other = "; ".join(f"{WORDS[way]} {apart:.6f}" for way, apart in after.unseen.items())
    beside = f"; on text that the original wrote: {other}" * bool(other)
    return f"KL to the original {before.before:.6f}; {each}{beside}{room}: {WORDS[after.recovered]}"
