"""Records to documents: which fields hold what, and the class of each document.

| the dataset has | a record gives |
|---|---|
| ``text_field`` (the default) | one document, its text, all of it trained |
| ``messages_field`` | one document, a chat (:mod:`cadapter.data.chat`), the assistant's turns trained |
| ``chosen_field`` and ``rejected_field`` | a document of class +1 and one of class −1, each a text or a chat |

The class is the dataset's, or with ``class_field`` the record's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cadapter.classes import CLASS_NAMES, NEGATIVE, POSITIVE
from cadapter.data.chat import Chat, Span, shortened
from cadapter.data.sources import NoField, Record, type_name
from cadapter.errors import UsageError

RenderChat = Callable[[Any, Any, str], Chat]
"""``render(messages, tools, where)``: a chat as text."""


@dataclass(frozen=True)
class Fields:
    """Where the records of a dataset hold what; None: not at all."""

    text: str = "text"
    messages: str | None = None
    class_: str | None = None
    chosen: str | None = None
    rejected: str | None = None

    @property
    def is_plain_text(self) -> bool:
        """Whether records are texts, which may be cut anywhere, and neither chats nor pairs."""
        return self.messages is None and self.chosen is None

    @property
    def give_class(self) -> bool:
        """Whether records say their class themselves."""
        return self.class_ is not None or self.chosen is not None

    @property
    def needed(self) -> tuple[str, ...]:
        """The fields that a record must have."""
        pair = (self.chosen, self.rejected) if self.chosen else (self.messages or self.text,)
        return tuple(name for name in (*pair, self.class_) if name is not None)

    def key_of(self, name: str) -> str:
        """The key of the config that says that records need the field ``name``."""
        keys = {"chosen_field": self.chosen, "rejected_field": self.rejected, "class_field": self.class_}
        other = "messages_field" if self.messages else "text_field"
        return next((key for key, value in keys.items() if value == name), other)

    @property
    def optional(self) -> tuple[str, ...]:
        """The fields that are used where a record has them."""
        return () if self.is_plain_text else ("tools",)


@dataclass(frozen=True)
class Document:
    """A document to be tokenised.

    Attributes:
        trained: the spans of characters of a chat that are trained; None: a plain text, all of it.
        answered: whether a chat ends with a turn of the assistant.
        where: the place of its record, for messages.
    """

    text: str
    control_class: int
    where: str
    trained: tuple[Span, ...] | None = None
    answered: bool = False


def documents_of(record: Record, fields: Fields, control_class: int, render: RenderChat) -> list[Document]:
    """Return the documents of a record: two of a pair, else one. Those with empty text are among them.

    Raises:
        UsageError: a field is missing or holds something else, or the chat cannot be rendered.
    """
    where = record.where
    for name in fields.needed:
        if name not in record.fields:
            raise NoField(where, name, record.fields)
    tools = record.fields.get("tools")
    if fields.chosen and fields.rejected:
        pair = ((fields.chosen, POSITIVE), (fields.rejected, NEGATIVE))
        chosen, rejected = (_text_or_chat(record, name, class_, tools, render) for name, class_ in pair)
        if chosen.text == rejected.text:
            raise UsageError(
                f"{where}: {fields.chosen!r} and {fields.rejected!r} are the same: it cannot be enhanced and "
                f"suppressed at once.\n{shortened(chosen.text)}"
            )
        return [chosen, rejected]
    if fields.class_ is not None:
        control_class = _class_of(record.fields[fields.class_], fields.class_, where)
    if fields.messages is not None:
        return [_chat(record.fields[fields.messages], control_class, tools, where, render)]
    return [Document(_text(record.fields[fields.text], fields.text, where), control_class, where)]


def _text_or_chat(record: Record, name: str, class_: int, tools: Any, render: RenderChat) -> Document:
    value = record.fields[name]
    if isinstance(value, list):
        return _chat(value, class_, tools, record.where, render)
    return Document(_text(value, name, record.where), class_, record.where)


def _chat(messages: Any, class_: int, tools: Any, where: str, render: RenderChat) -> Document:
    chat = render(messages, tools, where)
    return Document(_encodable(chat.text, "the chat", where), class_, where, chat.trained, chat.answered)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        remedy = "\nFor a chat, set messages_field." if isinstance(value, list) else ""
        raise UsageError(f"{where}: {name!r} must be a string, but is {type_name(value)}.{remedy}")
    return _encodable(value, repr(name), where)


def _encodable(text: str, name: str, where: str) -> str:
    try:
        text.encode("utf-8")  # a lone surrogate, which JSON's \\ud800 escapes can spell, is no text
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: {name} holds half of a surrogate pair, which is no valid text.") from error
    return text


def _class_of(value: Any, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in CLASS_NAMES:
        shown = value if isinstance(value, (int, float, str)) else type_name(value)
        raise UsageError(f"{where}: {name!r} must be 1, -1 or 0, but is {shown!r}.")
    return int(value)
