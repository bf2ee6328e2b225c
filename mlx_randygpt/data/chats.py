"""Exported chats: WhatsApp's text files, and Markdown with `**Name:**` ahead of each message.

One name is the assistant, all others are the user. Messages of one side that follow each other are
one turn. Of WhatsApp, each day is a conversation, and lines without a text that somebody wrote
(notices, media, deleted messages) are left out. Of Markdown, a heading ahead of a message begins a
conversation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from mlx_randygpt.data import DataError
from mlx_randygpt.dialogue import Turn
from mlx_randygpt.words import one_line

DATE = r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}\.?"
CLOCK = r"\d{1,2}[:.]\d{2}"
HALF = r"(?:\s?[AaPp]\.?\s?[Mm]\.?)?"  # of a day
ANDROID = re.compile(rf"({DATE}),?\s{CLOCK}{HALF}\s[-–]\s(.*)", re.DOTALL)
IOS = re.compile(rf"\[({DATE}),?\s{CLOCK}(?:[:.]\d{{2}})?{HALF}\]\s(.*)", re.DOTALL)
MARKS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"  # of direction
NAMED = re.compile(r"([^:]{1,60}):(?:\s(.*)|$)", re.DOTALL)
WITHOUT_TEXT = re.compile(
    r"<[^<>]+>|null|\S+\.\w{2,4} \([^()]+\)"  # <Media omitted>, IMG-1.jpg (file attached)
    r"|(?:This message was|You) deleted(?: this message)?\.?"
    r"|(?:Diese Nachricht wurde|Du hast diese Nachricht) gelöscht\.?"
)
EDITED = re.compile(r"\s*\u200e<[^<>]+>$")  # a note behind the text
SPEAKER = re.compile(r"\*\*([^*\n:]{1,60})(?::\*\*|\*\*:)[ \t]*(.*)")
HEADING = re.compile(r"#{1,6}\s|(?:-{3,}|\*{3,}|_{3,})\s*$")
HEAD_LINES = 1000  # that decide whether a file is a chat
FEW = 4  # messages of a Markdown chat that is recognised without a name of its own
MAX_NAMES = 20  # that a message lists


class Message(NamedTuple):
    """A message, its author and its day."""

    conversation: str  # its day or number; another one begins another conversation
    name: str
    text: str


def is_whatsapp(head: str) -> bool:
    """Return whether a text begins as WhatsApp's exports do."""
    lines = [line for line in head.splitlines() if line.strip()][:HEAD_LINES]
    return bool(lines and _stamp(lines[0])) and sum(map(bool, map(_stamp, lines))) > 1


def is_markdown_chat(head: str, me: str = "") -> bool:
    """Return whether a text is a chat with `**Name:**` ahead of messages.

    It begins with one, and names occur twice on average or are those of `me` and others.
    """
    lines = [line for line in head.splitlines() if line.strip() and not HEADING.match(line)]
    spoken = [match for line in lines[:HEAD_LINES] if (match := SPEAKER.match(line))]
    names = Counter(match[1].strip() for match in spoken)
    if not lines or not SPEAKER.match(lines[0]) or len(names) < 2:
        return False
    return me in names or len(spoken) >= max(FEW, 2 * len(names))


def whatsapp_messages(lines: Iterable[str]) -> Iterator[Message]:
    """Yield the messages of an export; a line without a date continues the previous message."""
    day, name, parts = "", "", list[str]()
    for line in lines:
        found = _stamp(line)
        if found is None:
            parts.append(line)
            continue
        yield from _written(day, name, parts)
        day, name, parts = found[0], "", []
        if (named := NAMED.fullmatch(found[1])) is not None:
            name, parts = " ".join(named[1].strip(MARKS).split()), [named[2] or ""]
    yield from _written(day, name, parts)


def markdown_messages(lines: Iterable[str]) -> Iterator[Message]:
    """Yield the messages of a Markdown chat; what stands ahead of the first is left out."""
    name, parts, number = "", list[str](), 0
    for line in lines:
        found = SPEAKER.match(line)
        if found is None:
            parts.append(line)
            continue
        kept = list(parts)
        while kept and (not kept[-1].strip() or HEADING.match(kept[-1])):
            kept.pop()
        if name and "\n".join(kept).strip():
            yield Message(str(number), name, "\n".join(kept).strip())
        number += any(part.startswith("#") for part in parts[len(kept) :])
        name, parts = found[1].strip(), [found[2]]
    if name and "\n".join(parts).strip():
        yield Message(str(number), name, "\n".join(parts).strip())


def conversations(messages: Iterable[Message], me: str, place: str) -> Iterator[list[Turn]]:
    """Yield the conversations in which `me` answers; `me` is the assistant.

    Raises DataError, with the names and how often each wrote, if that is none of them.
    """
    counts: Counter[str] = Counter()

    def counted() -> Iterator[Message]:
        for message in messages:
            counts[message.name] += 1
            yield message

    for _, group in groupby(counted(), lambda message: message.conversation):
        sides = [("assistant" if m.name == me else "user", m.text) for m in group]
        if any(role == "assistant" for role, _ in sides):
            yield [
                Turn(role, "\n".join(text for _, text in said))
                for role, said in groupby(sides, lambda side: side[0])
            ]
    if not counts[me]:
        names = [f"{one_line(n)} ({count:,})" for n, count in counts.most_common() if count]
        names[MAX_NAMES:] = [f"{len(names) - MAX_NAMES} more"] * (len(names) > MAX_NAMES)
        problem = f"nobody in it is called {me!r}." if me else "whose answers are learned?"
        raise DataError(
            f"{place} is a chat: {problem} Choose with --me NAME, one of "
            f"{', '.join(names) or 'no names'}; --as-text reads it as plain text"
        )


def _stamp(line: str) -> tuple[str, str] | None:
    """Return the date of a line and what follows its time, or None."""
    line = line.lstrip(MARKS)
    found = ANDROID.fullmatch(line) or IOS.fullmatch(line)
    return (found[1], found[2]) if found else None


def _written(day: str, name: str, parts: list[str]) -> Iterator[Message]:
    """Yield the message, unless it is a notice or has no text."""
    text = "\n".join(parts)
    if not name or text.startswith(tuple(MARKS)):  # a notice, or a medium on iOS
        return
    text = text.strip()
    if text and not WITHOUT_TEXT.fullmatch(text):
        yield Message(day, name, EDITED.sub("", text).strip(MARKS))
