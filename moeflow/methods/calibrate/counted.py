"""What an engine counted of the model that it served, in the place of what a pass would count. No torch."""

from moeflow.methods.graph import Model
from moeflow.model.layout import file_of
from moeflow.model.spec import TrafficSpec
from moeflow.step import Part, Step


def traffic_of(model: Model, tokens: Step) -> dict[int, Part]:
    """What an engine counted in each MoE layer, if these tokens are its.

    None for a model with other numbers of experts than the one that was served, and ValueError for it if the counts are all there
    is.
    """
    spec = tokens.spec.output
    if not isinstance(spec, TrafficSpec):
        return {}
    layers = {i: model.layers[i].spec.output for i in model.moe_layers}
    if dict(spec.layers) == {i: layer.experts for i, layer in layers.items()} and all(s.share == 1 for s in layers.values()):
        return {i: tokens.part(file_of(i)) for i in layers}
    if not spec.sequences:
        raise ValueError(f"{spec.where}, of another number of experts than this stage begins with; put the stage that counts first")
    return {}
