"""An example for fine-tuning as tokens: an instruction with its response, or a conversation with the assistant's turns.

Every token is either read (prompts) or learned (responses). The tokens before a response are exactly those that the model gets when
it is asked. This module handles no files and no matrices.
"""

import re
from typing import Any

from moeflow.methods.data.chats import Chat, chat_of, rendered
from moeflow.methods.data.packing import LeftOut, Piece, words

Segments = list[tuple[str, bool]]
"""A text as consecutive segments, each with a flag: is it learned?"""

INSTRUCTION = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template's own mark around the assistant's words


def segments_of(tokenizer: Any, row: dict[str, Any], kinds: dict[str, str], format: str) -> list[Segments]:
    """One example, a row of columns of these kinds, as one text or several; `format` is one of `Examples`, or "calls".

    Raises LeftOut if it has nothing to learn.
    """
    if format in ("chat", "calls"):
        return chat(tokenizer, *chat_of(row, kinds))
    texts = [words(value) for value in row.values()]
    if format == "text":
        if not any(t.strip() for t in texts):
            raise LeftOut("documents without text")
        return [[(" ".join(t for t in texts if t), True)]]
    prompts, response = [p.strip() for p in texts[:-1] if p.strip()], texts[-1]
    if not prompts:
        raise LeftOut("examples without a prompt")
    if not response.strip():
        raise LeftOut("examples without a response")
    return [[(instruction(*prompts), False), (response, True)]]


def instruction(task: str, *inputs: str) -> str:
    """The prompt before a response, in Alpaca's words (Taori et al. 2023), which MetaMath and others use too."""
    context = "\n\n### Input:\n" + "\n\n".join(inputs) if inputs else ""
    return f"{WITH_INPUT if inputs else INSTRUCTION}\n\n### Instruction:\n{task}{context}\n\n### Response:\n"


def chat(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[Segments]:
    """A conversation as the chat template renders it, with the assistant's turns learned.

    If the template marks the assistant's words with `{% generation %}`, the marks decide. Otherwise the messages before a turn are
    rendered as the question for it (`add_generation_prompt`), and the turn is what follows, up to the token that ends it. Some
    templates drop the reasoning of earlier turns, so the whole conversation does not begin with such a question; then every turn
    becomes its own text, as it was when it was the last turn. The assistant's words before the first question are only read, and
    everything after its last turn is dropped.

    Raises LeftOut if the assistant says nothing, and if the template refuses the conversation.
    """
    answers = [i for i, m in enumerate(messages) if i and m["role"] == "assistant" and (m.get("content") or m.get("tool_calls"))]
    if not answers:
        raise LeftOut("conversations without a response")
    until_last = Chat(messages[: answers[-1] + 1], tools)
    whole = rendered(tokenizer, until_last)
    if GENERATION.search(tokenizer.get_chat_template(tools=tools)):
        return [_marked(tokenizer, until_last)]
    turns = [_turn(tokenizer, Chat(messages[: i + 1], tools)) for i in answers]
    if not all(whole.startswith(before + turn) for before, turn, _ in turns):
        return [[(before, False), (turn, True), (rest, False)] for before, turn, rest in turns]
    return [_cut(whole, [(len(before), len(before + turn)) for before, turn, _ in turns])]


def encoded(tokenizer: Any, segments: Segments) -> Piece:
    """The tokens of consecutive segments, and 1 for each token of a learned segment.

    The text is tokenized as a whole, except that it starts anew at segment borders that a token would straddle. So prompts
    become the tokens that the model gets when it is asked.
    """
    ids: list[int] = []
    learned: list[int] = []
    text, start = "", 0  # since the last border that a token would straddle
    for segment, counts in segments:
        text += segment
        whole = tokenized(tokenizer, text)
        if whole[: len(ids) - start] != ids[start:]:
            text, start = segment, len(ids)
            whole = tokenized(tokenizer, text)
        ids += whole[len(ids) - start :]
        learned += [int(counts)] * (len(ids) - len(learned))
    return ids, learned


def tokenized(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text without special ones. Raises LeftOut for a text with half a character ("\\ud800" in JSON)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise LeftOut("texts with half a character, which no tokenizer takes") from None
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _marked(tokenizer: Any, chat: Chat) -> Segments:
    # Not apply_chat_template(return_assistant_tokens_mask=True): it finds tokens by their offsets, and where a tokenizer trims
    # these (a ByteLevel post-processor does), a response that begins with a space is not learned, nor is any behind it.
    from transformers.utils.chat_template_utils import render_jinja_template

    made: Any = render_jinja_template(
        conversations=[[{k: v for k, v in m.items() if v is not None} for m in chat.messages]],  # as apply_chat_template does
        tools=[*chat.tools] if chat.tools is not None else None,
        chat_template=tokenizer.get_chat_template(tools=chat.tools),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    (text,), (spans,) = made
    if not any(start < end for start, end in spans):
        raise LeftOut("conversations in which the chat template marks no response")
    return _cut(text, spans)


def _cut(text: str, spans: list[tuple[int, int]]) -> Segments:
    """Cut the text into segments; the characters in these spans are learned."""
    segments: Segments = []
    at = 0
    for start, end in spans:
        segments += [(text[at:start], False), (text[start:end], True)]
        at = end
    return [*segments, (text[at:], False)]


def _turn(tokenizer: Any, chat: Chat) -> tuple[str, str, str]:
    """The last message as the template renders it: the question before it, the turn itself, and what follows its last token."""
    before = rendered(tokenizer, chat._replace(messages=chat.messages[:-1]), ask=True)
    whole = rendered(tokenizer, chat)
    if not whole.startswith(before):
        raise LeftOut(
            "conversations whose responses do not follow on the template's generation prompt (mark them by {% generation %})"
        )
    turn = whole[len(before) :]
    ended = turn.rstrip()
    if not ended.endswith(tuple(tokenizer.all_special_tokens)):
        ended = turn
    return before, ended, turn[len(ended) :]
