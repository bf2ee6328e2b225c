"""Any path in, one strict reading of it out, and one clear line for everything else."""

import os
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from mlx_randygpt.data import DataError
from mlx_randygpt.data.corpus import check_length, default_prompt, encode_corpus, load_corpus
from mlx_randygpt.data.files import default_source, find_files, sample_corpus_path
from mlx_randygpt.data.reading import read_text
from mlx_randygpt.tokenizers.chars import CharTokenizer

NO_NETWORK = "could not download: no connection"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, content: str | bytes = "text") -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def refuse(target: Path) -> None:
    raise DataError(NO_NETWORK)


def test_a_directory_gives_its_visible_texts_sorted(folder: Path) -> None:
    for name in ("d/b.txt", "d/a.md", "d/sub/C.TXT", "d/x.jpg", "d/.h.txt", "d/.git/y.txt"):
        write(name)
    assert find_files(["d"]) == [Path("d/a.md"), Path("d/b.txt"), Path("d/sub/C.TXT")]


def test_a_directory_gives_source_and_rows_too_packed_or_not(folder: Path) -> None:
    for name in ("d/a.py", "d/b.jsonl.zst", "d/c.txt.gz", "d/e.bin", "d/f.zip"):
        write(name)
    assert find_files(["d"]) == [Path("d/a.py"), Path("d/b.jsonl.zst"), Path("d/c.txt.gz")]


def test_a_directory_with_a_train_bin_gives_its_token_files_alone(folder: Path) -> None:
    for name in ("d/train.bin", "d/val.bin", "d/prepare.py", "d/input.txt"):
        write(name)
    assert find_files(["d"]) == [Path("d/train.bin"), Path("d/val.bin")]


@pytest.mark.parametrize(
    "name", ["training_args", "restraint", "pytorch_model", "retrain", "xtrain"]
)
def test_other_bin_files_do_not_hide_the_texts(folder: Path, name: str) -> None:
    write(f"d/{name}.bin")
    write("d/a.txt")
    assert find_files(["d"]) == [Path("d/a.txt")]


@pytest.mark.parametrize("name", ["train", "X_train_000001", "tiny_shakespeare_train", "a-train-2"])
def test_texts_beside_token_files_are_left_out_with_a_line(folder: Path, name: str) -> None:
    for file in (f"d/{name}.bin", "d/training_args.bin", "d/a.txt", "d/b.txt"):
        write(file)
    lines = list[str]()
    assert find_files(["d"], lines.append) == [Path(f"d/{name}.bin")]
    assert lines == [
        f"Left out: 2 texts of d, which holds token files ({name}.bin); "
        "name texts to train on them."
    ]


def test_a_device_is_not_a_text(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"^/dev/zero is a device; give a file, a folder or a pipe$"
    ):
        find_files(["/dev/zero"])


def test_a_pipe_without_a_writer_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_randygpt.files.WRITER_SECONDS", 0)
    os.mkfifo("pipe")
    with pytest.raises(DataError, match=r"^pipe cannot be read: it is a pipe that no process"):
        find_files(["pipe"])


@pytest.mark.parametrize("text", ["one line, no end", " x", "龍龍龍", "ROMEO:", "a\nb"])
@pytest.mark.parametrize("size", [0, 1])
def test_the_default_prompt_is_in_the_vocabulary_of_its_text(text: str, size: int) -> None:
    tokenizer = CharTokenizer.train(text, size or 512)
    prompt = default_prompt(encode_corpus({"a": text}, tokenizer), tokenizer)
    assert prompt
    assert size or (not tokenizer.unknown(prompt) and prompt in text)


def test_a_file_named_twice_is_read_once_and_the_order_stays(folder: Path) -> None:
    for name in ("z.txt", "d/a.txt", "d/b.log"):
        write(name)
    Path("link.txt").symlink_to("z.txt")
    files = find_files(["z.txt", "d/*", str(folder / "d/a.txt"), "link.txt", "d"])
    assert files == [Path("z.txt"), Path("d/a.txt"), Path("d/b.log")]


def test_an_existing_file_is_no_glob(folder: Path) -> None:
    write("a.txt")
    assert find_files([str(write("[a].txt"))]) == [Path("[a].txt")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("corpse.txt", r"no such file: 'corpse.txt' \(looked in .+\); is it corpus.txt\?$"),
        ("no/where.txt", r"no such file: 'no/where.txt' \(looked in .+\)$"),
        ("/no/where.txt", "no such file: '/no/where.txt'$"),
        ("", r"no such file: ''"),
        ("*.log", r"no file matches '\*.log' \(looked in .+\)$"),
        ("d", "^d holds no text: no .txt, .md, .jsonl or .parquet file in it or below, and no "),
    ],
)
def test_a_path_that_leads_nowhere_is_said(folder: Path, name: str, message: str) -> None:
    write("corpus.txt")
    write("d/photo.jpg")
    with pytest.raises(DataError, match=message):
        find_files([name])


def test_line_ends_and_the_byte_order_mark_are_normalised(folder: Path) -> None:
    file = write("a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(file) == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "^a.txt is empty"),
        (b"\xef\xbb\xbf", "^a.txt is empty"),
        (b"ok\r\nok\n\xff", r"byte 0xff at offset 7 \(line 3\); .*give .*--encoding"),
        (b"\xe4", r"not UTF-8 text: byte 0xe4 at offset 0 \(line 1\)"),
        (b"a\nb\0", r"binary, not text: a NUL byte at offset 3 \(line 2\)$"),
        ("hi".encode("utf-16"), "UTF-16, not UTF-8; give --encoding utf-16$"),
    ],
)
def test_what_is_not_utf8_text_is_refused_with_the_place(
    folder: Path, raw: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_text(write("a.txt", raw))
    assert "\n" not in str(caught.value)


def test_a_file_without_permission_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)  # chmod does not stop root
    with pytest.raises(DataError, match=r"^a.txt cannot be read: Permission denied$"):
        read_text(Path("a.txt"))


def test_a_folder_without_permission_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    Path("d").mkdir()
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=r"^d cannot be read: Permission denied$"):
        find_files(["d"])


def test_train_txt_comes_first_then_the_data_folder(folder: Path) -> None:
    for name in ("data/b.txt", "data/a.txt", "data/.c.txt", "data/README.md"):
        write(name)
    files, note = default_source(Path(), refuse)
    assert files == [Path("data/a.txt"), Path("data/b.txt")]
    assert note == "Text: data/a.txt, data/b.txt"
    write("train.txt")
    assert default_source(Path(), refuse) == ([Path("train.txt")], "Text: train.txt")


def test_then_tiny_shakespeare_is_downloaded(folder: Path) -> None:
    def download(target: Path) -> None:
        target.write_text("ROMEO:")

    files, note = default_source(Path(), download)
    assert files == [Path("data/shakespeare.txt")]
    assert note == "Text: tiny Shakespeare, downloaded to data/shakespeare.txt"
    assert read_text(files[0]) == "ROMEO:"


def test_without_network_the_sample_corpus_is_taken_and_said(folder: Path) -> None:
    files, note = default_source(Path(), refuse)
    assert files == [sample_corpus_path()]
    assert note == f"Text: the sample corpus inside the package ({NO_NETWORK})"


def test_a_data_folder_that_cannot_be_made_is_said(folder: Path) -> None:
    write("data")
    files, note = default_source(Path(), refuse)
    assert files == [sample_corpus_path()]
    assert note.endswith("(data cannot be created: File exists)")


def test_documents_are_framed_and_the_last_tenth_is_validation() -> None:
    tokenizer = CharTokenizer.train("ab")
    corpus = encode_corpus({"one": "abab", "two": "bbbb"}, tokenizer)
    assert corpus.tokens.tolist() == [2, 0, 1, 0, 1, 3, 2, 1, 1, 1, 1, 3]
    assert (corpus.train.tolist(), corpus.val.tolist()) == ([2, 0, 1, 0, 1, 3, 2, 1, 1, 1], [1, 3])
    assert corpus.train is corpus.train  # a backend keeps it on its device
    assert (corpus.names, corpus.characters) == (("one", "two"), 8)
    assert corpus.starts.tolist() == [0, 6]


def test_the_digest_is_that_of_the_text_and_sees_where_documents_end() -> None:
    tokenizer = CharTokenizer.train("ab")
    digests = [encode_corpus(texts, tokenizer).sha256 for texts in ({"x": "ab"}, {"y": "ab"})]
    assert digests == [sha256(b"ab").hexdigest()] * 2
    assert encode_corpus({"x": "a", "y": "b"}, tokenizer).sha256 not in digests


@pytest.mark.parametrize("block_size", [1, 7, 64, 256])
def test_the_length_asked_for_is_the_smallest_that_passes(block_size: int) -> None:
    tokenizer = CharTokenizer.train("a")
    need = 10 * block_size + 1  # then 9 blocks go to train and one and its next token to val
    check_length(encode_corpus({"a": "a" * (need - 2)}, tokenizer), block_size)
    with pytest.raises(DataError, match=f"needs at least {need} tokens"):
        check_length(encode_corpus({"a": "a" * (need - 3)}, tokenizer), block_size)


def test_a_short_text_is_told_what_would_fit() -> None:
    corpus = encode_corpus({"a": "a" * 40}, CharTokenizer.train("a"))
    with pytest.raises(DataError) as caught:
        check_length(corpus, 64)
    assert str(caught.value) == (
        "the text has 40 characters (42 tokens); a context of 64 needs at least 641 tokens "
        "(train and validation each one block and one token); "
        "give more text or a --block-size of at most 4"
    )
    check_length(corpus, 4)


def test_an_absurd_context_is_refused_at_once() -> None:
    corpus = encode_corpus({"a": "a"}, CharTokenizer.train("a"))
    with pytest.raises(DataError, match=r"at least 10000000001 tokens .*; give more text$"):
        check_length(corpus, 10**9)


def test_one_call_loads_a_path_or_a_text(tmp_path: Path, text: str) -> None:
    (file := tmp_path / "a.txt").write_text(text)
    tokenizer, corpus = load_corpus(file)
    same, from_text = load_corpus(text=text, tokenizer=tokenizer)
    assert tokenizer == same == CharTokenizer.train(text)
    np.testing.assert_equal(corpus.tokens, from_text.tokens)
    with pytest.raises(DataError, match="either paths or text="):
        load_corpus()
