"""Which experts of its original a version keeps, for engines that mask or leave out the others while they load the original.

Two dialects: that of vLLM's pull request 37824 (`--riy-expert-profile riy.json`: pairs of layer and expert that go), and that of
vllm-ascend's 12525 (`--additional-config`, `expert_list_file`: a line for each layer with its experts, those that stay first, and
the part that goes as `expert_prune_ratio`).
"""

import json

from moeflow.report.about import About
from moeflow.report.layers import Layer

TAKEN = "rewrite.experts"
"""The step that takes experts out."""
RIY, ASCEND = "riy.json", "ascend.jsonl"


def of(about: About) -> dict[str, str]:
    """The files of a profile, by name. Raises ValueError if experts taken out are not all that was done."""
    checkpoint = about.checkpoint
    if checkpoint is None:
        raise ValueError(f"{about.title} is no checkpoint, of which experts could stay")
    if other := next((what for what in _done(about) if what != TAKEN), None):
        raise ValueError(
            f"{about.title} was not only pruned ({other}): a profile says which experts stay, and would leave that out"
        )
    pruned = [layer for layer in checkpoint.layers if layer.kept is not None]
    if not pruned:
        raise ValueError(f"{about.title} keeps all experts of its original; there is nothing to say in a profile")
    if moved := next((layer for layer in checkpoint.layers if layer.layer != layer.was), None):
        raise ValueError(f"layer {moved.layer} of {about.title} was layer {moved.was}: a profile takes out experts, and no layers")
    files = {RIY: json.dumps(_riy(about, pruned), indent=1) + "\n"}
    moe = [layer for layer in checkpoint.layers if layer.experts]
    if len({layer.now for layer in moe}) == 1 and len({layer.experts for layer in moe}) == 1:  # it knows one ratio
        files[ASCEND] = "".join(json.dumps({str(layer.layer): _ranked(layer)}) + "\n" for layer in moe)
    return files


def _riy(about: About, pruned: list[Layer]) -> dict[str, object]:
    gone = [[layer.layer, e] for layer in pruned for e in range(layer.experts or 0) if e not in (layer.kept or ())]
    return {"version": 1, "model": about.model_name, "workload": about.title, "pruned_experts": gone}


def _ranked(layer: Layer) -> list[int]:
    """All experts of a layer, those that stay first."""
    every = range(layer.experts or 0)
    kept = every if layer.kept is None else layer.kept
    return [*kept, *(e for e in every if e not in kept)]


def _done(about: About) -> list[str]:
    """The names of the steps that changed a layer of the version, in order."""
    stored = about.store.artifact(about.key)
    if "moeflow.json" not in stored.names():
        return []
    history = json.loads(bytes(stored.read("moeflow.json", 0, stored.size("moeflow.json"))))
    return [str(d.get("step")) for entry in history.get("layers", ()) for d in entry.get("done", ())]
