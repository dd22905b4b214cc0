"""Run multi-token-prediction layers behind a model, and record in the MoE layer inside each what is recorded in any other.

DeepSeek-V3 (arXiv 2412.19437), section 2.2: the layer at depth k takes the states behind the one before it, at first the model's
own behind its final norm, and the embeddings of the tokens k + 1 positions on, so that it predicts the token after those.
Shapes are suffixes: N sequences (n of them at once), L positions, D model width.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moeflow.arch import FINAL_NORM, Config
from moeflow.arch.prediction import ENORM, HNORM, NORM, PROJECTION, decoder_names, prediction_config
from moeflow.model.alternatives import slices
from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import Files, file_of
from moeflow.model.observe import OBSERVED
from moeflow.model.passes import Progress, at_once, recorder_of, stream_of
from moeflow.model.spec import Recording
from moeflow.model.stream import HIDDEN, Stream


class PredictionLayer:
    """One prediction layer, from what is before it to the states behind it."""

    def __init__(self, stream: Stream, tensors: Mapping[str, Tensor], layer: int, depth: int) -> None:
        """`stream` is of a model of the decoder layers inside the prediction layers, of which this is number `depth`."""
        self.stream, self.depth, self.prefix = stream, depth, stream.family.prefix(layer)
        self.inside = {new: tensors[name] for name, new in decoder_names(stream.family, tensors, layer, depth).items()}
        self.block = stream.layer(self.inside, depth)
        self.enorm, self.hnorm, self.norm = (self.norm_with(tensors[self.prefix + name]) for name in (ENORM, HNORM, NORM))
        self.projection_DD = tensors[self.prefix + PROJECTION].to(stream.device, stream.dtype)

    def norm_with(self, weight_D: Tensor) -> nn.Module:
        """A norm of the kind that the family's decoder layers have, with this weight."""
        norm = copy.deepcopy(self.block.get_submodule(self.stream.family.arch.norm))
        norm.weight = nn.Parameter(weight_D.to(self.stream.device, self.stream.dtype), requires_grad=False)
        return norm

    def __call__(self, states_nLD: Tensor, embeddings_nLD: Tensor) -> Tensor:
        """The states behind it, [n, L, D], for those before it and the embeddings of the tokens that are to follow them."""
        parts = self.enorm(embeddings_nLD), self.hnorm(states_nLD)
        if self.stream.config.get("mtp_hidden_states_first"):
            parts = parts[::-1]
        before_nLD = nn.functional.linear(torch.cat(parts, -1), self.projection_DD)
        behind: Tensor = self.norm(self.stream.run(self.block, self.depth, {HIDDEN: before_nLD})[HIDDEN])
        return behind


@torch.inference_mode()
def observe(
    config: Config, rest: Files, ids_NL: Tensor, hidden: Path, layers: Sequence[tuple[int, Path | Files]], folder: Path,
    *, batch: int, dtype: str, recording: Recording, progress: Progress,
) -> None:  # fmt: skip
    """Run prediction layers (number, file) over the states behind the model's last decoder layer, one behind the other.

    `ids_NL`: the tokens of these states, perhaps with sequences behind them. For each layer a file of `folder` has what a
    `Recorder` saw in it (`file_of`). A sequence of L tokens is L - 1 - k positions at depth k.
    """
    stream = stream_of(prediction_config(config), dtype, OBSERVED)
    around = Tensors(rest)
    states_NLD = load_file(hidden)[HIDDEN]
    count = len(states_NLD)
    embeddings_NLD = stream.embed(around, ids_NL[:count]).cpu()
    for depth, (layer, file) in enumerate(layers):
        module = PredictionLayer(stream, Tensors(file), layer, depth)
        recorder = recorder_of(stream, module.inside, depth, recording)
        if recorder is None:
            raise ValueError(f"multi-token-prediction layer {layer} has no experts; take mtp='drop'")
        final = module.norm_with(around[FINAL_NORM]) if depth == 0 else nn.Identity()
        behind = []
        size = at_once(stream, module.block, module.inside, states_NLD.shape[1], batch, recorded=True)
        for rows in slices(count, size):
            with recorder.on(module.block):
                states_nLD = final(states_NLD[rows, :-1].to(stream.device))
                behind.append(module(states_nLD, embeddings_NLD[rows, depth + 1 :].to(stream.device)).cpu())
            progress(depth * count + rows.stop, len(layers) * count, "sequences")
        states_NLD = torch.cat(behind)
        save_file(recorder.result(), folder / file_of(layer))
        del module
