"""A conversation: what the model is given, the commands, saving and having it again."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_randygpt.checkpoint import Checkpoint, save_checkpoint
from mlx_randygpt.cli import group
from mlx_randygpt.dialogue import Turn, render_prompt
from mlx_randygpt.progress import Progress
from mlx_randygpt.sampling.chat import COMMANDS, ChatError, Conversation, completions, load_turns
from mlx_randygpt.sampling.chat import Turn as Saved
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import generate

MakeRun = Callable[..., tuple]  # type: ignore[type-arg]


@pytest.fixture
def talk(make_run: MakeRun) -> Conversation:
    run, backend = make_run("modern")
    return Conversation(backend, run.model, run.tokenizer, SampleConfig(max_tokens=12, seed=5))


def say(talk: Conversation, prompt: str) -> str:
    return "".join(talk.answer(prompt, lambda: False))


def written(talk: Conversation, prompt: str, seed: int) -> str:
    """What `mlxgpt sample` writes after the prompt."""
    config = SampleConfig(max_tokens=12, seed=seed)
    ids = talk.tokenizer.encode(prompt).tolist()
    *_, [sample] = generate(talk.backend, talk.model, talk.tokenizer, ids, config)
    return sample.text


def test_the_first_answer_is_that_of_sample_and_the_next_reads_it(talk: Conversation) -> None:
    first = say(talk, "The old")
    assert first == written(talk, "The old", 5)
    assert say(talk, "The king") == written(talk, f"The old{first}\nThe king", 6)


@pytest.mark.parametrize("line", ["The old\r\nship", "The old\rship", "\ufeffThe old\nship"])
def test_text_from_outside_has_one_kind_of_line_end(talk: Conversation, line: str) -> None:
    assert say(talk, line) == written(talk, "The old\nship", 5)
    assert SampleConfig(stop=("\r\n", "a\rb")).stop == ("\n", "a\nb")


def test_an_answer_that_was_stopped_counts_as_said(talk: Conversation) -> None:
    parts: list[str] = []
    for part in talk.answer("The", lambda: len(parts) >= 3):
        parts.append(part)  # noqa: PERF402
    text = "".join(parts)
    assert text == written(talk, "The", 5)[:3]
    assert talk.history == "The" + text


def test_commands_set_what_the_next_answer_is_made_with(talk: Conversation) -> None:
    assert talk.command("/temp 0") == "temperature = 0.0"
    assert talk.command("/len 3") == "max_tokens = 3"
    assert len(say(talk, "The")) == 3
    assert talk.config.temperature == 0


def test_retry_answers_the_same_prompt_with_the_next_seed(talk: Conversation) -> None:
    first = say(talk, "The old")
    say(talk, "A king")
    text = "".join(talk.retry(lambda: False))
    assert text == written(talk, f"The old{first}\nA king", 7)
    assert [(turn.prompt, turn.config.seed) for turn in talk.turns] == [
        ("The old", 5),
        ("A king", 7),
    ]


def test_undo_forgets_one_prompt_and_its_answer(talk: Conversation) -> None:
    first = say(talk, "The old")
    say(talk, "A king")
    assert talk.command("/undo") == "forgot 'A king' and its answer"
    assert talk.history == "The old" + first
    talk.command("/undo")
    assert say(talk, "Under") == written(talk, "Under", 7)  # as the first prompt


@pytest.mark.parametrize("line", ["", "/reset"])
def test_without_an_answer_there_is_nothing_to_retry_or_undo(line: str, talk: Conversation) -> None:
    if line:
        say(talk, "The old")
        talk.command(line)
    with pytest.raises(ChatError, match="no answer yet"):
        talk.retry(lambda: False)
    with pytest.raises(ChatError, match="no answer yet"):
        talk.command("/undo")
    assert len(talk.turns) == bool(line)  # what was forgotten can still be saved


def test_reset_forgets_and_seed_begins_anew(talk: Conversation) -> None:
    first = say(talk, "The")
    assert talk.command("/reset") == "conversation forgotten"
    talk.command("/seed 5")
    assert say(talk, "The") == first


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/tempo 1", "'/tempo' is not a command; use one of /temp, "), ("/temp", "takes a number"),
        ("/topk 1.5", "takes a whole number"), ("/topp 2", r"top_p=2.0 is not in \[0, 1\]"),
        ("/save", "needs a file name"), ("/save /no/where", "could not write /no/where"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_and_changes_nothing(
    line: str, message: str, talk: Conversation
) -> None:
    before = talk.config
    with pytest.raises(ChatError, match=message):
        talk.command(line)
    assert talk.config == before


def test_help_names_every_command(talk: Conversation) -> None:
    told = talk.command("/help")
    assert all(re.search(rf"^{name}\b", told, re.M) for name in COMMANDS)


def test_commands_are_completed() -> None:
    assert completions("/to") == ["/topp", "/topk"]
    assert completions("to") == []


def test_a_saved_conversation_is_had_again_word_for_word(
    talk: Conversation, make_run: MakeRun, tmp_path: Path
) -> None:
    say(talk, "The old")
    talk.command("/temp 1.3")
    say(talk, "A king")
    talk.command("/reset")
    say(talk, "Under")
    talk.command(f"/save {tmp_path / 'talk.json'}")
    run, backend = make_run("modern")
    again = Conversation(backend, run.model, run.tokenizer, SampleConfig())
    for turn in load_turns(tmp_path / "talk.json"):
        "".join(again.replay(turn, lambda: False))
    assert again.turns == talk.turns
    assert again.history == talk.history


class TestDialogue:
    """A model with the tokens of dialogue."""

    SHIP, KING = Turn("user", "The old ship"), Turn("user", "king")

    @pytest.fixture
    def notices(self) -> list[str]:
        return []

    @pytest.fixture
    def talk(self, dialogue_run: MakeRun, notices: list[str]) -> Conversation:
        run, backend = dialogue_run()
        config = SampleConfig(max_tokens=12, seed=5)
        return Conversation(backend, run.model, run.tokenizer, config, notices.append)

    def answer_to(self, talk: Conversation, turns: list[Turn], seed: int) -> str:
        config = SampleConfig(max_tokens=12, seed=seed)
        ids = render_prompt(turns, talk.tokenizer).tolist()
        *_, [sample] = generate(talk.backend, talk.model, talk.tokenizer, ids, config)
        return sample.text

    def test_it_reads_the_turns_as_the_renderer_writes_them(
        self, talk: Conversation, notices: list[str]
    ) -> None:
        first = say(talk, "The old ship")
        assert first == self.answer_to(talk, [self.SHIP], 5)
        turns = [self.SHIP, Turn("assistant", first), self.KING]
        assert say(talk, "king") == self.answer_to(talk, turns, 6)
        assert "".join(talk.retry(lambda: False)) == self.answer_to(talk, turns, 7)
        assert notices == []

    def test_an_answer_ends_with_its_turn(self, talk: Conversation) -> None:
        talk.command("/len 500")
        texts = [say(talk, "ship"), *("".join(talk.retry(lambda: False)) for _ in range(7))]
        assert min(map(len, texts)) < 100
        assert not any("<|" in text for text in texts)

    def test_a_system_message_comes_first(self, talk: Conversation) -> None:
        assert talk.command("/system  Sing. ") == "system message set"
        system = Turn("system", "Sing.")
        assert say(talk, "king") == self.answer_to(talk, [system, self.KING], 5)
        assert "/system Sing.\n" in talk.command("/show")
        talk.command("/reset")
        assert say(talk, "king") == self.answer_to(talk, [system, self.KING], 6)
        assert talk.command("/system") == "no system message"
        talk.command("/undo")
        assert say(talk, "king") == self.answer_to(talk, [self.KING], 7)

    def test_what_does_not_fit_is_left_out_in_whole_turns(
        self, talk: Conversation, notices: list[str]
    ) -> None:
        talk.command("/system Sing.")
        say(talk, "The old red ship sleeps.")
        assert notices == []
        asked = Turn("user", "The small grey bird.")
        answer = say(talk, asked.text)
        assert notices == [
            "the 2 oldest turns were left out: with the answer, the context of 64 tokens is full"
        ]
        assert answer == self.answer_to(talk, [Turn("system", "Sing."), asked], 6)

    def test_a_prompt_beyond_the_context_is_reported(
        self, talk: Conversation, notices: list[str]
    ) -> None:
        say(talk, "a" * 70)
        assert notices == ["this prompt has 73 tokens, the context 64: its end is used"]

    def test_a_saved_conversation_has_its_system_messages(
        self, talk: Conversation, tmp_path: Path, dialogue_run: MakeRun
    ) -> None:
        talk.command("/system Sing.")
        say(talk, "king")
        talk.command("/system")
        say(talk, "queen")
        talk.command(f"/save {tmp_path / 'talk.json'}")
        run, backend = dialogue_run()
        again = Conversation(backend, run.model, run.tokenizer, SampleConfig())
        for turn in load_turns(tmp_path / "talk.json"):
            "".join(again.replay(turn, lambda: False))
        assert again.turns == talk.turns

    def test_a_script_gets_the_answers_alone(self, dialogue_run: MakeRun, tmp_path: Path) -> None:
        run, backend = dialogue_run()
        path, saved = tmp_path / "checkpoint.safetensors", tmp_path / "talk.json"
        facts = (run.tokenizer.to_json(), run.data, "numpy", backend.state())
        save_checkpoint(path, Checkpoint(run.model, run.train, Progress(), *facts))
        words = ["--checkpoint", str(path), "--backend", "numpy", "--max-tokens", "9"]
        typed = f"/system Sing.\nking\nqueen of the red hill\nunder the hill\n/save {saved}\n"
        done = CliRunner().invoke(group, ["chat", *words], input=typed)
        turns = load_turns(saved)
        assert done.stdout == "".join(f"{turn.text}\n" for turn in turns)
        assert "turns were left out" in done.stderr
        assert "continues text" not in done.stderr
        again = CliRunner().invoke(group, ["chat", *words, "--replay", str(saved)], input="")
        assert again.stdout == "".join(f"{turn.prompt}\n{turn.text}\n" for turn in turns)
        assert "differs" not in again.stderr


def test_a_plain_model_has_no_system_message(talk: Conversation) -> None:
    with pytest.raises(ChatError, match="this one continues text"):
        talk.command("/system Sing.")
    with pytest.raises(ChatError, match="this one continues text"):
        "".join(talk.replay(replace(Saved("a", SampleConfig()), system="Sing."), lambda: False))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format": "other"}', '{"format": "mlxgpt chat", "turns": [{}]}', "[" * 9999],
)
def test_a_file_that_holds_no_conversation_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text(content)
    with pytest.raises(ChatError, match=r"talk\.json is not a saved conversation"):
        load_turns(tmp_path / "talk.json")


@pytest.fixture
def checkpoint(make_run: MakeRun, tmp_path: Path) -> Path:
    run, backend = make_run("modern")
    path = tmp_path / "checkpoint.safetensors"
    facts = (run.tokenizer.to_json(), run.data, "numpy", backend.state())
    save_checkpoint(path, Checkpoint(run.model, run.train, Progress(), *facts))
    return path


def test_a_script_can_talk_through_a_pipe(checkpoint: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", str(checkpoint), "--backend", "numpy", "--max-tokens", "9"]
    saved = tmp_path / "talk.json"
    typed = f"The old\n/retry\n/len 4\n/bad\nA king\n/save {saved}\n/quit\nnever read\n"
    done = CliRunner().invoke(group, ["chat", *words], input=typed)
    assert (done.exit_code, len(load_turns(saved))) == (0, 2)
    first, second = load_turns(saved)
    retried = done.stdout.removesuffix(f"\n{first.text}\n{second.text}\n")
    assert len(retried) == 9  # the answer that was replaced
    assert "Error: '/bad' is not a command" in done.stderr
    again = CliRunner().invoke(group, ["chat", *words, "--replay", str(saved)], input="")
    assert again.stdout == f"The old{first.text}\nA king{second.text}\n"
    assert "differs" not in again.stderr


def test_chat_says_which_model_it_is_and_that_it_does_not_answer(checkpoint: Path) -> None:
    done = CliRunner().invoke(group, ["chat", "--checkpoint", str(checkpoint)], input="")
    _, *lines = done.stderr.splitlines()
    assert lines[0] == f"Model: {checkpoint}"
    assert re.fullmatch(r"Size: [\d,]+ parameters, context 16 tokens", lines[1])
    assert lines[2] == "Loss: not evaluated"
    assert lines[3].startswith("This model continues text and does not answer")


def test_chat_keeps_no_spare_memory_between_answers(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[str] = []
    monkeypatch.setattr("mlx_randygpt.backends.release_memory", lambda b: released.append(b.name))
    words = ["chat", f"--checkpoint={checkpoint}", "--backend=numpy", "--max-tokens=3"]
    done = CliRunner().invoke(group, words, input="The\nold\n")
    assert done.exit_code == 0, done.output
    assert released == ["numpy", "numpy"]


def test_sample_interactive_is_chat(checkpoint: Path) -> None:
    words = ["--checkpoint", str(checkpoint), "--backend", "numpy"]
    done = CliRunner().invoke(group, ["sample", "--interactive", *words], input="/len 5\nThe\n")
    assert (done.exit_code, len(done.stdout)) == (0, 6)
    wrong = CliRunner().invoke(group, ["sample", "--interactive", "--json", *words])
    assert (wrong.exit_code, "cannot use --json" in wrong.stderr) == (2, True)


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, words: list[str], state: Path) -> None:
        self.pid, self.at = pty.fork()
        if self.pid == 0:
            os.environ |= {"XDG_STATE_HOME": str(state), "TERM": "dumb", "NO_COLOR": "1"}
            os.execv(sys.executable, [sys.executable, "-m", "mlx_randygpt", *words])
        self.seen = ""

    def read_until(self, pattern: str, seconds: float = 60) -> str:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.seen):
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern} in {self.seen!r}"
            if select.select([self.at], [], [], left)[0]:
                self.seen += os.read(self.at, 4096).decode(errors="replace")
        seen, self.seen = self.seen, ""
        return seen

    def type(self, text: str) -> None:
        os.write(self.at, text.encode())


@pytest.mark.slow
def test_ctrl_c_stops_the_text_and_ctrl_d_leaves(checkpoint: Path, tmp_path: Path) -> None:
    words = ["chat", "--checkpoint", str(checkpoint), "--backend", "numpy"]
    terminal = Terminal([*words, "--max-tokens", "100000000"], tmp_path / "state")
    terminal.read_until("> ")
    terminal.type("The old\n")
    terminal.read_until("The old\r?\n.{8}")
    terminal.type("\x03")
    terminal.read_until("\n> ")
    terminal.type("/sho\t")
    terminal.read_until("/show")  # completed
    terminal.type("\n")
    assert "tokens so far, context 16" in terminal.read_until("\n> ")
    terminal.type("\x04")
    with contextlib.suppress(OSError):  # the terminal is gone with the program
        terminal.read_until("never shown")
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 0
    history = (tmp_path / "state" / "mlx-randygpt" / "chat_history").read_text()
    assert "The old\n/show" in history
