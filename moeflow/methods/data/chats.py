"""Conversations as files hold them, and as the model's chat template renders them. Handles no files and no tokens."""

import json
from typing import Any, NamedTuple

from moeflow.methods.data.packing import LeftOut

MESSAGES = ("messages", "conversations", "conversation")
"""The columns that hold a conversation without being told to."""
SHARE_GPT = {"from": "role", "value": "content"}
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""ShareGPT's names, and those of the chat templates."""
REFUSED = "conversations that the chat template refuses"


class Chat(NamedTuple):
    """A conversation as `apply_chat_template` takes it: its messages, and the tools that may be called in it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def kinds(columns: tuple[str, ...], format: str) -> dict[str, str]:
    """What each column holds in this format (one of `Examples`, "calls", or none): "text", "messages", "tools" or "calls".

    Of "chat" it is messages, and maybe tools (`URI#messages+tools`), or prompts and last the response. Of "calls" it is a question,
    the tools, and the calls that answer it.
    """
    if format == "calls":
        return dict(zip(columns, ("text", "tools", "calls"), strict=True))
    if format == "chat" and (len(columns) == 1 or columns[0] in MESSAGES or columns[1:] == ("tools",)):
        return dict(zip(columns, ("messages", "tools"), strict=False))
    return dict.fromkeys(columns, "text")


def checked(kinds: dict[str, str], row: dict[str, Any], name: str, at: str) -> dict[str, Any]:
    """A row's values, those that are JSON in a string parsed. `name`: of its file, `at`: where it stands there ("line 7").

    Raises ValueError, with both, for a value that is not what its column should hold.
    """
    return {column: _checked(value, kinds[column], f"column {column!r} of {name}", at) for column, value in row.items()}


def _checked(value: Any, kind: str, what: str, at: str) -> Any:
    if kind == "text":
        if isinstance(value, list | dict):
            raise ValueError(f"{what} holds a {type(value).__name__} and no text; name another (URI#column), or correct {at}")
        return value
    try:
        parsed = json.loads(value or "null") if isinstance(value, str) else value
        if isinstance(parsed, list):
            parsed = [json.loads(item) if isinstance(item, str) else item for item in parsed]
    except (ValueError, RecursionError):
        parsed = value
    if parsed is not None and not (isinstance(parsed, list) and all(isinstance(item, dict) for item in parsed)):
        form = {"messages": "({role, content} or {from, value})", "tools": "(JSON schemas)", "calls": "({name, arguments})"}[kind]
        raise ValueError(f"{what} holds no {kind} {form} in {at}; name another (URI#column), or correct it")
    return parsed


def chat_of(row: dict[str, Any], kinds: dict[str, str]) -> Chat:
    """The conversation of a row that `checked` has passed. Raises LeftOut if it has none."""
    by_kind: dict[str, list[Any]] = {}
    for column, kind in kinds.items():
        by_kind.setdefault(kind, []).append(row[column])
    (tools,) = by_kind.get("tools", [None])
    if "messages" in by_kind:
        return Chat(_messages(by_kind["messages"][0]), tools)
    texts = ["" if text is None else str(text) for text in by_kind["text"]]
    if "calls" in by_kind:
        return _of_calls(texts[0], tools, by_kind["calls"][0])
    prompts = [p.strip() for p in texts[:-1] if p.strip()]
    if not prompts:
        raise LeftOut("examples without a prompt")
    if not texts[-1].strip():
        raise LeftOut("examples without a response")
    return Chat([{"role": "user", "content": "\n\n".join(prompts)}, {"role": "assistant", "content": texts[-1]}])


def rendered(tokenizer: Any, chat: Chat, *, ask: bool = False) -> str:
    """The text that `apply_chat_template` gives for a conversation; `ask`: with what asks the assistant for an answer at its end.

    Raises LeftOut if the template refuses the conversation, and ValueError if the template itself is broken.
    """
    import jinja2

    try:
        text: str = tokenizer.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False, add_generation_prompt=ask)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the tokenizer's chat template cannot be read (line {error.lineno}: {error.message}); put a correct "
            "chat_template.jinja beside the checkpoint"
        ) from None
    except Exception as error:  # raised by a template on purpose, or by what it does with a value that it did not expect
        raise LeftOut(REFUSED, " ".join(str(error).split())[:160]) from error
    return text


def prints_lists(chat: Chat, text: str) -> bool:
    """Whether a text has a message's parts as Python prints a list, because the template knows no content in parts."""
    return any(isinstance(parts := m.get("content"), list) and parts and str(parts) in text for m in chat.messages)


def _messages(messages: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Messages as they are; those in ShareGPT's spelling with `role` and `content`."""
    if not messages:
        raise LeftOut("rows without messages")
    spelled = [m if "role" in m else {SHARE_GPT.get(key, key): value for key, value in m.items()} for m in messages]
    if any("role" not in m for m in spelled):
        raise LeftOut("conversations with a message that has no role")
    return [
        m if m is same else m | {"role": ROLES.get(str(m["role"]), m["role"])} for m, same in zip(spelled, messages, strict=True)
    ]


def _of_calls(question: str, tools: list[dict[str, Any]] | None, calls: list[dict[str, Any]] | None) -> Chat:
    """A question, the tools {name, description, parameters}, and the calls {name, arguments} that answer it, in OpenAI's form."""
    if not question.strip() or not calls:
        raise LeftOut("questions without a call" if question.strip() else "examples without a prompt")
    schemas = []
    for tool in tools or []:
        parameters = tool.get("parameters") or {}
        if "properties" not in parameters:
            parameters = {"type": "object", "properties": parameters}
        schemas.append({"type": "function", "function": tool | {"parameters": parameters}})
    made = [{"id": f"call{i:05d}", "type": "function", "function": call} for i, call in enumerate(calls)]
    answer = {"role": "assistant", "content": "", "tool_calls": made}
    return Chat([{"role": "user", "content": question}, answer], schemas or None)
