"""Checkpoints whose layers differ or have low-rank experts: what transformers loads computes what their tensors say, or refuses."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerFast

from moeflow.arch import LAYERS, Family
from moeflow.model import compressed, factors, passes, routed_experts
from moeflow.model.checkpoint import Tensors, read_moe, save
from moeflow.model.factors import multiplied_out
from moeflow.model.formats import Format, config_of, layer_formats
from moeflow.model.layout import Folder, file_of, read_config
from moeflow.model.moe import MoELayer
from moeflow.model.routed_experts import RoutedExperts
from moeflow.model.spec import Recording
from tests import tiny
from tests.compressed import KEPT, compress, ids, load, reference_layer, write


@pytest.fixture(scope="module")
def smaller(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(family, tmp_path_factory.mktemp("compressed") / family.name)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    return compress(tiny.write("mixtral", folder / "original"), folder / "compressed")


class _Reference(nn.Module):
    def __init__(self, moe: MoELayer, allowed_E: Tensor) -> None:
        super().__init__()
        self.moe, self.allowed_E = moe, allowed_E

    def forward(self, x_NLD: Tensor) -> Tensor:
        return self.moe(x_NLD.flatten(0, 1), self.allowed_E).view(x_NLD.shape)


@torch.inference_mode()
def test_logits_are_those_of_the_original_with_experts_forbidden_and_matrices_cut(family: Path, smaller: Path) -> None:
    config = read_config(Folder(family))
    arch = Family.of(config).arch
    model = load(family)
    for layer in Family.of(config).moe_layers:
        allowed_E = torch.zeros(8, dtype=torch.bool)
        allowed_E[KEPT[layer]] = True
        moe = reference_layer(read_moe(Tensors(family), config, layer), layer)
        model.model.layers[layer].set_submodule(arch.block, _Reference(moe, allowed_E))
    loaded = load(smaller)
    assert type(loaded).__name__.startswith("Moeflow") and loaded.config.model_type == "moeflow_" + arch.model_type
    torch.testing.assert_close(loaded(ids()).logits, model(ids()).logits, rtol=2e-4, atol=2e-4)


def test_saving_gives_the_same_tensors_bit_for_bit_and_loads_again(smaller: Path, tmp_path: Path) -> None:
    model = load(smaller)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    before, after = Tensors(smaller), Tensors(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and set(before) == set(after)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert json.loads((tmp_path / "config.json").read_text())[LAYERS] == read_config(Folder(smaller))[LAYERS]
    assert torch.equal(load(tmp_path)(ids()).logits, model(ids()).logits)


@torch.inference_mode()
def test_generating_with_a_cache_is_generating_without(smaller: Path) -> None:
    model = load(smaller, device_map="auto")
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None, return_dict_in_generate=True)
    mask = torch.ones_like(ids())
    with_cache, without = (
        model.generate(ids(), attention_mask=mask, use_cache=c, output_logits=True, **options) for c in (True, False)
    )
    assert torch.equal(with_cache.sequences, without.sequences) and with_cache.sequences.shape == (2, 28)
    torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(without.logits), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_in_bf16_it_computes_nearly_the_same(smaller: Path) -> None:
    exact, rough = load(smaller)(ids()).logits, load(smaller, dtype=torch.bfloat16)
    assert {p.dtype for n, p in rough.named_parameters() if "experts" in n} == {torch.bfloat16}
    near = torch.nn.functional.cosine_similarity(rough(ids()).logits.float(), exact, dim=-1)
    assert near.mean() > 0.98  # a token near the border of two experts may go to the other one


def test_training_leaves_the_padding_at_zero(smaller: Path) -> None:
    model = load(smaller)
    torch.manual_seed(0)  # the router of phimoe draws
    plain = model.train()(ids(), labels=ids()).loss
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    loss = model(ids(), labels=ids(), use_cache=False).loss
    torch.testing.assert_close(loss, plain)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    family = Family.of(model.config.to_dict())
    stacks = 0
    for layer, format in zip(model.model.layers, layer_formats(model.config.to_dict()), strict=True):
        if format is not None and format.low_rank:
            experts = layer.get_submodule(family.arch.block).experts
            for stack in factors.STACKS:
                if (parameter := getattr(experts, stack.name, None)) is not None:
                    inside = torch.zeros_like(parameter, dtype=torch.bool)
                    for _, _, piece_MN in stack.pieces(inside, format):
                        piece_MN.fill_(True)
                    assert parameter.grad[~inside].count_nonzero() == 0 and parameter.grad[inside].count_nonzero() > 0
                    stacks += 1
    assert stacks in (6, 10)  # all low-rank and mixed; only mixed


@pytest.mark.parametrize("family", tiny.families(without=("deepseek_v2", "deepseek_v3")), indirect=True)  # they have no such loss
def test_the_load_balancing_loss_is_taken_of_each_layer_by_itself(smaller: Path) -> None:
    model = load(smaller)
    family = Family.of(model.config.to_dict())
    plain, outputs = model(ids(), labels=ids()).loss, []
    routers = [
        m.register_forward_hook(lambda _, __, out: outputs.append(out))
        for n, m in model.named_modules()
        if n.endswith(f"mlp.{family.arch.block_router}")
    ]
    out = model(ids(), labels=ids(), output_router_logits=True)
    expected = []
    for (logits, _, index), _ in zip(outputs, routers, strict=True):
        share_E = (
            torch.nn.functional.one_hot(logits.softmax(-1).topk(index.shape[1]).indices, logits.shape[1]).float().mean(0).sum(0)
        )
        expected.append(logits.shape[1] * (share_E * logits.softmax(-1).mean(0)).sum())
    torch.testing.assert_close(out.aux_loss, torch.stack(expected).mean())
    torch.testing.assert_close(out.loss, plain + model.router_aux_loss_coef * out.aux_loss)
    assert [t.shape[1] for t in out.router_logits] == [f.experts for f in layer_formats(model.config.to_dict()) if f]
    out.loss.backward()


@torch.inference_mode()
def test_streaming_is_the_whole_model_bit_for_bit_and_recording_changes_nothing(smaller: Path, tmp_path: Path) -> None:
    config, tensors = read_config(Folder(smaller)), Tensors(smaller)
    family = Family.of(config)
    save({n: tensors[n] for n in tensors if ".layers." not in n}, tmp_path / "rest.safetensors")
    layers = []
    for i in range(3):
        layers.append((i, tmp_path / f"{i}.part"))
        save({n: tensors[n] for n in tensors if n.startswith(family.prefix(i))}, layers[-1][1])
    passes.embed(config, Folder(tmp_path), ids(), tmp_path / "start", dtype="float32")
    run = dict(count=3, batch=2, dtype="float32", progress=lambda *_: None)
    passes.through(config, tmp_path / "start", layers, tmp_path / "plain", **run)
    passes.through(config, tmp_path / "start", layers, tmp_path / "observed", recording=Recording(10**6), **run)
    model, last = load(smaller), []
    model.model.layers[-1].register_forward_hook(lambda m, args, out: last.append(out))
    model(ids(), use_cache=False)
    assert torch.equal(load_file(tmp_path / "plain")["hidden_NLD"], last[0])
    assert torch.equal(load_file(tmp_path / "observed")["hidden_NLD"], last[0])
    for layer in family.moe_layers:
        recorded, moe = load_file(tmp_path / file_of(layer)), read_moe(tensors, config, layer)
        weights_TE = moe.weights(recorded["x_RD"]).double()
        norm_TE = moe.expert_outputs(recorded["x_RD"]).norm(dim=-1).double()
        torch.testing.assert_close(recorded["reap_E"], (weights_TE * norm_TE).sum(0), rtol=2e-4, atol=2e-4)
        assert len(recorded["count_E"]) == len(KEPT[layer])


@torch.inference_mode()
def test_multiplied_out_it_needs_no_low_rank_experts(smaller: Path, tmp_path: Path) -> None:
    config, tensors = read_config(Folder(smaller)), Tensors(smaller)
    formats = [None if f is None else Format(f.experts) for f in layer_formats(config)]
    write(multiplied_out(tensors), config_of(config, formats), tmp_path)
    model = load(tmp_path)
    assert not any(isinstance(m, RoutedExperts) for m in model.modules())
    torch.testing.assert_close(model(ids()).logits, load(smaller)(ids()).logits, rtol=2e-4, atol=2e-4)


def test_layers_of_one_size_and_whole_matrices_are_the_familys_own_format(family: Path) -> None:
    config = read_config(Folder(family))
    formats = [None if f is None else Format(6) for f in layer_formats(config)]
    new = config_of(config, formats)
    assert new == Family.of(config).with_experts(6) == config_of(new, formats)
    uneven = config_of(new, [f and (f if i < 2 else Format(8)) for i, f in enumerate(formats)])
    assert Family.of(config).num_experts == 8 and layer_formats(uneven)[2] == Format(8)
    assert config_of(uneven, formats) == new


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_experts_in_one_kernel_compute_what_each_alone_does(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way on a GPU, run here on the processor; also with experts that no token reaches, and with a single token."""
    ranks = [(16, 32, 0), (48, 16, 24), (0, 0, 40), (16, 32, 32), (0, 0, 24), (24, 24, 0), (48, 8, 16), (16, 16, 16)]
    experts = RoutedExperts(Format(8, *zip(*ranks, strict=True)), 32, 48, torch.nn.functional.silu).to(dtype)
    assert all(lie.aligned and len(lie.every) > 2 for lie in experts.buckets.values())
    generator = torch.Generator().manual_seed(2)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) * 0.3
    for tokens in (1, 40):
        x_TD = torch.randn(tokens, 32, generator=generator).to(dtype)
        index_Tk = torch.rand(tokens, 7, generator=generator).topk(2).indices  # never expert 7
        results = []
        for one in (False, True):
            monkeypatch.setattr(routed_experts, "in_one_kernel", lambda _, one=one: one)
            experts.zero_grad()
            y_TD = experts(x_TD, index_Tk, torch.full((tokens, 2), 0.5))
            y_TD.float().square().sum().backward()
            results.append([y_TD, *(p.grad for p in experts.parameters())])
        tight = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.2}
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, **tight)


A = "model.layers.2.block_sparse_moe.experts"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.pop(f"{A}.1.w1.factor_in"), f"has no tensor {A}.1.w1.factor_in, which its config.json asks for"),
        (lambda t: t.pop("model.layers.0.self_attn.q_proj.weight"), "has no tensor model.layers.0.self_attn.q_proj.weight"),
        (lambda t: [t.pop(f"{A}.0.w{i}.weight") for i in (1, 2, 3)], f"has no tensor {A}.0.w1.weight, {A}.0.w2.weight"),
        (lambda t: t.update({f"{A}.8.w1.weight": torch.zeros(48, 32)}), f"has {A}.8.w1.weight, which its config.json leaves no"),
        (lambda t: t.update({f"{A}.1.w1.weight": torch.zeros(48, 32)}), f"has {A}.1.w1.weight, which its config.json leaves no"),
        (lambda t: t.update({f"{A}.1.w1.factor_in": torch.zeros(8, 32)}), f"{A}.1.w1.factor_in has shape .8, 32. where .* .7, 32."),
        (
            lambda t: t.update({"model.layers.2.block_sparse_moe.gate.weight": torch.zeros(6, 32)}),
            r"gate.weight has shape \(6, 32\)",
        ),
    ],
)
@pytest.mark.parametrize("source", ["folder", "state_dict"])
def test_a_tensor_missing_left_over_or_of_another_shape_is_an_error(
    change: Any, says: str, source: str, mixtral: Path, tmp_path: Path
) -> None:
    tensors, config = dict(Tensors(mixtral)), read_config(Folder(mixtral))
    change(tensors)
    with pytest.raises(ValueError, match=says) as error:
        if source == "folder":
            write(tensors, config, tmp_path)
            load(tmp_path)
        else:
            compressed.MODELS["moeflow_mixtral"].from_pretrained(None, config=AutoConfig.for_model(**config), state_dict=tensors)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda said: said.pop(), "has 2 entries in 'moeflow_layers' for 3 layers"),
        (lambda said: said.__setitem__(0, {}), "says {} of layer 0 .* the family has experts"),
        (
            lambda said: said.__setitem__(0, {"experts": 0, "gone": "heads"}),
            "says gone='heads' and 0 experts of layer 0; a layer has experts, or says what is gone: experts, moe",
        ),
        (lambda said: said[2]["ranks"]["up"].pop(), "needs 8 ranks .* in layer 2"),
        (lambda said: said[2]["ranks"]["up"].__setitem__(1, 0), "factors only one of gate and up in expert 1 of layer 2"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_an_error(change: Any, says: str, mixtral: Path, tmp_path: Path) -> None:
    config = read_config(Folder(mixtral))
    change(config[LAYERS])
    write(dict(Tensors(mixtral)), config, tmp_path)
    with pytest.raises(ValueError, match=says):
        load(tmp_path)


def test_it_may_lie_partly_on_disk_but_is_not_split_by_plans_made_for_others(mixtral: Path, tmp_path: Path) -> None:
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0"), "cpu")
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    offloaded = load(mixtral, device_map=places, offload_folder=tmp_path)
    assert torch.equal(offloaded(ids()).logits, load(mixtral)(ids()).logits)
    with pytest.raises(ValueError, match="tp_plan= splits a family's own experts"):
        load(mixtral, tp_plan="auto")


def python(*command: str, **more: str) -> list[str]:
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parents[2])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path} | more
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_import_moeflow_is_all_that_loading_needs(mixtral: Path, tmp_path: Path) -> None:
    """Also where transformers is first imported through the very family's configuration, whose import imports AutoConfig."""
    for file in mixtral.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    printed = python(
        "-c",
        "import moeflow, sys\n"
        "print(*{'torch', 'transformers'} & set(sys.modules))\n"
        "from transformers import MixtralConfig\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"print(*AutoTokenizer.from_pretrained({str(tmp_path)!r})('b')['input_ids'])\n"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)",
    )
    assert printed == ["1", "MoeflowMixtralForCausalLM"]  # and neither torch nor transformers before they are asked for


@pytest.mark.slow
def test_import_moeflow_may_come_after_transformers() -> None:
    code = (
        "from transformers import CONFIG_MAPPING, AutoConfig\n"
        "print('moeflow_mixtral' in CONFIG_MAPPING)\n"
        "import moeflow\n"
        "print(type(AutoConfig.for_model('moeflow_mixtral', num_hidden_layers=0)).__name__)"
    )
    assert python("-c", code, MOEFLOW_AUTOLOAD="0") == ["False", "MoeflowMixtralConfig"]


@pytest.mark.slow
def test_a_configuration_crosses_into_a_process_that_has_loaded_nothing(mixtral: Path, tmp_path: Path) -> None:
    """As an engine with workers of its own sends it."""
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(load(mixtral).config))
    code = (
        "import pickle, pathlib, moeflow.model.compressed as here\n"
        f"config = pickle.loads(pathlib.Path({str(tmp_path / 'config.pickle')!r}).read_bytes())\n"
        "print(type(config).__name__, config.model_type, here.MODELS[config.model_type].__name__)"
    )
    assert python("-c", code) == ["MoeflowMixtralConfig", "moeflow_mixtral", "MoeflowMixtralForCausalLM"]
    with pytest.raises(AttributeError, match="no attribute 'MoeflowNothing'"):
        getattr(compressed, "MoeflowNothing")  # noqa: B009


@pytest.mark.slow
def test_partitioned_loading_reads_the_same_refuses_the_same_and_trains(tmp_path: Path) -> None:
    """Under ZeRO-3 on two processes, where transformers itself does not look for tensors left over."""
    folders = []
    for name in ("mixtral", "deepseek_v3"):
        good = compress(tiny.write(name, tmp_path / name), tmp_path / f"good-{name}")
        surplus = tmp_path / f"surplus-{name}"
        write(dict(Tensors(good)) | {"model.surprise": torch.zeros(1)}, read_config(Folder(good)), surplus)
        folders += [str(good), str(surplus)]
    script = str(Path(__file__).with_name("zero3_loading.py"))
    words = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *folders)
    said = " ".join(words)  # two processes may write into one line
    assert [said.count(word) for word in ("equal", "refused", "trained")] == [4, 4, 4]
