"""Chats as text, with the tokenizer's own chat template, and which of their characters are trained.

A template is a program that renders a list of messages. Most say nowhere which part of their output an assistant
wrote, so that is found by rendering beginnings of the chat. Of the assistant's message i in a chat of n messages:

    prompt  = render(messages[:i], with the generation prompt)      what the model will have been given
    turn    = render(messages[:i + 1]), from the end of prompt      what it must write: answer and end-of-turn token

Both must be beginnings of render(messages), which is what is trained on; then the turn's characters are. Where a
template closes a finished conversation with something more (Phi 3: EOS), the turn ends where that begins: up to
where render(messages[:i + 1]) is alike with and without the generation prompt, if what is left closes the whole chat
too. What follows the last message is part of its turn.

A template that renders earlier turns differently once later ones are there (Qwen 3 leaves out their thoughts) has no
such beginnings: the model would be trained on prompts that it never sees. That is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cadapter.errors import UsageError

ASSISTANT = "assistant"

Span = tuple[int, int]
"""Characters from the first number to before the second."""

Render = Callable[..., str]
"""transformers' ``apply_chat_template``, which gives text."""


@dataclass(frozen=True)
class Chat:
    """A rendered chat, the spans that are trained, and whether it ends with a turn of the assistant."""

    text: str
    trained: tuple[Span, ...]
    answered: bool


class NoChatTemplate(UsageError):
    """The tokenizer has no chat template: whatever the records hold, no chat can be rendered."""


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: transformers'; it renders in a sandbox.
        name: of its directory, for messages.

    Raises:
        NoChatTemplate: the tokenizer has none.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not tokenizer.chat_template:
            raise NoChatTemplate(
                f"{name}: the tokenizer has no chat template, which the chats of the data need.\n"
                f"Use the model's instruction-tuned version, or put a chat_template.jinja into {name}."
            )
        self._apply: Render = tokenizer.apply_chat_template
        self._name = name

    def render(self, messages: Any, tools: Any, where: str) -> Chat:
        """Return a chat as text, with the turns of the assistant as spans.

        Args:
            messages: objects with ``role`` and ``content`` (and what else the template uses), in order.
            tools: descriptions of tools, which are handed to the template; None: there are none.
            where: the record's place, for messages.

        Raises:
            UsageError: these are no messages, none is the assistant's, or the template fails or rewrites turns.
        """
        _check_messages(messages, where)
        turns = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
        if not turns:
            raise _error(where, "no message is the assistant's, so that there is nothing to train", messages)
        text = self._text(messages, messages, tools, where)
        if turns[0] == 0:
            raise _error(
                where, "the first message is the assistant's, which nothing prompts; begin with another", messages
            )
        spans = tuple(self._turn(text, messages, index, tools, where) for index in turns)
        return Chat(text, spans, turns[-1] == len(messages) - 1)

    def _turn(self, text: str, messages: list[Any], index: int, tools: Any, where: str) -> Span:
        """Return the characters of ``text`` that message ``index`` is."""
        prompt = self._text(messages[:index], messages, tools, where, add_generation_prompt=True)
        if not text.startswith(prompt):
            raise self._rewritten(
                text, prompt, f"first {index} messages with the prompt for an answer", messages, where
            )
        if index == len(messages) - 1:
            return len(prompt), len(text)
        done = self._text(messages[: index + 1], messages, tools, where)
        if not text.startswith(done):
            going_on = self._text(messages[: index + 1], messages, tools, where, add_generation_prompt=True)
            alike = _alike(done, going_on)
            if text.endswith(done[alike:]):  # what closes the whole chat as well
                done = done[:alike]
        if not text.startswith(done) or len(done) < len(prompt):
            raise self._rewritten(text, done, f"first {index + 1} messages", messages, where)
        return len(prompt), len(done)

    def _text(self, part: list[Any], messages: list[Any], tools: Any, where: str, **options: bool) -> str:
        try:
            return self._apply(part, tools=tools, tokenize=False, **options)
        except Exception as error:  # a template is a program, and fails as it likes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            of = "" if len(part) == len(messages) else f" for the first {len(part)} of {len(messages)} messages"
            raise _error(where, f"the chat template of {self._name} fails{of}: {reason}", messages) from error

    def _rewritten(self, text: str, beginning: str, of: str, messages: list[Any], where: str) -> UsageError:
        alike = _alike(text, beginning)
        around = slice(max(0, alike - 30), alike + 50)
        return UsageError(
            f"{where}: the chat template of {self._name} renders the {of} differently in the whole chat than alone, so "
            "that the model would be trained on what it never sees.\n"
            f"Alone: … {beginning[around]!r}\nIn the whole chat: … {text[around]!r}\n"
            "Give chats with one answer each, or use a template that keeps earlier turns as they are.\n"
            f"The record: {shown(messages)}"
        )


def _alike(first: str, second: str) -> int:
    """Return how many characters two texts have in common from the beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: messages must be a list of objects with 'role' and 'content': {shown(messages)}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(f"{where}: message {number} must be an object with 'role' and 'content': {shown(message)}")
        if not isinstance(message.get("content"), (str, list, type(None))):
            raise UsageError(f"{where}: the content of message {number} must be a string: {shown(message)}")
        if message.get("content") is None and not message.get("tool_calls"):
            raise UsageError(f"{where}: message {number} has no content: {shown(message)}")


def _error(where: str, what: str, messages: Any) -> UsageError:
    return UsageError(f"{where}: {what}.\nThe record: {shown(messages)}")


def shown(value: Any, longest: int = 600) -> str:
    """Return ``value`` as JSON on one line, cut in the middle where it is long."""
    return shortened(json.dumps(value, ensure_ascii=False, default=str), longest)


def shortened(text: str, longest: int = 600) -> str:
    """Return ``text``, or its beginning and its end where it is longer than ``longest`` characters."""
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]} … {text[-(longest // 2) :]}"
