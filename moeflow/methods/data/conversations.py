"""An example for fine-tuning as tokens: an instruction with its response, or a conversation, of which the responses are learned.

A token is either read or learned, and what is learned follows on exactly those tokens that a model is given when it is asked.
Knows no file and no matrix.
"""

import re
from typing import Any

from moeflow.methods.data.packing import Piece, words

Segments = list[tuple[str, bool]]
"""A text in consecutive segments, each with whether it is learned."""

INSTRUCTION = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # by which a template marks what the assistant says
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


class LeftOut(Exception):
    """An example in which nothing can be learned: the message says what kind of examples these are."""


def segments_of(tokenizer: Any, row: dict[str, Any], format: str, where: str) -> list[Segments]:
    """The text of one example by its columns, or several texts, in the format that `examples.of` says; `where` names its files.

    Raises LeftOut, and ValueError for a column that holds something else.
    """
    if format == "chat" and len(row) == 1:
        ((column, value),) = row.items()
        return chat(tokenizer, messages_of(value, column, where))
    given = [words(value, column, where) for column, value in row.items()]
    if format == "text":
        if not any(t.strip() for t in given):
            raise LeftOut("documents without text")
        return [[(" ".join(t for t in given if t), True)]]
    prompts, response = [p.strip() for p in given[:-1] if p.strip()], given[-1]
    if not prompts:
        raise LeftOut("examples without a prompt")
    if not response.strip():
        raise LeftOut("examples without a response")
    if format == "chat":
        roles = ("user", "\n\n".join(prompts)), ("assistant", response)
        return chat(tokenizer, [{"role": role, "content": content} for role, content in roles])
    return [[(instruction(*prompts), False), (response, True)]]


def instruction(task: str, *given: str) -> str:
    """What a response follows on: Alpaca's prompt (Taori et al. 2023), which MetaMath and others use too; `given` is the input."""
    context = "\n\n### Input:\n" + "\n\n".join(given) if given else ""
    return f"{WITH_INPUT if given else INSTRUCTION}\n\n### Instruction:\n{task}{context}\n\n### Response:\n"


def messages_of(value: Any, column: str, where: str) -> list[dict[str, Any]]:
    """A conversation as messages with `role` and `content`; ShareGPT's `from` and `value` are understood. Raises ValueError."""
    if not isinstance(value, list) or not all(isinstance(m, dict) and (m.get("role") or m.get("from")) for m in value):
        raise ValueError(
            f"column {column!r} of {where} holds no messages ({{role, content}} or {{from, value}}); name another (URI#column)"
        )
    found = [{{"from": "role", "value": "content"}.get(k, k): v for k, v in m.items() if v is not None} for m in value]
    return [m | {"role": ROLES.get(m["role"], m["role"])} for m in found]


def chat(tokenizer: Any, messages: list[dict[str, Any]]) -> list[Segments]:
    """A conversation as the chat template renders it, with the assistant's turns learned.

    A template that marks with `{% generation %}` what the assistant says is taken at its word. Otherwise a turn is what follows on
    the messages before it as they are rendered to ask for it (`add_generation_prompt`), up to the token that ends it. Where the
    rendered conversation does not begin with that, as with templates that drop the reasoning of earlier turns, every turn becomes
    a text of its own, as it stood when it was the last. What the assistant says before anybody asked is read; what follows its
    last turn is dropped.

    Raises LeftOut where the assistant says nothing, and where the template refuses the conversation.
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
    except (jinja2.TemplateError, TypeError) as error:  # what a template raises of itself, and what it stumbles over
        raise LeftOut(f"conversations that the chat template refuses ({' '.join(str(error).split())})") from error
    if not all(whole.startswith(before + said) for before, said, _ in turns):
        return [[(before, False), (said, True), (rest, False)] for before, said, rest in turns]
    return [_cut(whole, [(len(before), len(before + said)) for before, said, _ in turns])]


def encoded(tokenizer: Any, given: Segments) -> Piece:
    """The tokens of consecutive segments, and 1 for those of the learned ones.

    The text is tokenized as a whole as far as no token straddles two segments, and anew at a border where one would: what is read
    becomes the tokens that the model sees when it is asked.
    """
    ids: list[int] = []
    learned: list[int] = []
    text, start = "", 0  # since the last border that a token would straddle
    for segment, counts in given:
        text += segment
        whole = tokenized(tokenizer, text)
        if whole[: len(ids) - start] != ids[start:]:
            text, start = segment, len(ids)
            whole = tokenized(tokenizer, text)
        ids += whole[len(ids) - start :]
        learned += [int(counts)] * (len(ids) - len(learned))
    return ids, learned


def tokenized(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


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
    """A text of which these characters are learned."""
    found: Segments = []
    at = 0
    for start, end in spans:
        found += [(text[at:start], False), (text[start:end], True)]
        at = end
    return [*found, (text[at:], False)]


def _turn(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[str, str, str]:
    """What stands before the last message when the model is asked for it, its turn, and what is behind the token that ends it."""
    before: str = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole: str = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(before):
        raise LeftOut(
            "conversations whose responses do not follow on the template's generation prompt (mark them by {% generation %})"
        )
    said = whole[len(before) :]
    ended = said.rstrip()
    if not ended.endswith(tuple(tokenizer.all_special_tokens)):
        ended = said
    return before, ended, said[len(ended) :]
