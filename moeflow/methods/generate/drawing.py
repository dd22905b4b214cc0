"""Let a model go on with rows of text, each next token drawn from its predictions.

Shapes are suffixes: N rows, n some of them, L positions, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeflow.methods.generate.steps import TOGETHER
from moeflow.model.cost import cached
from moeflow.model.memory import together
from moeflow.model.quiet import cache_name, load_whole


@torch.inference_mode()
def continued(
    folder: Path, ids_NL: np.ndarray, draws_NL: np.ndarray, dtype: str, room: int, progress: Callable[[int, int, str], None]
) -> np.ndarray:
    """Rows of tokens, each followed by as many that a checkpoint's model predicts as there are numbers of `draws_NL` for it.

    A number from 0 to below 1 says at which part of the cumulated probabilities, in the order of the vocabulary, the token lies:
    so what is drawn is the same however many rows run together. Nothing of the model's own generation settings is used, and an
    end-of-sequence token ends nothing: what follows it is what the model puts behind it. As many rows run together as `room` bytes
    hold of keys and values, `TOGETHER` at most.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_whole(folder, dtype=dtype, device_map=device).eval()
    of_row = cached(model) * model.dtype.itemsize * (ids_NL.shape[1] + draws_NL.shape[1])
    at_once, rows = together(room, of_row, TOGETHER), []
    for first in range(0, len(ids_NL), at_once):
        now = slice(first, first + at_once)
        begun, draws = (torch.from_numpy(part[now]).to(device) for part in (ids_NL.astype(np.int64), draws_NL))
        rows.append(_goes_on(model, begun, draws).cpu().numpy())
        progress(min(first + at_once, len(ids_NL)), len(ids_NL), "rows")
    return np.concatenate(rows).astype(np.int32)


def _goes_on(model: Any, ids_nL: Tensor, draws_nL: Tensor) -> Tensor:
    name, out, rows = cache_name(model), None, [ids_nL]
    for draw_n in draws_nL.unbind(1):
        out = model(rows[-1], use_cache=True, **({name: out[name]} if out else {}))
        rows.append(drawn(out.logits[:, -1], draw_n)[:, None])
    return torch.cat(rows, 1)


def drawn(logits_nV: Tensor, draw_n: Tensor) -> Tensor:
    """The token of each row at which the cumulated probabilities pass `draw_n`."""
    cumulated_nV = logits_nV.double().softmax(-1).cumsum(-1)
    # at most all but one: rounding may leave the last sum a little below 1
    return (cumulated_nV <= draw_n[:, None]).sum(-1).clamp(max=logits_nV.shape[-1] - 1)
