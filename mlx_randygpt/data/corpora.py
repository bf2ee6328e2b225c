"""Corpora by name: their licences, sources, and conversion to text files.

The function that downloads a file is an argument.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from mlx_randygpt import files
from mlx_randygpt.data import DataError
from mlx_randygpt.data.download import TINY_SHAKESPEARE, Remote
from mlx_randygpt.data.reading import read_text

Fetch = Callable[[Remote, Path], object]
STORIES = (
    "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/"
    "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-GPT4-"
)
END_OF_STORY = "<|endoftext|>"
WIKIPEDIA = "CC BY-SA 3.0 and GFDL (Wikipedia)"
PUBLIC_DOMAIN = "public domain in the USA"
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
# The lines around the text of a book; their wording has changed over the years.
MARK = r"^\*{3} ?%s OF (?:THE|THIS) PROJECT GUTENBERG EBOOK"
START = re.compile(MARK % "START" + r"[^*]*\*{3}\s*", re.M | re.I)
END = re.compile(MARK % "END" + r"|^End of (?:the )?Project Gutenberg", re.M | re.I)
CREDIT = re.compile(r"\A(?:(?:Produced|Transcribed) by[^\n]*(?:\n[^\n]+)*\s*)+", re.I)


def gutenberg_url(number: int) -> str:
    """Return the URL of a book's plain text."""
    return f"https://www.gutenberg.org/cache/epub/{number}/pg{number}.txt"


def strip_gutenberg(text: str) -> str:
    """Remove the licence, the header and the credits of the transcribers."""
    if start := START.search(text):
        text = text[start.end() :]
    if end := END.search(text):
        text = text[: end.start()]
    return CREDIT.sub("", text.strip()).strip() + "\n"


def book_fingerprint(text: str) -> str:
    """Hash the words, so that editions that differ in case and punctuation only are equal."""
    words = re.findall(r"\w+", text.lower())
    return sha256(" ".join(words).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class CorpusInfo:
    """A corpus that can be downloaded."""

    name: str
    what: str
    licence: str
    size: int  # approximate bytes to download
    remote: Remote | None  # None: the books of SHELF
    target: str  # file or folder inside the folder of texts
    unpack: Callable[[Path, Path], None] | None = None  # from the download to the target


def unzip(packed: Path, target: Path) -> None:
    """Extract the only member of a zip file."""
    try:
        with (
            zipfile.ZipFile(packed) as archive,
            archive.open(archive.namelist()[0]) as member,
            files.replace(target) as out,
        ):
            shutil.copyfileobj(member, out, 1 << 20)
    except (zipfile.BadZipFile, IndexError) as error:
        raise DataError(f"{packed} is not a zip file: {error}") from error


def split_stories(raw: Path, target: Path) -> None:
    """Write the stories as rows of .jsonl, so that each is a document."""
    with files.replace(target) as out:
        for story in _stories(raw):
            out.write((json.dumps({"text": story}, ensure_ascii=False) + "\n").encode())


def _stories(raw: Path) -> Iterator[str]:
    lines: list[str] = []
    with open(raw, encoding="utf-8") as file:
        for line in file:
            if line.strip() == END_OF_STORY:
                yield "".join(lines).strip()
                lines = []
            else:
                lines.append(line)
    if story := "".join(lines).strip():
        yield story


def strip_book(raw: Path, target: Path) -> None:
    """Write the text of a book without Project Gutenberg's header and licence."""
    files.write(target, strip_gutenberg(read_text(raw)).encode())


LIBRARY = {
    corpus.name: corpus
    for corpus in (
        CorpusInfo(
            name="tinyshakespeare",
            what="scenes of Shakespeare, as used by char-rnn and nanoGPT",
            licence=PUBLIC_DOMAIN,
            size=TINY_SHAKESPEARE.size,
            remote=TINY_SHAKESPEARE,
            target="shakespeare.txt",
        ),
        CorpusInfo(
            name="shakespeare",
            what="the complete works of Shakespeare (Project Gutenberg 100)",
            licence=PUBLIC_DOMAIN,
            size=5_600_000,
            remote=Remote(gutenberg_url(100)),
            target="shakespeare-complete.txt",
            unpack=strip_book,
        ),
        CorpusInfo(
            name="enwik8",
            what="the first 100 MB of an English Wikipedia dump of 2006, XML and all",
            licence=WIKIPEDIA,
            size=36_445_475,
            remote=Remote(
                "https://mattmahoney.net/dc/enwik8.zip",
                36_445_475,
                "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
            ),
            target="enwik8.txt",
            unpack=unzip,
        ),
        CorpusInfo(
            name="text8",
            what="100 MB of Wikipedia in the letters a to z and spaces",
            licence=WIKIPEDIA,
            size=31_344_016,
            remote=Remote(
                "https://mattmahoney.net/dc/text8.zip",
                31_344_016,
                "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
            ),
            target="text8.txt",
            unpack=unzip,
        ),
        CorpusInfo(
            name="tinystories",
            what="2.7 million short stories in the words of a small child",
            licence="CDLA-Sharing-1.0",
            size=2_227_753_162,
            remote=Remote(
                f"{STORIES}train.txt",
                2_227_753_162,
                "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
            ),
            target="tinystories.jsonl",
            unpack=split_stories,
        ),
        CorpusInfo(
            name="tinystories-valid",
            what="the 27,600 stories set aside for validation, enough to try",
            licence="CDLA-Sharing-1.0",
            size=22_502_601,
            remote=Remote(
                f"{STORIES}valid.txt",
                22_502_601,
                "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d",
            ),
            target="tinystories-valid.jsonl",
            unpack=split_stories,
        ),
        CorpusInfo(
            name="gutenberg",
            what=f"{len(SHELF)} novels, each a document",
            licence=f"{PUBLIC_DOMAIN} (Project Gutenberg)",
            size=17_000_000,
            remote=None,
            target="gutenberg",
        ),
        CorpusInfo(
            name="gpt2-tokenizer",
            what="the tokenizer.json of GPT-2, for --tokenizer",
            licence="MIT",
            size=1_355_256,
            remote=Remote(
                "https://huggingface.co/openai-community/gpt2/resolve/main/tokenizer.json"
            ),
            target="gpt2-tokenizer.json",
        ),
    )
}


def find_corpus(name: str) -> CorpusInfo:
    """Return the corpus of this name; raise DataError if there is none."""
    if name not in LIBRARY:
        raise DataError(f"no corpus is called {name!r}; choose from {', '.join(LIBRARY)}")
    return LIBRARY[name]


def install(corpus: CorpusInfo, folder: Path, fetch: Fetch) -> Path:
    """Download a corpus and write its text file to `folder`; return the path."""
    assert corpus.remote is not None
    target = folder / corpus.target
    if corpus.unpack is None:
        fetch(corpus.remote, target)
        return target
    raw = folder / ".downloads" / corpus.remote.url.rpartition("/")[2]
    fetch(corpus.remote, raw)
    corpus.unpack(raw, target)
    raw.unlink()
    return target


def install_books(
    numbers: Sequence[int], folder: Path, fetch: Fetch, report: Callable[[str], None]
) -> list[Path]:
    """Download books and write each as `NUMBER-title.txt`; return the paths.

    A book with the same words as an earlier one is left out.
    """
    paths: dict[str, Path] = {}  # by fingerprint
    for number in dict.fromkeys(numbers):
        raw = folder / ".downloads" / f"pg{number}.txt"
        if not files.exists(raw):
            fetch(Remote(gutenberg_url(number)), raw)
        text = strip_gutenberg(read_text(raw))
        title = re.sub(r"\W+", "-", SHELF.get(number, "book").lower()).strip("-")
        target = folder / f"{number}-{title}.txt"
        fingerprint = book_fingerprint(text)
        if fingerprint in paths:
            report(f"Left out: book {number} is the same as {paths[fingerprint].name}")
            continue
        files.write(target, text.encode())
        paths[fingerprint] = target
    return list(paths.values())
