"""A small Mixtral that the graph itself trains, for demonstrations and tests; used like any other model."""

from typing import Any

from moeflow.arch import essential, layer_of
from moeflow.methods.checkpoint.steps import layer, rest
from moeflow.methods.graph import Model
from moeflow.methods.pretrain.steps import TOKENIZER_FILES, WEIGHTS, Pretraining, Shape, table_of, train
from moeflow.model.spec import file_bytes, tensor_bytes
from moeflow.sources import Texts


def mixtral(texts: Texts, how: Pretraining = Pretraining(), shape: Shape = Shape()) -> Model:
    """A small Mixtral, trained on `texts`."""
    config = shape.config(how.length)
    sources = tuple(e.source.group([f.name for f in e.source.files]) for e in texts.entries())
    trained = train(sources, config=config, how=how)
    tables: dict[int | None, dict[str, list[Any]]] = {}
    whole = table_of(config)
    at = file_bytes(whole) - sum(tensor_bytes(*t) for t in whole.values())
    for name, (dtype, sides) in whole.items():
        size = tensor_bytes(dtype, sides)
        i = layer_of(name)
        tables.setdefault(i, {})[name] = [0, dtype, list(sides), at, at + size]
        at += size
    weights = trained.part(WEIGHTS)
    return Model(
        config=config,
        rest=rest(trained, (weights,), config=config, files=list(TOKENIZER_FILES), tensors=tables[None], note=""),
        texts=trained.part("tokenizer"),
        layers=tuple(layer((weights,), config=essential(config), layer=i, tensors=tables[i]) for i in range(shape.layers)),
    )
