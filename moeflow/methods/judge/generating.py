"""Let a whole model write behind many prompts at once, by its likeliest tokens or by drawn ones, as transformers' `generate` does.

Nothing of the model's own generation settings but its end-of-sequence tokens is used: no penalties, no cut distributions.
Shapes are suffixes: N texts, L positions, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from moeflow.model.quiet import load_whole, quiet

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn: at a temperature, with random numbers that the seed, the text and the position decide.

    They do not depend on the model, so that two models draw alike as far as they agree (the Gumbel-max trick).
    """

    temperature: float
    seed: int


@dataclass(frozen=True)
class Written:
    """What was written behind one prompt: its tokens, without the one that ends it, and its text, up to where it is to stop."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""


class Writer:
    """A model and its tokenizer, loaded whole from a checkpoint's folder."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = load_whole(folder, dtype=dtype, device_map=self.device).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self.ends: list[int] = [e for e in (ends if isinstance(ends, list) else [ends]) if e is not None]
        self.pad = next((i for i in (self.tokenizer.pad_token_id, *self.ends) if i is not None), 0)
        self.positions = getattr(self.model.config, "max_position_embeddings", None)

    def prompt(self, asked: str | list[dict[str, Any]], tools: Sequence[dict[str, Any]], begin: str, *, chat: bool) -> list[int]:
        """The tokens of a prompt: messages, and with `chat` a text too, through the chat template.

        `begin`: with which the answer begins. Raises ValueError if messages have no template.
        """
        if isinstance(asked, list) or chat:
            if not self.tokenizer.chat_template:
                raise ValueError(
                    "the tokenizer has no chat template, which messages need; give prompts, or put chat_template.jinja there"
                )
            messages = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
            text = self.tokenizer.apply_chat_template(messages, tools=[*tools] or None, add_generation_prompt=True, tokenize=False)
            return [*self.tokenizer(text + begin, add_special_tokens=False)["input_ids"]]
        return [*self.tokenizer(asked + begin)["input_ids"]]

    def written(
        self, prompts: Sequence[list[int]], stops: Sequence[Sequence[str]], tokens: int, batch: int, progress: Progress,
        drawing: Drawing | None = None,
    ) -> list[Written]:  # fmt: skip
        """What the model writes behind each prompt, at most `tokens` tokens; the likeliest ones, unless they are drawn.

        Longest prompts come first. A prompt that leaves no room among the model's positions loses its beginning.
        """
        made: list[Written] = [Written()] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), batch):
            picked = order[start : start + batch]
            for i, one in zip(
                picked, self._batch([prompts[i] for i in picked], [stops[i] for i in picked], picked, tokens, drawing), strict=True
            ):
                made[i] = one
            progress(min(start + batch, len(order)), len(order), "prompts")
        return made

    @torch.inference_mode()
    def _batch(
        self,
        prompts: Sequence[list[int]],
        stops: Sequence[Sequence[str]],
        items: Sequence[int],
        tokens: int,
        drawing: Drawing | None,
    ) -> list[Written]:
        room = self.positions - tokens if self.positions else None
        cut = [(p[-room:] if room else p) or [self.pad] for p in prompts]
        width = max(map(len, cut))
        ids_NL = torch.tensor([[self.pad] * (width - len(p)) + p for p in cut], device=self.device)
        mask_NL = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in cut], device=self.device)
        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=self.ends or None, pad_token_id=self.pad)
        with quiet():
            out_NL = self.model.generate(
                input_ids=ids_NL, attention_mask=mask_NL, generation_config=config,
                logits_processor=LogitsProcessorList([_Drawn(drawing, items, width)] if drawing else []),
                stopping_criteria=StoppingCriteriaList([_Stopped(self.tokenizer, stops, width)] if any(stops) else []),
            )  # fmt: skip
        return [self._read(row, stop) for row, stop in zip(out_NL[:, width:].tolist(), stops, strict=True)]

    def _read(self, tokens: list[int], stops: Sequence[str]) -> Written:
        end = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        text = str(self.tokenizer.decode(tokens[:end], skip_special_tokens=True))
        return Written(tokens[:end], text[: min((at for s in stops if (at := text.find(s)) >= 0), default=len(text))])


class _Drawn(LogitsProcessor):
    """Makes the likeliest token a drawn one, by adding Gumbel noise to the logits over the temperature."""

    def __init__(self, drawing: Drawing, items: Sequence[int], start: int) -> None:
        self._drawing, self._items, self._start = drawing, items, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        at, noise = input_ids.shape[1] - self._start, []
        for item in self._items:
            random = torch.Generator().manual_seed(_number(f"{self._drawing.seed}/{item}/{at}"))
            noise.append(-torch.empty(scores.shape[1]).exponential_(generator=random).log())
        return scores.float() / self._drawing.temperature + torch.stack(noise).to(scores.device)


def _number(words: str) -> int:
    """A seed that words decide, the same everywhere."""
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big")


class _Stopped(StoppingCriteria):
    """Ends a text once it holds one of its words to stop at."""

    def __init__(self, tokenizer: Any, stops: Sequence[Sequence[str]], start: int) -> None:
        self._tokenizer, self._stops, self._start = tokenizer, stops, start
        self._tail = max((len(s.encode()) for stop in stops for s in stop), default=0) + 4  # tokens; one is a byte at least

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        tails = self._tokenizer.batch_decode(input_ids[:, self._start :][:, -self._tail :])
        over = [any(s in tail for s in stop) for tail, stop in zip(tails, self._stops, strict=True)]
        return torch.tensor(over, device=input_ids.device)
