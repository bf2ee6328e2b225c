"""Exported chats: WhatsApp's date formats, notices and media, and Markdown with names."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_randygpt.data import DataError
from mlx_randygpt.data.reading import Piece, Reading, pieces

MARK = "\u200e"  # left to right, ahead of what WhatsApp writes itself
STAMPS = [
    "12/31/20, 9:05 PM - ",
    "12/31/20, 9:05\u202fPM - ",
    "31.12.20, 21:05 - ",
    "31/12/2020, 21:05 - ",
    "31/12/2020 21:05 - ",
    "2020-12-31, 21:05 - ",
    "31/12/20, 9:05 p. m. - ",
    "[31.12.20, 21:05:59] ",
    "[12/31/20, 9:05:59 PM] ",
    "[31/12/2020, 21:05:59] ",
    f"{MARK}[2020-12-31, 9:05:59\u202fPM] ",
]


def read(tmp_path: Path, text: str, name: str = "chat.txt", **options: str) -> list[Piece]:
    file = tmp_path / name
    file.write_text(text)
    return list(pieces(file, Reading(**options)))  # type: ignore[arg-type]


def turns(found: list[Piece]) -> list[tuple[str, str]]:
    return [(piece.role, piece.text) for piece in found]


@pytest.mark.parametrize("stamp", STAMPS)
def test_every_date_format_is_read(stamp: str, tmp_path: Path) -> None:
    text = f"{stamp}Ann: How late?\n{stamp}Bob B.: At nine: sharp.\n"
    assert read(tmp_path, text, me="Bob B.") == [
        Piece("How late?", True, False, "user"),
        Piece("At nine: sharp.", False, True, "assistant"),
    ]


CHAT = f"""[31.12.20, 20:00:00] Club: {MARK}Messages and calls are end-to-end encrypted.
[31.12.20, 21:05:59] Ann: Hello
are you there?

Here is more.
[31.12.20, 21:06:00] Ann: ?
[31.12.20, 21:07:00] Bob: Yes {MARK}<This message was edited>
{MARK}[31.12.20, 21:07:30] Bob: {MARK}image omitted
[31.12.20, 21:08:00] ~\u202fCleo: And me
[01.01.21, 00:01:00] Ann: Happy new year!
[02.01.21, 10:00:00] Bob: I slept.
"""


def test_a_day_is_a_conversation_and_messages_of_one_side_are_one_turn(tmp_path: Path) -> None:
    found = read(tmp_path, CHAT, me="Bob")
    assert turns(found) == [
        ("user", "Hello\nare you there?\n\nHere is more.\n?"),
        ("assistant", "Yes"),
        ("user", "And me"),
        ("assistant", "I slept."),
    ]
    assert [piece.begins for piece in found] == [True, False, False, True]


def test_what_nobody_wrote_is_left_out(tmp_path: Path) -> None:
    lines = [
        "Messages and calls are end-to-end encrypted. No one outside of this chat can read them.",
        "Ann created this group",
        "Ann: <Media omitted>",
        "Ann: <Medien ausgeschlossen>",
        "Ann: IMG-20201231-WA0001.jpg (file attached)",
        "Ann: This message was deleted",
        "Bob: Diese Nachricht wurde gelöscht.",
        "Bob: null",
        "Ann: What is <3?",
        "Bob: A heart.",
    ]
    text = "".join(f"31.12.20, 21:05 - {line}\n" for line in lines)
    assert turns(read(tmp_path, text, me="Bob")) == [
        ("user", "What is <3?"),
        ("assistant", "A heart."),
    ]


def test_a_chat_without_me_names_everybody_with_counts(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, CHAT)
    assert str(caught.value) == (
        f"{tmp_path / 'chat.txt'} is a chat: whose answers are learned? Choose with --me NAME, "
        "one of Ann (3), Bob (2), ~ Cleo (1); --as-text reads it as plain text"
    )
    with pytest.raises(DataError, match=r"nobody in it is called 'bob'\. Choose with --me NAME"):
        read(tmp_path, CHAT, me="bob")


def test_a_text_with_dates_is_a_text(tmp_path: Path) -> None:
    log = "2020-12-31 21:05:59 - INFO: begun\n2020-12-31 21:06:00 - ERROR: ended\n"
    once = "31.12.20, 21:05 - Ann: Hello\nis how such a line looks.\n"
    for text in (log, once, "A diary.\n" + CHAT):
        assert read(tmp_path, text) == [Piece(text, True, True)]
    assert read(tmp_path, CHAT, "chat.py") == [Piece(CHAT, True, True)]


MARKDOWN = """# Sums

**Ann:** What is 2 + 3?

**Bob:** Five.

- two
- three

**Ann**: Thanks!
**Bob:** You are welcome.

## Later
---

**Ann:** And 4?
**Bob:**
Four.
"""


def test_markdown_with_names_is_a_chat(tmp_path: Path) -> None:
    found = read(tmp_path, MARKDOWN, "chat.md", me="Bob")
    assert turns(found) == [
        ("user", "What is 2 + 3?"),
        ("assistant", "Five.\n\n- two\n- three"),
        ("user", "Thanks!"),
        ("assistant", "You are welcome."),
        ("user", "And 4?"),
        ("assistant", "Four."),
    ]
    assert [piece.begins for piece in found] == [True, False, False, False, True, False]
    with pytest.raises(DataError, match=r"chat.md is a chat: .* Ann \(3\), Bob \(3\); --as-text"):
        read(tmp_path, MARKDOWN, "chat.md")


def test_a_short_markdown_chat_is_recognised_by_the_name_of_me(tmp_path: Path) -> None:
    short = "**Ann:** Hi?\n\n**Bob:** Hello.\n"
    assert turns(read(tmp_path, short, "a.md", me="Bob")) == [
        ("user", "Hi?"),
        ("assistant", "Hello."),
    ]
    assert read(tmp_path, short, "a.md") == [Piece(short, True, True)]


@pytest.mark.parametrize(
    "text",
    [
        "**Note:** this is bold.\n\n**Warning:** so is this.\n\n**Hint:** and this.\n**Name:** x\n",
        "Ann said:\n\n**Ann:** a\n**Bob:** b\n**Ann:** c\n**Bob:** d\n",
        "**Ann:** a\n**Ann:** b\n**Ann:** c\n**Ann:** d\n",
    ],
)
def test_bold_words_make_no_chat(text: str, tmp_path: Path) -> None:
    assert read(tmp_path, text, "notes.md") == [Piece(text, True, True)]
