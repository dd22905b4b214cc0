"""The general way: moeflow's own classes inside vLLM's Transformers backend, which gives them its attention and linear layers.

It runs every family and every form, without CUDA graphs and torch.compile. Over tensor-parallel ranks the experts of a layer are
divided where their number allows it.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.model_executor.models.transformers import TransformersForCausalLM

from moeflow.arch import Family, layer_of
from moeflow.model.compressed import MODELS, Compressed
from moeflow.model.formats import Format, layer_formats
from moeflow.model.packed import asymmetric
from moeflow.model.routed_experts import RoutedExperts, experts_of
from moeflow.model.skeleton import layers_of
from moeflow.serve.checks import check
from moeflow.serve.pieces import Pieces
from moeflow.serve.plugin import log
from moeflow.serve.traffic import Note, recorder_of


class General(TransformersForCausalLM):
    """A compressed checkpoint of any form. Raises ValueError for one whose tensors are not those that its configuration says."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        check(vllm_config)
        register_body(type(config))
        self.family = Family.of(config.to_dict())
        self.formats = layer_formats(config.to_dict())
        self.shares: dict[int, range] = {}
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if recorder := recorder_of(vllm_config):
            for layer, format, block in self._blocks():
                block.experts.register_forward_pre_hook(partial(_told, recorder.layer(layer, format.experts)))

    def _decorate_for_torch_compile(self) -> None:
        """Nothing: `settle_model` has made it eager."""

    def recursive_replace(self) -> None:
        """Give each rank its experts, and keep vLLM from replacing the routers, some of which are linear layers with code of their
        own."""
        blocks = list(self._blocks())
        ranks = get_tp_group().world_size
        for layer, format, block in blocks if ranks > 1 else ():
            self._divide(layer, format, block, ranks)
        name = self.family.arch.block_router
        routers = [(block, router) for _, _, block in blocks if (router := block._modules.pop(name, None)) is not None]
        super().recursive_replace()
        for block, router in routers:
            block.add_module(name, router)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Put every expert into its place in the stacks, packed ones unpacked, and leave the rest to vLLM.

        Raises ValueError if an expert lacks a matrix or a factor, or one has another shape than its place.
        """
        pieces = Pieces(self.family, zeros=asymmetric(self.config.to_dict()))
        for layer, format, block in self._blocks():
            experts = block.experts.experts if isinstance(block.experts, OfRank) else block.experts
            pieces.add(layer, format, experts, self.shares.get(layer))
        loaded: set[str] = super().load_weights(self._beside(weights, pieces))
        pieces.check_whole(self.model_config.model)
        stacks = {id(p) for _, _, block in self._blocks() for p in block.experts.parameters()}
        return loaded | {n for n, p in self.named_parameters() if id(p) in stacks}

    def _beside(self, weights: Iterable[tuple[str, Tensor]], pieces: Pieces) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are of no expert, by their names in memory; the others are put into their places."""
        for name, tensor in weights:
            if not pieces.take(name, tensor):
                yield self._in_memory(name), tensor

    def _in_memory(self, name: str) -> str:
        layer = layer_of(name)
        if layer is None:
            return self.family.rest_in_memory(name)
        prefix = self.family.prefix(layer)
        return prefix + self.family.in_memory(name.removeprefix(prefix))

    def _blocks(self) -> Iterator[tuple[int, Format, Any]]:
        """The MoE blocks of this rank that have routed experts, with their layers' numbers and formats."""
        for layer, (format, module) in enumerate(zip(self.formats, layers_of(self.model), strict=True)):
            if format is not None and format.experts and isinstance(module, nn.Module):
                parts = dict(module.named_modules())
                if self.family.arch.block in parts:  # another pipeline stage has it otherwise
                    yield layer, format, parts[self.family.arch.block]

    def _divide(self, layer: int, format: Format, block: Any, ranks: int) -> None:
        if format.experts % ranks or self.family.arch.weighs_input:
            why = f"{format.experts} are no multiple of {ranks}" if format.experts % ranks else "they weigh their inputs"
            log.info("moeflow: every rank has all experts of layer %s: %s", layer, why)
            return
        each = format.experts // ranks
        first = get_tp_group().rank_in_group * each
        self.shares[layer] = range(first, first + each)
        own = experts_of(block.experts, format, self.config.to_dict(), self.shares[layer])
        for part in own.modules():  # vLLM makes parameters that lie nowhere yet, in its precision, but no buffers
            for name, value in list(part.named_parameters(recurse=False)):
                part.register_parameter(name, nn.Parameter(value.to("meta"), requires_grad=False))
        block.experts = OfRank(own)


class OfRank(nn.Module):
    """The experts of one tensor-parallel rank; the ranks' outputs are added."""

    def __init__(self, experts: RoutedExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x_TD: Tensor, index_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        y_TD: Tensor = tensor_model_parallel_all_reduce(self.experts(x_TD, index_Tk, weights_Tk))
        return y_TD


def _told(note: Note, experts: Any, args: tuple[Tensor, ...]) -> None:
    """Tell `note` what a module of experts is given: states, and the index and weight of each token's experts."""
    note(args[1], args[2])


def register_body(config_class: Any) -> None:
    """Register with `AutoModel`, which vLLM asks, the model without a head of a compressed family."""
    if config_class not in MODEL_MAPPING:
        family: Any = MODEL_MAPPING[config_class.__mro__[1]]
        name = MODELS[config_class.model_type].__name__.removesuffix("ForCausalLM") + "Model"
        AutoModel.register(config_class, type(name, (Compressed, family), {"__module__": __name__, "config_class": config_class}))
