"""An example for fine-tuning as tokens: an instruction with its response, or a conversation with the assistant's turns.

Every token is either read (prompts) or learned (responses). The tokens before a response are exactly those that the model gets when
it is asked. This module handles no files and no matrices.
"""

import re
from typing import Any

from moeflow.methods.data.packing import Piece, words

Segments = list[tuple[str, bool]]
"""A text as consecutive segments, each with a flag: is it learned?"""

INSTRUCTION = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template's own mark around the assistant's words
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


class LeftOut(Exception):
    """Nothing can be learned from this example; the message names its kind, in the plural."""


def segments_of(tokenizer: Any, row: dict[str, Any], format: str, where: str) -> list[Segments]:
    """One example, a row of columns, as one text or several; `format` is one of `Examples`; errors name the files by `where`.

    Raises LeftOut if it has nothing to learn, and ValueError if a column has the wrong type.
    """
    if format == "chat" and len(row) == 1:
        ((column, value),) = row.items()
        return chat(tokenizer, messages_of(value, column, where))
    texts = [words(value, column, where) for column, value in row.items()]
    if format == "text":
        if not any(t.strip() for t in texts):
            raise LeftOut("documents without text")
        return [[(" ".join(t for t in texts if t), True)]]
    prompts, response = [p.strip() for p in texts[:-1] if p.strip()], texts[-1]
    if not prompts:
        raise LeftOut("examples without a prompt")
    if not response.strip():
        raise LeftOut("examples without a response")
    if format == "chat":
        roles = ("user", "\n\n".join(prompts)), ("assistant", response)
        return chat(tokenizer, [{"role": role, "content": content} for role, content in roles])
    return [[(instruction(*prompts), False), (response, True)]]


def instruction(task: str, *inputs: str) -> str:
    """The prompt before a response, in Alpaca's words (Taori et al. 2023), which MetaMath and others use too."""
    context = "\n\n### Input:\n" + "\n\n".join(inputs) if inputs else ""
    return f"{WITH_INPUT if inputs else INSTRUCTION}\n\n### Instruction:\n{task}{context}\n\n### Response:\n"


def messages_of(value: Any, column: str, where: str) -> list[dict[str, Any]]:
    """A conversation as messages with `role` and `content`, also from ShareGPT's `from` and `value`.

    Raises ValueError if it is not a list of messages.
    """
    if not isinstance(value, list) or not all(isinstance(m, dict) and (m.get("role") or m.get("from")) for m in value):
        raise ValueError(
            f"column {column!r} of {where} holds no messages ({{role, content}} or {{from, value}}); name another (URI#column)"
        )
    messages = [{{"from": "role", "value": "content"}.get(k, k): v for k, v in m.items() if v is not None} for m in value]
    return [m | {"role": ROLES.get(m["role"], m["role"])} for m in messages]


def chat(tokenizer: Any, messages: list[dict[str, Any]]) -> list[Segments]:
    """A conversation as the chat template renders it, with the assistant's turns learned.

    If the template marks the assistant's words with `{% generation %}`, the marks decide. Otherwise the messages before a turn are
    rendered as the question for it (`add_generation_prompt`), and the turn is what follows, up to the token that ends it. Some
    templates drop the reasoning of earlier turns, so the whole conversation does not begin with such a question; then every turn
    becomes its own text, as it was when it was the last turn. The assistant's words before the first question are only read, and
    everything after its last turn is dropped.

    Raises LeftOut if the assistant says nothing, and if the template refuses the conversation.
    """
    import jinja2

    answers = [i for i, m in enumerate(messages) if i and m["role"] == "assistant" and (m.get("content") or m.get("tool_calls"))]
    if not answers:
        raise LeftOut("conversations without a response")
    messages = messages[: answers[-1] + 1]
    try:
        if GENERATION.search(tokenizer.get_chat_template()):
            return [_marked(tokenizer, messages)]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        turns = [_turn(tokenizer, messages[: i + 1]) for i in answers]
    except jinja2.TemplateSyntaxError:
        raise
    except (jinja2.TemplateError, TypeError) as error:  # raised by a template on purpose, or by accident
        raise LeftOut(f"conversations that the chat template refuses ({' '.join(str(error).split())})") from error
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
    """The tokens of a text without special ones."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _marked(tokenizer: Any, messages: list[dict[str, Any]]) -> Segments:
    # Not apply_chat_template(return_assistant_tokens_mask=True): it finds tokens by their offsets, and where a tokenizer trims
    # these (a ByteLevel post-processor does), a response that begins with a space is not learned, nor is any behind it.
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    (text,), (spans,) = rendered
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


def _turn(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[str, str, str]:
    """The last message as the template renders it: the question before it, the turn itself, and what follows its last token."""
    before: str = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole: str = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(before):
        raise LeftOut(
            "conversations whose responses do not follow on the template's generation prompt (mark them by {% generation %})"
        )
    turn = whole[len(before) :]
    ended = turn.rstrip()
    if not ended.endswith(tuple(tokenizer.all_special_tokens)):
        ended = turn
    return before, ended, turn[len(ended) :]
