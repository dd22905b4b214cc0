"""Tokenizers that llama.cpp's converter takes: a small one by SentencePiece, and GPT-2's, which llama.cpp's source carries."""

import json
import sys
from pathlib import Path

CONVERTER = next(Path(sys.prefix).glob("llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py"), Path("convert_hf_to_gguf.py"))
"""In the environment of `make test-gguf`."""
TEXTS = Path(__file__).parents[2] / "docs"
PIECES = 512


def write_sentencepiece(folder: Path) -> int:
    """Pieces of the project's own pages, in a tokenizer.model and a tokenizer.json, as a Mixtral has them. Returns their number."""
    import sentencepiece
    from transformers import LlamaTokenizer

    lines = [line for page in sorted(TEXTS.glob("*.md")) for line in page.read_text().splitlines() if line]
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=PIECES, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
        )  # fmt: skip
    LlamaTokenizer.from_pretrained(folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return PIECES


def write_gpt2(folder: Path) -> int:
    """GPT-2's tokenizer. Returns the size of its vocabulary."""
    sys.path.append(str(CONVERTER.parent / "gguf-py"))
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GGUFReader(CONVERTER.parent / "models" / "ggml-vocab-gpt-2.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    made.save(str(folder / "tokenizer.json"))
    end = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | end))
    return len(tokens)
