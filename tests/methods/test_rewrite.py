"""A pruned checkpoint is the original with those experts forbidden, and nothing else about it changed: for every family."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moeflow.arch import Family
from moeflow.arch.stock import as_engines_read
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.prune.subsets import Subsets
from moeflow.methods.recipes import naee
from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import Folder, read_config
from moeflow.store import Store
from tests import running

KEEP = 6


@pytest.fixture(scope="module")
def pruned(family: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[int, list[int]]]:
    """The original's folder, the pruned one's, and the experts kept in each layer."""
    folder = tmp_path_factory.mktemp("pruned")
    store = running.store_in(folder)
    model = running.model_in(family)
    matrix = data.tokens(running.matrix_of(folder), model, Sample(8, 16))
    calibration = calibrate.run(model, matrix, Pass(batch=4, shard=4, stage=2))
    target = checkpoint.checkpoint_of(naee.prune(calibration, keep=KEEP))
    running.run(store, target)
    store.fetch(target.key, folder / "out")
    return family, folder / "out", {i: c["keep"] for i, c in running.choices(store, target).items()}


def test_every_tensor_is_accounted_for_and_untouched_ones_are_bit_identical(
    pruned: tuple[Path, Path, dict[int, list[int]]],
) -> None:
    folder, out, kept = pruned
    before, after = Tensors(folder), Tensors(out)
    family = Family.of(read_config(Folder(folder)))
    expected: dict[str, Tensor] = {}
    for name, tensor in before.items():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        if layer not in kept or "experts." not in name.replace("shared_experts.", ""):
            expected[name] = tensor[kept[layer]] if name in family.router_tensors(layer) and layer in kept else tensor
    for layer, experts in kept.items():
        for new, old in enumerate(experts):
            for old_name, new_name in zip(family.expert(layer, old), family.expert(layer, new), strict=True):
                expected[new_name] = before[old_name]
    assert set(after) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(after[name], tensor), name
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(expected)


def test_the_configuration_differs_in_the_number_of_experts_alone(pruned: tuple[Path, Path, dict[int, list[int]]]) -> None:
    folder, out, _ = pruned
    before, after = read_config(Folder(folder)), read_config(Folder(out))
    key = Family.of(before).experts_key
    assert after[key] == KEEP
    assert {k: v for k, v in after.items() if k not in (key, "num_nextn_predict_layers")} == {
        k: v for k, v in as_engines_read(before).items() if k not in (key, "num_nextn_predict_layers")
    }


@torch.inference_mode()
def test_transformers_loads_it_whole_and_its_logits_are_the_masked_original_s(
    pruned: tuple[Path, Path, dict[int, list[int]]],
) -> None:
    folder, out, kept = pruned
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    family = Family.of(read_config(Folder(folder)))
    for layer, experts in kept.items():
        block = original.model.layers[layer].get_submodule(family.arch.block)
        router = block.get_submodule(family.arch.block_router)
        router.register_forward_hook(Masked(router, experts))
    ids = torch.randint(3, 96, (3, 24), generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(model.eval()(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)
    assert len(kept) > 1


class Masked:
    """transformers' own router with the forbidden experts' rows cut out, its answers in the original's numbers."""

    def __init__(self, router: nn.Module, experts: list[int]) -> None:
        self.sliced, self.experts = copy.deepcopy(router), torch.tensor(experts)
        self.sliced.weight = nn.Parameter(router.weight[experts], requires_grad=False)  # type: ignore[index]
        self.sliced.num_experts = len(experts)  # type: ignore[assignment]
        if "e_score_correction_bias" in dict(router.named_buffers()):
            self.sliced.e_score_correction_bias = router.e_score_correction_bias[experts]  # type: ignore[index]

    def __call__(self, router: nn.Module, args: Any, out: Any) -> Any:
        _, weights, index = self.sliced(args[0])
        return out[0], weights, self.experts[index]


@pytest.mark.parametrize(
    "name, keep, says",
    [
        ("mixtral", 1, "keep=1 must lie between top_k=2 and the layer's 8 experts"),
        ("mixtral", 9, "keep=9 must lie between top_k=2 and the layer's 8 experts"),
        ("deepseek_v2", 5, "keep=5 must be a multiple of the router's 2 groups"),
        ("deepseek_v3", 4, "leaves 2 experts in each of 2 groups, .* cannot reach its top_k=3; keep at least 6"),
    ],
)
def test_too_few_experts_are_refused_when_the_graph_is_built(name: str, keep: int, says: str, tmp_path: Path) -> None:
    from tests import tiny

    model = running.model_in(tiny.write(name, tmp_path / "model"))
    calibration = calibrate.run(model, data.tokens(running.matrix_of(tmp_path), model, Sample(8, 16)), Pass(batch=4, shard=4))
    with pytest.raises(ValueError, match=says):
        naee.prune(calibration, keep=keep)


def test_grouped_routers_keep_the_same_number_in_every_group(tmp_path: Path) -> None:

    subsets = list(Subsets(8, 6, groups=2))
    assert len(subsets) == Subsets(8, 6, groups=2).count == 16
    assert all(sum(e < 4 for e in s) == 3 for s in subsets)


def test_the_small_files_travel_with_the_checkpoint(tmp_path: Path) -> None:
    from tests import tiny

    folder = tiny.write("mixtral", tmp_path / "model")
    travelling = {
        "tokenizer.json": (running.SMALL / "tokenizer.json").read_text(),
        "chat_template.jinja": "x",
        "LICENSE": "free",
        "license.txt": "free",
        "COPYING": "free",
        "tokenizer_config.json": "{}",
    }
    for name, text in (travelling | {"modeling_evil.py": "boom", "README.md": "about the original"}).items():
        (folder / name).write_text(text)
    store: Store = running.store_in(tmp_path)
    target = checkpoint.checkpoint_of(running.model_in(folder))
    running.run(store, target)
    store.fetch(target.key, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {*travelling, "generation_config.json"} <= names
    assert not {"modeling_evil.py", "README.md"} & names
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
