"""What moeflow prunes, pulled for llama.cpp, converted by its own converter and loaded by it, is what transformers computes."""

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from moeflow.engines import engine_of
from moeflow.engines.otherwise import in_llama_cpp
from moeflow.model.for_engine import prepare
from moeflow.model.layout import Folder, read_config
from moeflow.run import pulling
from tests import running, tiny
from tests.gguf import vocabularies
from tests.gguf.engine import ALL, agreement, opened
from tests.report.conftest import TOKENS, call, last_json

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python; `make test-gguf` makes an environment with it")
pytestmark = pytest.mark.gguf

PIPELINE = Path(__file__).with_name("compressed_pipeline.py")
FAMILIES = {
    "mixtral": {},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {},
    "olmoe": {"num_key_value_heads": 4},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": {},
}
"""The families that llama.cpp computes as transformers does, with what it has no other choice for."""


def written(family: str, folder: Path, **changes: object) -> Path:
    """A tiny checkpoint of the family, with a tokenizer of a kind that the converter takes for it."""
    folder.mkdir(parents=True)
    size = vocabularies.write_sentencepiece(folder) if family in ("mixtral", "phimoe") else vocabularies.write_gpt2(folder)
    return tiny.write(family, folder, vocab_size=size, **(FAMILIES.get(family, {}) | changes))


def agreed(source: Path, folder: Path, *options: str) -> tuple[int, float]:
    """The model compressed by moeflow, pulled as it is for transformers and as a model.gguf for llama.cpp, and how both agree."""
    running.matrix_of(folder)
    here = os.getcwd()
    os.chdir(folder)
    try:
        words = [w for option in options for w in ("-p", option)]
        made = call(folder, "run", PIPELINE, "-p", f"model={source}", "-p", f"tokens={TOKENS}", *words, "--json")
    finally:
        os.chdir(here)
    assert made.exit_code == 0, made.output
    last_json(call(folder, "pull", "compressed_pipeline@1", folder / "own", "--json"))
    out = folder / "out"
    asked = ("--engine", "llama.cpp", "--converter", vocabularies.CONVERTER)
    told = last_json(call(folder, "pull", "compressed_pipeline@1", out, *asked, "--json"))
    assert told["gguf"] == {"file": str(out / "model.gguf"), "bytes": (out / "model.gguf").stat().st_size}
    return agreement(out / "model.gguf", folder / "own")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_writes_in_llama_cpp_what_it_writes_in_transformers(family: str, tmp_path: Path) -> None:
    same, apart = agreed(written(family, tmp_path / "model"), tmp_path)
    assert same == ALL and apart < 5e-4, f"{same} of {ALL} tokens, {apart} apart"


def test_a_trained_model_is_nearer(tmp_path: Path) -> None:
    """The small Mixtral, with another tokenizer than its own, which the converter does not know."""
    model = shutil.copytree(running.SMALL, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    vocabularies.write_sentencepiece(model)
    same, apart = agreed(model, tmp_path)
    assert same == ALL and apart < 1e-4, f"{same} of {ALL} tokens, {apart} apart"


@pytest.mark.parametrize(
    "options",
    [
        ("slim=round_to_nearest", "slim.group=16"),
        ("slim=round_to_nearest", "slim.group=16", "slim.bits=8"),
        ("slim=round_to_nearest", "slim.group=16", "slim.bits=2"),
        ("slim=round_to_nearest", "slim.group=16", "slim.symmetric=false"),
        ("decompose=0.5", "decompose.multiple=4"),
    ],
)
def test_packed_experts_are_unpacked_and_low_rank_ones_multiplied_out(options: tuple[str, ...], tmp_path: Path) -> None:
    same, apart = agreed(written("mixtral", tmp_path / "model"), tmp_path, *options)
    assert same == ALL and apart < 5e-4, f"{same} of {ALL} tokens, {apart} apart"


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_a_text_has_the_tokens_that_it_has_in_transformers(family: str, tmp_path: Path) -> None:
    """Save where a text begins with spaces: llama.cpp then agrees with SentencePiece, and transformers leaves one out."""
    made = written(family, tmp_path / "model")
    pulling.converted(made, vocabularies.CONVERTER)
    model, own = opened(made / "model.gguf"), AutoTokenizer.from_pretrained(made)
    for text in ("What moeflow prunes is pulled.", "def f(x):\n    return 3.14 * x  # naïve, 你好 🚀", "two  spaces"):
        theirs = model.tokenize(text.encode(), add_bos=False)
        assert theirs == own.encode(text, add_special_tokens=False), text


def test_a_tokenizer_that_the_converter_does_not_know_is_refused_before_a_file_is_copied(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="does not take the tokenizer .*BPE pre-tokenizer was not recognized.*; nothing was"):
        agreed(running.SMALL, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "family, changes",
    [
        ("mixtral", {"sliding_window": 4}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("olmoe", {"rms_norm_eps": 1e-2}),
        ("phimoe", {"attention_bias": True, "lm_head_bias": True, "original_max_position_embeddings": 64}),
        ("deepseek_v2", {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}),
    ],
)
def test_what_is_refused_as_computed_otherwise_is(family: str, changes: dict[str, object], tmp_path: Path) -> None:
    """With routers that nearly hesitate, as trained ones do: groups are not chosen by one expert that has it all."""
    made = written(family, tmp_path / "model", **changes)
    for file in made.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: t * 0.1 if n.endswith(".gate.weight") else t for n, t in tensors.items()}, file, {"format": "pt"})
    prepare(made, engine_of("llama.cpp"))
    assert in_llama_cpp(read_config(Folder(made)))
    pulling.converted(made, vocabularies.CONVERTER)
    _, apart = agreement(made / "model.gguf", made)
    assert apart > 0.01
