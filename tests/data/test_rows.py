"""Rows with conversations: what is valid, and one clear line with place and remedy for the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_randygpt.cli import group
from mlx_randygpt.data import DataError
from mlx_randygpt.data.reading import Piece, Reading, pieces
from mlx_randygpt.data.rows import RowError, conversation
from mlx_randygpt.dialogue import Turn

ASK = {"role": "user", "content": "Hi?"}
ANSWER = {"role": "assistant", "content": "Hello."}
TALK = [Turn("user", "Hi?"), Turn("assistant", "Hello.")]
GOOD = {"messages": [ASK, ANSWER]}


def parts(*values: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(values)}


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"id": 7, "messages": [ASK, ANSWER | {"weight": 1, "tool_calls": None}], "source": "x"},
        {
            "messages": [
                parts({"type": "text", "text": "H"}, {"type": "text", "text": "i?"}),
                ANSWER,
            ]
        },
        {"messages": [parts("Hi?"), ANSWER]},
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
        {"messages": None, "conversations": [ASK, ANSWER]},
        {"prompt": "Hi?", "completion": "Hello."},
        {"prompt": [ASK], "completion": [ANSWER]},
        {"prompt": "left out", "messages": [ASK, ANSWER]},
    ],
)
def test_every_form_of_a_conversation_is_read(row: dict[str, Any]) -> None:
    assert conversation(row, "place") == TALK


def test_a_system_message_comes_first_whether_it_is_a_message_or_a_field() -> None:
    system = [Turn("system", "Be\nkind."), *TALK]
    message = {"role": "system", "content": "Be\r\nkind."}
    assert conversation({"messages": [message, ASK, ANSWER]}, "") == system
    assert conversation({"messages": [message | {"role": "developer"}, ASK, ANSWER]}, "") == system
    assert conversation({"system": "Be\nkind.", **GOOD}, "") == system


def row(*messages: Any) -> str:
    return json.dumps({"messages": list(messages)})


VALID = 'a valid row is {"messages": [{"role": "user", "content": "…"}, {"role":'
PAIR = 'a valid row is {"prompt": "…", "completion": "…"}'
INVALID = [  # a line of talks.jsonl, and what is said about it
    ("{", "line 2 is not JSON: Expecting property name"),
    ("talk", "line 2 is not JSON: Expecting value"),
    ('{"messages": [', "line 2 is not JSON: Expecting value"),
    ("[" * 100_000, "line 2 is not JSON: "),
    ("[]", 'line 2 is a list, not an object such as {"messages": …}'),
    ("null", 'line 2 is null, not an object such as {"messages": …}'),
    ("3", 'line 2 is a number, not an object such as {"messages": …}'),
    ('"Hi"', 'line 2 is a text, not an object such as {"messages": …}'),
    ("true", 'line 2 is true or false, not an object such as {"messages": …}'),
    ("{}", "line 2 has no conversation, as rows before it have; it is empty"),
    ('{"text": "Hi"}', "line 2 has no conversation, as rows before it have; it has text"),
    ('{"message": []}', "line 2 has no conversation, as rows before it have; it has message"),
    ('{"messages": null}', f"line 2: messages is null, not a list of messages; {VALID}"),
    ('{"messages": "Hi"}', f"line 2: messages is a text, not a list of messages; {VALID}"),
    ('{"messages": {}}', f"line 2: messages is an object, not a list of messages; {VALID}"),
    (row(), f"line 2: messages is an empty list; {VALID}"),
    (row("Hi?", ANSWER), f"line 2: messages[0] is a text, not an object; {VALID}"),
    (row(ASK, None), f"line 2: messages[1] is null, not an object; {VALID}"),
    (row([ASK], ANSWER), f"line 2: messages[0] is a list, not an object; {VALID}"),
    (row({"content": "Hi"}), f"line 2: messages[0] has no 'role' but \"content\"; {VALID}"),
    (row({}, ANSWER), f"line 2: messages[0] has no 'role' but no fields; {VALID}"),
    (row(ASK, {"role": "assistant"}), "line 2: messages[1] has no 'content' but \"role\"; "),
    (row(ASK | {"role": "tool"}), 'line 2: messages[0] has the role "tool"; it must be one of sys'),
    (row(ASK | {"role": "User"}), 'line 2: messages[0] has the role "User"; it must be one of '),
    (row(ASK | {"role": None}), "line 2: messages[0] has the role null; it must be one of system"),
    (row(ASK | {"role": ["user"]}), 'line 2: messages[0] has the role ["user"]; it must be one '),
    (row(ASK | {"role": 1}), "line 2: messages[0] has the role 1; it must be one of system, user"),
    (row(ASK, ANSWER | {"content": None}), "line 2: messages[1] has null as its content; it must"),
    (row(ASK, ANSWER | {"content": 5}), "line 2: messages[1] has a number as its content; it must"),
    (row(ASK | {"content": {"text": "Hi"}}), "line 2: messages[0] has an object as its content; "),
    (row(ASK | {"content": ""}, ANSWER), "line 2: messages[0] is empty; give it a text or remove"),
    (row(ASK, ANSWER | {"content": " \n"}), "line 2: messages[1] is empty; give it a text or "),
    (
        row(ASK | {"content": "a\0b"}),
        "line 2: messages[0] holds a NUL character, so it is not text",
    ),
    (row(parts(), ANSWER), "line 2: messages[0] is empty; give it a text or remove it"),
    (
        row(parts({"type": "image_url", "image_url": {}}), ANSWER),
        'line 2: messages[0] has a content whose part 1 is "image_url", but only text can be',
    ),
    (row(parts({"type": "text"}), ANSWER), "line 2: messages[0] has a content whose part 1 is "),
    (row(parts("a", 7), ANSWER), 'line 2: messages[0] has a content whose part 2 is "a number", '),
    (row(ASK), "line 2 has no message of the assistant, so there is nothing to learn"),
    (row(ASK, {"role": "system", "content": "x"}, ANSWER), "line 2: message 2 is the system's; "),
    (row(ASK, ANSWER | {"weight": 0}), "line 2: messages[1] has weight=0, but every answer is "),
    (row(ASK, ANSWER | {"tool_calls": [{}]}), "line 2: messages[1] has tool_calls, but only text "),
    (row(ASK, ANSWER | {"function_call": {"a": 1}}), "line 2: messages[1] has function_call, but "),
    ('{"prompt": "Hi"}', f"line 2 has no 'completion'; {PAIR}"),
    ('{"completion": "Hi"}', f"line 2 has no 'prompt'; {PAIR}"),
    ('{"prompt": null, "completion": "x"}', f"line 2 has null under 'prompt', not a text; {PAIR}"),
    ('{"prompt": "Hi", "completion": ""}', "line 2: completion is empty; give it a text or remove"),
    ('{"prompt": [], "completion": "x"}', "line 2: prompt is an empty list; a valid row is "),
    (
        '{"conversations": [{"from": "human"}]}',
        "line 2: conversations[0] has no 'content' but \"from\"; a valid row is "
        '{"conversations": [{"from": "human", "value": "…"}',
    ),
    (
        '{"conversations": [{"from": "alien", "value": "x"}]}',
        'line 2: conversations[0] has the role "alien"; it must be one of system, user, assistant',
    ),
]


@pytest.mark.parametrize(("line", "problem"), INVALID)
def test_an_invalid_row_is_one_line_that_names_file_line_and_remedy(
    line: str, problem: str, tmp_path: Path
) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(RowError) as caught:
        list(pieces(file))
    assert str(caught.value).startswith(f"{file}: {problem}")
    assert "\n" not in str(caught.value)
    assert list(pieces(file, Reading(skip_bad_rows=True))) == list(talk_pieces())


def test_there_are_forty_kinds_of_invalid_rows() -> None:
    assert len(INVALID) >= 40


def talk_pieces() -> list[Piece]:
    return [Piece("Hi?", True, False, "user"), Piece("Hello.", False, True, "assistant")]


@pytest.mark.parametrize("command", ["train", "data prepare"])
def test_a_command_ends_with_code_1_and_one_line(command: str, tmp_path: Path) -> None:
    file, bad = tmp_path / "talks.jsonl", json.dumps({"messages": [ASK]})
    file.write_text(f"{json.dumps(GOOD)}\n{bad}\n")
    out = ["--out", str(tmp_path / "run")] if command == "train" else []
    result = CliRunner().invoke(group, [*command.split(), "--data", str(file), *out])
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {file}: line 2 has no message of the assistant, so there is nothing to learn\n"
    )
    assert not (tmp_path / "run").exists()


def test_skipped_rows_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    rows = [json.dumps({"prompt": f"Say {i}!", "completion": f"{i}."}) for i in range(40)]
    file.write_text("\n".join(["{", *rows, "[]", "[]"]))
    arguments = ["data", "prepare", "--json", "--skip-bad-rows", "--data", str(file)]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.stderr
    assert f"Skipped: 3 invalid rows; the first: {file}: line 1 is not JSON" in result.stderr
    assert json.loads(result.stdout)["conversations"] == 40


def read(file: Path, **options: Any) -> list[Piece]:
    return list(pieces(file, Reading(**options)))


def test_a_json_array_of_conversations_is_read_and_any_other_json_is_text(tmp_path: Path) -> None:
    file = tmp_path / "talks.json"
    file.write_text(json.dumps([GOOD], indent=1))
    assert read(file) == talk_pieces()
    for other in ('[{"text": "Hi"}]', "[1]", "[{", '{"messages": []}', "[]"):
        file.write_text(other)
        assert read(file) == [Piece(other, True, True)]
    file.write_text(json.dumps([GOOD, {"messages": []}]))
    with pytest.raises(RowError, match=r"talks.json: item 2: messages is an empty list"):
        read(file)


def test_parquet_columns_of_messages_are_read(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [GOOD | {"id": 1}, GOOD | {"id": 2}, {"messages": [], "id": 3}]
    file = tmp_path / "talks.parquet"
    parquet.write_table(pa.Table.from_pylist(rows[:2]), file)
    assert read(file) == 2 * talk_pieces()
    parquet.write_table(pa.Table.from_pylist(rows), file)
    with pytest.raises(RowError, match=r"talks.parquet: row 3: messages is an empty list"):
        read(file)
    parquet.write_table(pa.Table.from_pylist([{"id": 1}]), file)
    with pytest.raises(DataError, match=r"no column 'text'; it has id"):
        read(file)


def test_a_row_with_a_text_stays_a_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    both = json.dumps(GOOD | {"text": "plain", "prompt": "Hi?"})
    file.write_text(both)
    assert read(file) == [Piece("plain", True, True)]
    assert read(file, text_field="prompt") == [Piece("Hi?", True, True)]
    assert read(file, text_field="body") == talk_pieces()
    file.write_text(f"{both}\n{json.dumps(GOOD)}")
    with pytest.raises(RowError, match=r"line 2 has no text under 'text'.*files of their own"):
        read(file)


def test_as_text_reads_no_conversations(tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps(GOOD))
    with pytest.raises(RowError, match="line 1 has no text under 'text'; it has messages; choose"):
        read(file, as_text=True)
