"""Every kind of text and tokenizer through the commands: trained, stopped, resumed, sampled."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlx_randygpt.checkpoint import NEWEST, Checkpoint, load_checkpoint, save_checkpoint
from mlx_randygpt.cli import group
from mlx_randygpt.cli.training import text as cli_text
from mlx_randygpt.config import install_command
from mlx_randygpt.data import corpora
from mlx_randygpt.data.corpus import Loader
from mlx_randygpt.data.download import Remote
from mlx_randygpt.tokenizers import tokenizer_from_json
from mlx_randygpt.tokenizers.subword import SubwordTokenizer

SMALL = "--plain --backend=numpy --n-layer=1 --n-head=2 --n-embd=8 --block-size=8 --batch-size=4"


@pytest.fixture(autouse=True)
def folder(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: one text in many forms, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXGPT_CACHE", str(tmp_path / "cache"))
    Path("a.txt").write_text(text)
    Path("a.txt.gz").write_bytes(gzip.compress(text.encode()))
    Path("wide.txt").write_text(text, encoding="utf-16")
    rows = [json.dumps({"story": line}) for line in text.splitlines()]
    Path("rows.jsonl").write_text("\n".join(rows))
    return tmp_path


@pytest.fixture
def tokenizer_file(text: str) -> str:
    """tokenizer.json, and train.bin and val.bin with its ids."""
    pytest.importorskip("tokenizers")
    tokenizer = SubwordTokenizer.train("bpe", [text], 300)
    Path("tokenizer.json").write_text(tokenizer.content)
    ids = tokenizer.encode(text).astype(np.uint16)
    ids[:1500].tofile("train.bin")
    ids[1500:].tofile("val.bin")
    return "tokenizer.json"


def call(words: str, *more: str) -> Result:
    return CliRunner().invoke(group, [*words.split(), *more])


def done(words: str, *more: str) -> str:
    result = call(words, *more)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(words: str, code: int = 1) -> str:
    result = call(words)
    assert result.exit_code == code, result.output
    return result.stderr.splitlines()[-1].removeprefix("Error: ")


def ended(folder: str) -> Checkpoint:
    saved = load_checkpoint(Path(folder, NEWEST))
    return replace(saved, progress=replace(saved.progress, seconds=0))


def same(one: Checkpoint, other: Checkpoint) -> None:
    np.testing.assert_equal(one.state.params, other.state.params)
    np.testing.assert_equal(one.state.moments, other.state.moments)


KINDS = [
    "--data=a.txt",
    "--data=a.txt.gz --vocab-size=20",
    "--data=wide.txt --encoding=utf-16",
    "--data=rows.jsonl --text-field=story --respect-documents",
    "--data=a.txt --tokenizer=bpe --vocab-size=300",
    "--data=a.txt --tokenizer=wordpiece --vocab-size=600",
    "--data=a.txt --tokenizer=tokenizer.json",
    "--data=train.bin --data=val.bin --tokenizer=tokenizer.json",
]


CACHED = [(KINDS[i], True) for i in (0, 3, 4, 7)]


@pytest.mark.parametrize(("kind", "cached"), [*((k, False) for k in KINDS), *CACHED])
def test_resume_is_bit_exact_for_each_kind_of_text(
    kind: str, cached: bool, tokenizer_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cached:
        monkeypatch.setattr(cli_text, "Loader", partial(Loader, small=0))
    done(f"train {SMALL} --iters=3 --schedule=constant --out=stopped {kind}")
    done(f"train {SMALL} --iters=6 --schedule=constant --out=whole {kind}")
    Path(tokenizer_file).unlink()  # the checkpoint holds it
    done("train --plain --backend=numpy --iters=6 --resume --out=stopped")
    whole, resumed = ended("whole"), ended("stopped")
    same(resumed, whole)
    assert (resumed.data, resumed.tokenizer) == (whole.data, whole.tokenizer)
    assert resumed.progress == whole.progress
    assert bool(list(Path("cache").glob("*.tokens"))) == cached
    newest = f"--checkpoint=stopped/{NEWEST}"
    done(f"sample {newest} --prompt= --max-tokens=5")
    score = json.loads(done(f"eval {newest} --json"))
    assert score["loss"] == pytest.approx(resumed.progress.val_loss, rel=1e-6)
    facts = json.loads(done(f"info --json stopped/{NEWEST}"))
    assert facts["bits_per_byte"] == pytest.approx(score["bits_per_byte"], rel=1e-6)


def test_the_config_of_a_run_makes_the_same_run_again(tokenizer_file: str) -> None:
    words = "--data=rows.jsonl --text-field=story --respect-documents --tokenizer=bpe"
    done(f"train {SMALL} --iters=3 --out=first {words} --vocab-size=290")
    done("train --config=first/config.toml --out=second --plain")
    first, second = ended("first"), ended("second")
    assert (first.data, first.tokenizer) == (second.data, second.tokenizer)
    same(first, second)
    done("train --config=first/config.toml --iters=4 --resume --out=second --plain")


def test_bits_per_byte_of_a_step_are_those_of_its_bytes(tokenizer_file: str) -> None:
    done(f"train {SMALL} --iters=2 --out=run --data=a.txt")
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "lr" in row]
    for row in steps:  # a character of this text is a byte
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / np.log(2))
    done(f"train {SMALL} --iters=1 --out=more --data=a.txt --tokenizer=bpe")
    more = json.loads(Path("more/metrics.jsonl").read_text().splitlines()[1])
    assert more["bits_per_byte"] < 0.8 * more["loss"] / np.log(2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data=a.txt --tokenizer=bpee", "--tokenizer bpee is not auto, char, bpe, wordpiece or"),
        ("--data=a.txt --tokenizer=bpe --vocab-size=9", "vocab_size=9 does not fit a bpe token"),
        ("--data=a.txt --tokenizer=char --vocab-size=600", "vocab_size=600 is not in 1..512, the"),
        ("--data=a.txt --tokenizer=a.txt", "--tokenizer a.txt: not a tokenizer.json ("),
        ("--data=a.txt --encoding=utf-99", "encoding='utf-99' is unknown; try utf-8"),
        ("--data=wide.txt", "wide.txt is UTF-16, not UTF-8; give --encoding utf-16"),
        ("--data=rows.jsonl", "has no text under 'text'; it has story; choose another with --t"),
        ("--data=train.bin", "train.bin holds token ids; give the tokenizer that made them"),
        ("--data=a.txt --respect-documents --block-size=5000", "the text has"),
        ("--data=rows.jsonl --text-field=story --respect-documents --block-size=100",
         "the longest document has"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(words: str, message: str, tokenizer_file: str) -> None:
    assert message in refused(f"train {SMALL} --iters=1 {words}")


@pytest.mark.parametrize(
    ("words", "library", "extra"),
    [
        (f"train {SMALL} --data=a.txt --tokenizer=bpe", "tokenizers", "tokenizers"),
        (f"train {SMALL} --data=a.txt.zst", "zstandard", "zst"),
        (f"train {SMALL} --data=a.parquet", "pyarrow", "parquet"),
    ],
)
def test_a_library_that_is_missing_is_named_with_its_extra(
    words: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a.txt.zst").write_bytes(b"(")
    Path("a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, library, None)
    assert refused(words).endswith(
        f"needs the library {library}, which is not installed; {install_command(extra)}"
    )


def test_a_checkpoint_of_subwords_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    done(f"train {SMALL} --iters=1 --data=a.txt --tokenizer=bpe")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert refused("sample --backend=numpy").startswith("a subword tokenizer needs the library")


def test_a_run_keeps_its_tokenizer() -> None:
    pytest.importorskip("tokenizers")
    done(f"train {SMALL} --iters=1 --data=a.txt --tokenizer=bpe --vocab-size=300")
    resume = "train --plain --backend=numpy --iters=2 --resume"
    assert "Checkpoint tokenizer bpe != tokenizer char" in refused(f"{resume} --tokenizer=char")
    assert "Checkpoint vocab_size 300 != vocab_size 400" in refused(f"{resume} --vocab-size=400")
    Path("a.txt").write_text("Ein anderer Text, mit Umläuten! " * 100)
    assert "The text has changed since" in done(resume)  # subwords spell any text


def test_fine_tuning_takes_the_tokenizer_along() -> None:
    pytest.importorskip("tokenizers")
    done(f"train {SMALL} --iters=1 --data=a.txt --tokenizer=bpe --out=old")
    Path("b.txt").write_text("Noch ein Text, mit Umläuten! " * 100)
    done(f"train --plain --backend=numpy --iters=1 --data=b.txt --init-from=old/{NEWEST} --out=new")
    assert ended("new").tokenizer == ended("old").tokenizer


def test_a_learning_rate_is_found_for_subwords() -> None:
    pytest.importorskip("tokenizers")
    words = SMALL.replace("--plain ", "")
    found = json.loads(done(f"find-lr {words} --iters=3 --data=a.txt --tokenizer=bpe --json"))
    assert found["suggestion"] > 0


def test_a_short_text_is_said_to_be_short() -> None:
    told = done(f"train {SMALL} --iters=1 --data=a.txt")
    assert "Short text: " in told
    assert "Short text: " not in done("train --plain --backend=numpy --resume --iters=2")


def test_a_short_text_decides_preset_and_steps_and_a_resumed_run_keeps_them() -> None:
    said = done("train --plain --backend=numpy --threads=1 --data=a.txt")
    line = next(line for line in said.splitlines() if line.startswith("Chosen for a text of"))
    train = load_checkpoint(Path("checkpoints", NEWEST)).train
    assert train.preset == "tiny"
    assert f"preset tiny and {train.iters} steps; --preset and --iters decide otherwise" in line
    assert train.iters < 50
    assert "Nothing to train" in done("train --plain --backend=numpy --resume")


def test_prepare_makes_what_train_then_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_text, "Loader", partial(Loader, small=0))
    made = json.loads(done("data prepare --data=rows.jsonl --text-field=story --json"))
    assert (made["documents"], made["files"]) == (120, 1)
    assert Path(made["cache"]).parent == Path("cache").resolve()
    before = {path: path.stat().st_mtime_ns for path in Path("cache").iterdir()}
    done(f"train {SMALL} --iters=1 --data=rows.jsonl --text-field=story")
    assert {path: path.stat().st_mtime_ns for path in Path("cache").iterdir()} == before


@pytest.fixture
def chinese() -> str:
    """Write zh.txt, a text with more different characters than a character tokenizer holds."""
    text = "".join(chr(0x4E00 + i * i % 797) + "。" * (i % 9 == 0) for i in range(4000))
    text += "".join(map(chr, range(0x5000, 0x5000 + 300)))
    Path("zh.txt").write_text(text)
    return text


@pytest.mark.parametrize("cached", [False, True])
def test_a_text_of_many_characters_is_read_without_loss(
    chinese: str, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    if cached:
        monkeypatch.setattr(cli_text, "Loader", partial(Loader, small=0))
    prepared = call("data prepare --data=zh.txt --json")
    assert json.loads(prepared.stdout)["tokenizer"] == "bpe"
    before = {path: path.stat().st_mtime_ns for path in Path("cache").glob("*")}
    assert bool(before) == cached
    trained = done(f"train {SMALL} --iters=2 --schedule=constant --data=zh.txt --out=run")
    tried = call(f"find-lr {SMALL.removeprefix('--plain ')} --iters=3 --data=zh.txt --json")
    [line] = [line for line in prepared.stderr.splitlines() if "Tokenizer: " in line]
    assert line.startswith("Tokenizer: byte-level BPE, ")
    assert line in trained
    assert line in tried.stderr
    assert {path: path.stat().st_mtime_ns for path in Path("cache").glob("*")} == before
    assert "dropped" not in prepared.output + trained + tried.output
    saved = ended("run")
    assert tokenizer_from_json(saved.tokenizer).unknown(chinese) == {}
    done("train --config=run/config.toml --out=again --plain")
    same(ended("again"), saved)


def test_a_resumed_run_keeps_the_tokenizer_that_was_chosen(chinese: str) -> None:
    pytest.importorskip("tokenizers")
    done(f"train {SMALL} --iters=1 --data=zh.txt")
    chosen = ended("checkpoints").tokenizer
    Path("zh.txt").write_text(Path("a.txt").read_text())
    told = done("train --plain --backend=numpy --iters=2 --resume --tokenizer=auto")
    assert "Tokenizer: " not in told
    assert ended("checkpoints").tokenizer == chosen


@pytest.mark.parametrize("words", ["--tokenizer=char", "--vocab-size=300"])
def test_what_characters_lose_is_said_and_what_avoids_it(chinese: str, words: str) -> None:
    told = done(f"train {SMALL} --iters=1 --data=zh.txt {words}")
    assert "Tokenizer: " not in told
    [line] = [line for line in told.splitlines() if "were dropped" in line]
    assert line.endswith(" % of the text; a new run with --tokenizer bpe loses none")


def test_a_short_text_needs_no_cache() -> None:
    assert "none: a short text is read into memory" in done("data prepare --data=a.txt")
    assert not Path("cache").exists()


def test_the_library_is_listed() -> None:
    assert "enwik8" in done("data list")
    listed = json.loads(done("data list --json"))["corpora"]
    assert {"name", "what", "licence", "size"} == set(listed[0])
    assert refused("data fetch bible").startswith("no corpus is called 'bible'; choose from")
    assert call("data fetch enwik8 --book=1").exit_code == 2


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Says BODY to everyone."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"One.\n<|endoftext|>\nTwo.\n")

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}/stories.txt"
        running.shutdown()
        thread.join()


def test_licence_and_size_are_told_before_a_corpus_is_fetched(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = replace(corpora.LIBRARY["tinystories-valid"], remote=Remote(server))
    monkeypatch.setitem(corpora.LIBRARY, "tinystories-valid", named)
    result = call("data fetch tinystories-valid --out=texts")
    assert result.exit_code == 0, result.output
    told = result.stderr.splitlines()
    assert told[1] == "Licence: CDLA-Sharing-1.0"
    assert told[2] == f"From {server}: about 22.5 MB"
    assert "stories.txt: no checksum is known; its SHA-256 " in told[3]
    assert "Train on it: mlxgpt train --data texts/tinystories-valid.jsonl" in result.stdout
    rows = Path("texts/tinystories-valid.jsonl").read_text().splitlines()
    assert [json.loads(row)["text"] for row in rows] == ["One.", "Two."]


def test_without_a_network_it_is_one_line(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    away = Remote("http://127.0.0.1:1/a.zip")
    monkeypatch.setitem(corpora.LIBRARY, "enwik8", replace(corpora.LIBRARY["enwik8"], remote=away))
    said = refused("data fetch enwik8")
    assert said.startswith("could not download http://127.0.0.1:1/a.zip to data/.downloads/a.zip: ")
    assert said.endswith("no connection (Connection refused)")


# The split of a text with copies

SHORT = "--preset mini --backend numpy --plain --iters"


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """The working directory, in which d has three copies of a text."""
    Path("d").mkdir()
    for name in "abc":
        Path(f"d/{name}.txt").write_text("".join(chr(97 + i * i % 23) for i in range(500)))
    return tmp_path


def test_copies_are_kept_on_one_side_and_a_line_says_so(copies: Path) -> None:
    names = [f"the last 10.2 % of {name}.txt" for name in "abc"]
    line = f"{names[0]}, {names[1]} and {names[2]}"
    for words in (f"train --data d {SHORT} 2", "train --resume --iters 3 --plain"):
        result = call(words)
        assert result.exit_code == 0, result.output
        assert f"Validation text: {line}." in result.stdout.splitlines()
        assert "3 documents occur more than once, in the last tenth" in result.stdout
    assert line in call("info").stdout
    assert json.loads(call("eval --backend numpy --json").stdout)["tokens"] == 152


def test_a_run_of_an_older_version_keeps_its_split(copies: Path) -> None:
    call(f"train --data d {SHORT} 2")
    path = copies / "checkpoints" / NEWEST
    saved = load_checkpoint(path)
    rules = ("keeps_copies", "validation")
    data = {name: value for name, value in saved.data.items() if name not in rules}
    save_checkpoint(path, replace(saved, data=data))
    result = call("train --resume --iters 3 --plain")
    assert "Validation text: the last 30.1 % of c.txt." in result.stdout.splitlines()
    assert "occur more than once" not in result.stdout
    assert load_checkpoint(path).data["keeps_copies"] is False
