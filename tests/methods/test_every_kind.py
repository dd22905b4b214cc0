"""Every pipeline and every method on a model of every kind: it runs to the end and its result loads, or a plan says why not.

A cell of the table is a row of `ROWS` and a kind of `KINDS`. A new pipeline, method or kind of family that the table lacks fails.
"""

import json
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils.quantization_config import Mxfp4Config

from moeflow.arch import Family
from moeflow.methods.finetune.targets import Mode
from moeflow.methods.prune.searches import METHODS as SEARCHES
from moeflow.methods.recipes import moei2
from moeflow.methods.slim.methods import METHODS as SLIMMINGS
from moeflow.methods.trim.steps import TRIM_KINDS
from moeflow.model.checkpoint import Tensors, read_moe
from moeflow.model.formats import format_of
from moeflow.model.moe import MoELayer
from moeflow.model.trimmed import returns_a_tuple
from moeflow.run import pipeline
from moeflow.sources.elsewhere import seen
from moeflow.step import Step, upstream
from moeflow.store import Store
from tests import kinds, running
from tests.kinds import KINDS
from tests.model.test_other_families import Block
from tests.pipelines import words

ROOT = Path(__file__).parents[2]
PIPELINES = {p.stem: p for p in sorted((ROOT / "pipelines").glob("*.py"))}
HELD_OUT = ["heldout=python:stdlib/t*.py", *words.HELD_OUT]
TEXT = ["tokens=python:stdlib/a*.py", *HELD_OUT, *words.TEXT]
RECORDED = [*TEXT, *words.RECORDED]
TUNED = ["tune.text=python:stdlib/a*.py", *words.TUNED]
RECON = ["counts.importance=recon", "decomposition.importance=recon"]
OURS = ["decomposition.svd=whitened", "decomposition.ranks=global", "decomposition.multiple=2"]


@dataclass(frozen=True)
class Row:
    """A pipeline with some words, and the method that they choose."""

    pipeline: str
    words: list[str]
    method: str = ""
    equals: str = "masked"  # of which reference: the original with experts masked, or with the result's own matrices; or none
    reports: tuple[str, ...] = field(default=())  # of those that load whole models, and take long


def _pruned() -> dict[str, Row]:
    genetic = {"genetic": words.GENETIC}
    rows = {f"search={s}": Row("mixtral", [*TEXT, "keep=6", f"search={s}", *genetic.get(s, [])], f"search {s}") for s in SEARCHES}
    by_score = [*TEXT, "keep=6", "search=reap"]
    modes = [m for m in get_args(Mode) if m != "compressed_experts"]
    loss = {"router": ["tune.loss=kl"]}
    rows |= {f"tune={m}": Row("mixtral", [*by_score, *TUNED, f"tune={m}", *loss.get(m, [])], f"tune {m}", "none") for m in modes}
    return rows | {
        "tiny": Row("tiny", [*TEXT, "keep=6"], reports=("evaluate.speed", "evaluate.written")),
        "skipping": Row("mixtral", [*by_score, "skipping=1.5"], "skipping", "none", ("evaluate.speed",)),
    }


def _moei2() -> dict[str, Row]:
    plain = [*RECORDED, "tune=none", "search=swap", "search.span=1"]
    rows = {
        name: Row(name, [*RECORDED, *words.GENETIC, "tune=none"], equals="dense")
        for name in ("mixtral_moei2", "qwen15_moe", "deepseek_v2_lite")
    }
    return rows | {
        "counts=exact": Row("mixtral_moei2", [*plain, "counts.rule=exact", *OURS], "counts exact, ranks global", "dense"),
        "counts=uniform": Row(
            "mixtral_moei2", [*plain, "counts.rule=uniform", "decomposition.ranks=uniform"],
            "counts uniform, ranks uniform", "dense",
        ),
        "counts=paper": Row(
            "mixtral_moei2", [*RECORDED, *words.GENETIC, "tune=none", *RECON, "search.inputs=progressive"],
            "counts paper, ranks paper", "dense",
        ),
        "moei2, tuned": Row("mixtral_moei2", [*RECORDED, *words.GENETIC, *RECON, *TUNED], equals="none"),
    }  # fmt: skip


def _unified() -> dict[str, Row]:
    def words_of(*more: str) -> list[str]:
        return [*RECORDED, *more]

    rows = {
        name: Row(name, words_of("slim.group=8", "trim.dropped=1"), equals="none")
        for name in ("mixtral_unified", "deepseek_v2_lite_unified", "qwen15_moe_unified")
    }
    for name, row in SLIMMINGS.items():
        group = ["slim.group=8"] if row.quantizes else []
        rows[f"slim={name}"] = Row("mixtral_unified", words_of("order=slim", f"slim={name}", *group), f"slim {name}", "dense")
    for name in TRIM_KINDS:
        dropped = "2" if name == "experts" else "1"
        equals = "masked" if name != "decoder_layers" else "none"
        said = words_of("order=trim", f"trim={name}", f"trim.dropped={dropped}")
        rows[f"trim={name}"] = Row("mixtral_unified", said, f"trim {name}", equals)
    gptq = ["slim=gptq", "slim.group=8"]
    return rows | {
        "slim in sequence": Row(
            "mixtral_unified",
            words_of("order=slim", *gptq, "slim.inputs=sequential", "slim.tasks=2", "slim.shared=true"),
            equals="dense",
        ),
        "slim in sequence, towards the model": Row(
            "mixtral_unified",
            words_of("order=slim", *gptq, "slim.inputs=sequential", "slim.target=model", "slim.tasks=2", "slim.shared=true"),
            equals="dense",
        ),
        "trim=experts by layer": Row(
            "mixtral_unified", words_of("order=trim", "trim=experts", "trim.dropped=2", "trim.across=layer")
        ),
        "trim=experts, all of a layer": Row(
            "mixtral_unified", words_of("order=trim", "trim=experts", "trim.dropped=5", "trim.least=0")
        ),
        "decompose,slim": Row(
            "mixtral_unified", words_of("order=decompose,slim", *gptq, "decompose.multiple=8", "trim=none"), equals="dense"
        ),
        "trim,tune,slim": Row(
            "mixtral_unified",
            words_of(*TUNED, "order=trim,tune,slim", "tune=full", "trim=experts", "trim.dropped=2", *gptq),
            equals="none",
        ),
    }


def _fitted() -> dict[str, Row]:
    few = ["offers.counts=[0.75]", "offers.ranks=[0.3]", "offers.bits=[4]", "offers.group=8", "offers.measured=64"]
    said = [*RECORDED, *few, "budget.ratio=0.15"]
    return {
        "fit": Row("fit", said, equals="none"),
        "fit for transformers": Row("fit", [*said, "offers.engine=transformers", "offers.rounds=1"], equals="none"),
    }


def _compressed() -> dict[str, Row]:
    alone = ["tune=compressed_experts", "tune.loss=kl", "vectors.form=one"]
    rows = {name: Row(name, [*HELD_OUT, *TUNED], equals="none") for name in ("olmoe", "phimoe")}
    return rows | {"vectors alone": Row("olmoe", [*HELD_OUT, *TUNED, *alone], "tune compressed_experts", "none")}


ROWS = _pruned() | _moei2() | _unified() | _compressed() | _fitted()
NO_AWQ = ["mixtral_unified", "deepseek_v2_lite_unified", "qwen15_moe_unified", "slim=awq"]
NEEDS_WEIGHTS = [
    name for name in ROWS
    if name.startswith(("slim", "counts", "decompose", "moei2", "tune", "trim,", "vectors"))
    or name in {*NO_AWQ, *PIPELINES} - {"fit"}
]  # fmt: skip
MAY_DIFFER = ["fit", "skipping", "trim=experts", "trim=experts, all of a layer", "trim=moe_blocks"]
TURNS = r"differs? by layer: a layer cannot take another's place; .*drop MoE blocks \(Layer Drop\)"
REFUSED: dict[str, dict[str, str]] = {
    "fused": {},
    "transposed": dict.fromkeys(NO_AWQ, "biases and the activation clamped_swiglu, which awq cannot scale; take gptq instead")
    | {"trim=decoder_layers": f"layer_types {TURNS}"},
    "mxfp4": dict.fromkeys(NEEDS_WEIGHTS, r"layer 0 is in MXFP4; \S+ the model that it was made of")
    | dict.fromkeys(MAY_DIFFER, "layer 0 is in MXFP4, .*; keep as many in every layer, or start from the model in bf16")
    | {"trim=decoder_layers": f"layer_types {TURNS}"},
    "wrapped": {"trim=decoder_layers": f"layer_types {TURNS}"},
    "ungated": dict.fromkeys(NO_AWQ, "a nemotron_h have no gate, which awq cannot scale; take gptq instead")
    | {"trim=decoder_layers": f"layers_block_type {TURNS}"},
    "top-1": dict.fromkeys(NO_AWQ, "a llama4_text have weighted inputs, which awq cannot scale; take gptq instead")
    | dict.fromkeys(["olmoe", "phimoe", "vectors alone"], "multiplies the inputs of its experts .* no Compressed Experts; prune")
    | {"skipping": "multiplies the inputs of its experts .* no skipped experts; prune"}
    | {"trim=decoder_layers": r"layers \[1\] have no experts, .*; drop MoE blocks \(Layer Drop\)|" + TURNS},
    "hybrid": dict.fromkeys(NO_AWQ, "a granitemoehybrid have no norm of their own, which awq cannot scale; take gptq instead")
    | {"trim=decoder_layers": f"layer_types {TURNS}"},
    "corrected": {},
}  # fmt: skip
"""What a plan says, by kind and row; all other cells run. `tiny` and a search keep one number of experts, so that any kind can."""
del REFUSED["mxfp4"]["tiny"]
REFUSED["mxfp4"]["fit for transformers"] = "a budget of .* cannot be met: what is offered takes"  # no bits are on offer
OFTEN = {("slim=awq", "transposed")}
CELLS = [
    pytest.param(row, kind, marks=() if (row, kind) in OFTEN else pytest.mark.slow, id=f"{kind}-{row}")
    for kind in KINDS
    for row in ROWS
]


def test_the_table_has_every_pipeline_and_every_method() -> None:
    assert {row.pipeline for row in ROWS.values()} == {*PIPELINES}
    methods = {word for row in ROWS.values() for word in row.method.split(", ")}
    asked = {f"search {s}" for s in SEARCHES} | {f"slim {s}" for s in SLIMMINGS} | {f"trim {t}" for t in TRIM_KINDS}
    asked |= {f"tune {m}" for m in get_args(Mode)} | {f"counts {r}" for r in moei2.RULES} | {f"ranks {r}" for r in moei2.RANKS}
    assert asked <= methods
    assert {*REFUSED} == {*KINDS} and all({*refused} <= {*ROWS} for refused in REFUSED.values())


def test_the_table_has_every_kind_of_family_that_is_found() -> None:
    """By the words that the newest pinned list has for layouts and routers."""
    newest = max((ROOT / "tests" / "model" / "families").glob("*.json"))
    rows = {name: row for name, row in json.loads(newest.read_text()).items() if row["by"] == "structure"}

    def said(row: dict[str, str]) -> set[str]:
        return {word for part in (row["layout"], row["router"]) for word in part.split(", ")}

    has = {word for family, _ in KINDS.values() for word in said(rows[family])}
    assert {word for row in rows.values() for word in said(row)} - has <= {"groups", "sparsemixer"}, (
        "which DeepSeek and Phi-MoE have"
    )


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder and the store of a kind; all cells of the kind share what is computed in both."""

    @cache
    def of(kind: str) -> tuple[Path, Store]:
        folder = tmp_path_factory.mktemp(kind)
        return kinds.write(kind, folder / "model"), running.store_in(folder)

    return of


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_a_method_works_on_a_kind_or_its_plan_says_why_not(name: str, kind: str, sources: Any, tmp_path: Path) -> None:
    row, (source, store) = ROWS[name], sources(kind)

    def planned() -> Step:
        return running.alone(pipeline.call(pipeline.load(PIPELINES[row.pipeline]), [f"model={source}", *row.words]))

    if why := REFUSED[kind].get(name):
        with pytest.raises(ValueError, match=why) as told:
            planned()
        assert "\n" not in str(told.value)
        return
    target = planned()
    slow = ("evaluate.speed", "evaluate.written")
    reports = [r for r in target.reports if r.name not in slow or r.name in row.reports]
    running.run(store, target._with(reports=tuple(reports)))
    for report in reports:
        told_of = json.loads(store.artifact(report.key).file("report.json").read_text())
        assert "left out" not in told_of.get("note", ""), told_of
    store.fetch(target.key, tmp_path / "out")
    model = loaded(tmp_path / "out")
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        assert torch.isfinite(logits).all()
        assert model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=1).shape == (1, 40)
        if row.equals != "none":
            same = reference(source, store, target, masked=row.equals == "masked")(input_ids=ids).logits
            torch.testing.assert_close(logits, same, rtol=1e-3, atol=1e-3)


def loaded(folder: Path) -> Any:
    """The model as transformers loads it, in fp32, with every tensor in its place."""
    config = json.loads((folder / "config.json").read_text())
    kind: Any = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    coded = (config.get("quantization_config") or {}).get("quant_method") == "mxfp4"
    more = {"quantization_config": Mxfp4Config(dequantize=True)} if coded else {}
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **more)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.float().eval() if coded else model.eval()


def reference(source: Path, store: Store, target: Step, *, masked: bool) -> Any:
    """The original model as transformers loads it, with what became of its MoE blocks computed by us.

    Experts that went are masked in the original's blocks, or the blocks have the result's own matrices, multiplied out.
    """
    assembled = next(s for s in upstream([target, *target.reports]) if s.name == "evaluate.size").inputs[1]
    after, config = Tensors(store.artifact(assembled.key)), assembled.spec.output.config
    first = {s.params["layer"]: s for s in upstream([target]) if s.name == "checkpoint.layer"}
    model, family = loaded(source), Family.of(config)
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == family.num_layers and _decodes(m, family))
    kept = {int(f["layer"]): f["keep"] for f in _facts(store, target)}
    for i in family.moe_layers:
        before = Tensors(seen(store, first[i].key))
        layer: Any = stack[i]
        whole = read_moe(before, config, i).to(dtype=torch.float32)
        pair = returns_a_tuple(layer.get_submodule(family.arch.block))
        if format_of({n: tuple(after.info[n].shape) for n in after.info}, config, i).gone == "moe":
            layer.set_submodule(family.arch.block, Block(torch.zeros_like, pair))
            continue
        allowed_E = torch.tensor([e in kept.get(i, range(whole.num_experts)) for e in range(whole.num_experts)])
        if masked:
            layer.set_submodule(family.arch.block, Block(partial(_masked, whole, allowed_E), pair))
            continue
        layer.get_submodule(family.arch.norm).weight.copy_(after[family.norm(i) + "weight"])
        moe = read_moe(after, config, i).to(dtype=torch.float32)
        layer.set_submodule(family.arch.block, Block(moe, pair))
    return model


def _masked(moe: MoELayer, allowed_E: Tensor, x_TD: Tensor) -> Tensor:
    if count := int(allowed_E.sum()):  # if fewer stay than the router chooses, a token gets all of them
        router = replace(moe.router, top_k=min(moe.router.top_k, count))
        return replace(moe, router=router)(x_TD, allowed_E)
    shared = moe.shared_output(x_TD)
    return torch.zeros_like(x_TD) if shared is None else shared


def _facts(store: Store, target: Step) -> list[dict[str, Any]]:
    """What was done to the experts of each layer of a result, by its history."""
    history = json.loads(store.artifact(target.key).file("moeflow.json").read_text())
    done = [(entry["layer"], one) for entry in history["layers"] for one in entry["done"] if one["step"] == "rewrite.experts"]
    return [{"layer": layer, "keep": one["keep"]} for layer, one in done]


def _decodes(stack: nn.ModuleList, family: Family) -> bool:
    return all(hasattr(stack[i], family.arch.block.split(".")[0]) for i in family.moe_layers)
