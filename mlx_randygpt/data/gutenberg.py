"""Books of Project Gutenberg: the text without what stands around it, and each book once."""

from __future__ import annotations

import re
from hashlib import sha256

SHELF = {  # number -> title
    11: "Alice's Adventures in Wonderland",
    35: "The Time Machine",
    36: "The War of the Worlds",
    74: "The Adventures of Tom Sawyer",
    76: "Adventures of Huckleberry Finn",
    84: "Frankenstein",
    98: "A Tale of Two Cities",
    120: "Treasure Island",
    158: "Emma",
    161: "Sense and Sensibility",
    174: "The Picture of Dorian Gray",
    345: "Dracula",
    768: "Wuthering Heights",
    1260: "Jane Eyre",
    1342: "Pride and Prejudice",
    1400: "Great Expectations",
    1661: "The Adventures of Sherlock Holmes",
    2554: "Crime and Punishment",
    2600: "War and Peace",
    2701: "Moby Dick",
}
# The lines between which the book stands; the wording has changed over the years.
MARK = r"^\*{3} ?%s OF (?:THE|THIS) PROJECT GUTENBERG EBOOK"
START = re.compile(MARK % "START" + r"[^*]*\*{3}\s*", re.M | re.I)
END = re.compile(MARK % "END" + r"|^End of (?:the )?Project Gutenberg", re.M | re.I)
CREDIT = re.compile(r"\A(?:(?:Produced|Transcribed) by[^\n]*(?:\n[^\n]+)*\s*)+", re.I)


def url(number: int) -> str:
    """Where the plain text of a book is."""
    return f"https://www.gutenberg.org/cache/epub/{number}/pg{number}.txt"


def strip(text: str) -> str:
    """The book itself: without licence, header and the line that says who typed it."""
    if start := START.search(text):
        text = text[start.end() :]
    if end := END.search(text):
        text = text[: end.start()]
    return CREDIT.sub("", text.strip()).strip() + "\n"


def fingerprint(text: str) -> str:
    """Equal for two editions that differ in case, line breaks and punctuation alone."""
    words = re.findall(r"\w+", text.lower())
    return sha256(" ".join(words).encode()).hexdigest()
