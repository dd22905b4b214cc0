"""A small Mixtral that the graph itself trains, for demonstrations and tests; used like any other model."""

from typing import Any

from moeflow.arch import ARCH, Layout, essential, layer_of
from moeflow.arch.found import arch_of
from moeflow.methods.checkpoint.steps import layer, rest
from moeflow.methods.graph import Form, Model
from moeflow.methods.pretrain.steps import TOKENIZER_FILES, WEIGHTS, Pretraining, Shape, table_of, train
from moeflow.model.spec import file_bytes, tensor_bytes
from moeflow.sources import Texts


def mixtral(texts: Texts, how: Pretraining = Pretraining(), shape: Shape = Shape()) -> Model:
    """A small Mixtral, trained on `texts`."""
    said = shape.config(how.length)
    config = said | {ARCH: arch_of(said).to_json()}
    sources = tuple(e.source.group([f.name for f in e.source.files]) for e in texts.entries())
    trained = train(sources, config=said, how=how)
    tables: dict[int | None, dict[str, list[Any]]] = {}
    table = table_of(config)
    at = file_bytes(table) - sum(tensor_bytes(*t) for t in table.values())
    for name, (dtype, sides) in table.items():
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
        form=Form(said, Layout()),
    )
