"""Files of every format give rows; whatever is wrong with one gives a UserError that says where."""

import contextlib
import csv
import io
import json
import os
import tempfile
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metapeft.data import formats
from metapeft.data.rows import MAX_ROW_CHARACTERS, Row
from metapeft.errors import UserError

SAMPLES = Path(__file__).parent / "samples"
WORDS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40).filter(str.strip)
LABELS = st.sampled_from(["spam", "ham", "0", "ja, vielleicht", 'a "quoted" one', "né"])
TABLES = st.lists(st.tuples(WORDS, LABELS), min_size=1, max_size=20)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fails(path: Path, *parts: str) -> str:
    with pytest.raises(UserError) as caught:
        formats.read_file(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for part in parts:
        assert part in message, message
    return message


@settings(deadline=None)
@given(TABLES)
def test_the_three_formats_give_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("same")
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in table]
    out = io.StringIO(newline="")
    csv.writer(out).writerows([("id", "text", "label"), *((i, *row) for i, row in enumerate(table))])
    columns = {"text": [t for t, _ in table], "label": [label for _, label in table], "extra": [1.5] * len(table)}
    parquet.write_table(pa.table(columns), folder / "t.parquet")
    expected = tuple(Row(text, label.strip()) for text, label in table)
    assert formats.read_file(write(folder, "t.jsonl", "\n".join(lines))).rows == expected
    assert formats.read_file(folder / "t.parquet").rows == expected
    # Python's csv module writes a carriage return only inside quotes, and reads it back as it was.
    assert formats.read_file(write(folder, "t.csv", out.getvalue())).rows == expected


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(formats.SUFFIXES))
def test_any_bytes_give_rows_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
) -> None:
    path = write(tmp_path_factory.getbasetemp(), "any" + suffix, data)
    try:
        assert formats.read_file(path).rows
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["text", "label", "prompt", "completion", "messages", "role", "content"]), inner
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(JSON, min_size=1, max_size=4))
def test_any_json_gives_rows_or_a_user_error(tmp_path_factory: pytest.TempPathFactory, values: list[object]) -> None:
    path = write(tmp_path_factory.getbasetemp(), "any.jsonl", "\n".join(json.dumps(value) for value in values))
    try:
        assert formats.read_file(path).rows
    except UserError as error:
        assert "line" in str(error) or "no rows" in str(error)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from('text,label\n"\r;x\t é\0'), max_size=80))
def test_any_csv_gives_rows_or_a_user_error(tmp_path_factory: pytest.TempPathFactory, body: str) -> None:
    path = write(tmp_path_factory.getbasetemp(), "any.csv", "text,label\n" + body)
    try:
        assert formats.read_file(path).rows
    except UserError as error:
        assert str(path) in str(error)


def test_truncated_parquet_never_escapes(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a", "b"] * 50, "label": ["x", "y"] * 50}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for cut in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[cut] ^= 0xFF
        for data in (whole[:cut], bytes(damaged)):
            with contextlib.suppress(UserError):
                formats.read_file(write(tmp_path, "cut.parquet", data))


def test_conversations() -> None:
    table = formats.read_file(SAMPLES / "parity_chat.jsonl")
    assert table.shape == "messages"
    assert table.rows[0] == Row((("system", "Answer with one word."), ("user", "Is 0 even or odd?")), "even")


def test_conversations_in_parquet(tmp_path: Path) -> None:
    records = [json.loads(line) for line in (SAMPLES / "parity_chat.jsonl").read_text().splitlines()]
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "chat.parquet")
    assert formats.read_file(tmp_path / "chat.parquet").rows == formats.read_file(SAMPLES / "parity_chat.jsonl").rows


def test_numbers_become_text(tmp_path: Path) -> None:
    records = [("a", 1), ("b", 0.0), ("c", True), (7, 2.5)]
    lines = "\n".join(json.dumps({"text": text, "label": label}) for text, label in records)
    rows = formats.read_file(write(tmp_path, "n.jsonl", lines)).rows
    assert [(row.prompt, row.answer) for row in rows] == [("a", "1"), ("b", "0"), ("c", "true"), ("7", "2.5")]


def test_byte_order_mark_blank_lines_and_windows_line_ends(tmp_path: Path) -> None:
    lines = '\ufeff{"text": "a", "label": "x"}\r\n\r\n{"text": "b", "label": "y"}\r\n'
    assert len(formats.read_file(write(tmp_path, "w.jsonl", lines)).rows) == 2
    assert len(formats.read_file(write(tmp_path, "w.csv", "\ufefftext,label\r\na,x\r\n\r\nb,y\r\n")).rows) == 2


def test_line_separators_inside_a_string(tmp_path: Path) -> None:
    (row,) = formats.read_file(write(tmp_path, "u.jsonl", '{"text": "one\u2028two", "label": "x"}')).rows
    assert row.prompt == "one\u2028two"


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.jsonl", "", ["is empty"]),
        ("blank.csv", " \n\n", ["is empty"]),
        ("header.csv", "text,label\n", ["no rows"]),
        ("broken.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label"', ["line 2", "column", "not valid JSON"]),
        ("array.jsonl", '[{"text": "a",', ["line 1", "JSON array"]),
        ("list.jsonl", "[1]", ["line 1", "list"]),
        ("deep.jsonl", "[" * 100_000, ["line 1", "cannot be read"]),
        ("digits.jsonl", '{"text": "a", "label": ' + "1" * 5000 + "}", ["line 1", "cannot be read"]),
        ("missing.jsonl", '{"text": "a", "tag": "x"}', ["line 1", "'label'", "'text', 'tag'"]),
        ("missing.csv", "sentence,label\na,x\n", ["line 2", "'text'", "'sentence', 'label'"]),
        ("none.csv", "a,b\n1,2\n", ["no usable columns", "'a', 'b'", "text and label"]),
        ("later.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}', ["line 2", "'label'", "line 1"]),
        (
            "mixed.jsonl",
            '{"text": "a", "label": "x"}\n{"prompt": "b", "completion": "y"}',
            ["line 2 is prompt+completion while line 1 is text+label"],
        ),
        ("latin.csv", b"text,label\ncaf\xe9,x\n", ["line 2", "0xe9", "offset 14", "UTF-8"]),
        ("utf16.csv", "text,label\na,x\n".encode("utf-16"), ["UTF-16"]),
        ("long.jsonl", json.dumps({"text": "y" * 1_000_000, "label": "x"}), ["line 1", "1,000,", "characters"]),
        ("long.csv", "text,label\na,x\n" + "y" * 1_000_000 + ",x\n", ["line 3", "1,000,", "characters"]),
        ("null.jsonl", '{"text": "a", "label": null}', ["line 1", "'label'", "missing"]),
        ("nan.jsonl", '{"text": "a", "label": NaN}', ["line 1", "'label'", "missing"]),
        ("nan.csv", "text,label\na,x\nb,nan\n", ["line 3", "'label'", "NaN"]),
        ("gap.csv", "text,label\na,x\nb,\n", ["line 3", "'label'", "is empty"]),
        ("gap.jsonl", '{"text": "  ", "label": "x"}', ["line 1", "'text'", "is empty"]),
        ("nested.jsonl", '{"text": {"a": 1}, "label": "x"}', ["line 1", "'text'", "dict"]),
        ("surrogate.jsonl", '{"text": "\\ud83d", "label": "x"}', ["line 1", "'text'", "surrogate"]),
        ("twice.csv", "text,label,label\na,x,y\n", ["line 1", "'label'", "more than once"]),
        ("ragged.csv", "text,label\na,b,x\n", ["line 2", "3 fields", "header has 2"]),
        ("open.csv", 'text,label\na,x\n"b,y\nc,z\n', ["line 3", "quote"]),
        ("semicolon.csv", "text;label\na;x\n", ["semicolons"]),
        ("tab.csv", "text\tlabel\na\tx\n", ["tabs"]),
        ("data.json", "{}", ["unknown type '.json'", ".jsonl"]),
        ("data", "{}", ["no extension"]),
        ("bad.parquet", b"PAR1 this is not parquet PAR1", ["Parquet"]),
        ("chat.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', ["line 1", "at least two"]),
        (
            "user_last.jsonl",
            '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
            ["line 1", "last message", "user"],
        ),
        (
            "role.jsonl",
            '{"messages": [{"role": "human", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            ["line 1", "message 1", "'human'"],
        ),
        (
            "null_content.jsonl",
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}',
            ["line 1", "message 2", "missing"],
        ),
        ("text.jsonl", '{"messages": "hello"}', ["line 1", "list"]),
    ],
)
def test_bad_files_are_named_with_place_and_remedy(
    tmp_path: Path, name: str, content: str | bytes, parts: list[str]
) -> None:
    fails(write(tmp_path, name, content), *parts)


def test_missing_file(tmp_path: Path) -> None:
    fails(tmp_path / "none.jsonl", "no such file")


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    fails(tmp_path / "folder.jsonl", "is a folder")


def test_something_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")  # reading it would wait for ever
    fails(tmp_path / "pipe.jsonl", "not a regular file")


def test_unreadable_file() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        secret = write(folder, "secret.jsonl", "{}")
        secret.chmod(0)
        (folder / "locked").mkdir()
        inside = write(folder / "locked", "inside.jsonl", "{}")
        (folder / "locked").chmod(0)
        was = os.geteuid()
        try:
            if was == 0:
                os.seteuid(65534)  # root may read everything; nobody may not
            fails(secret, "permissions")
            fails(inside, "permissions")
        finally:
            os.seteuid(was)
            (folder / "locked").chmod(0o755)


def test_parquet_rows_are_counted(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a", "b", "c"], "label": ["x", None, "y"]}), tmp_path / "gap.parquet")
    fails(tmp_path / "gap.parquet", "row 2", "'label'")
    parquet.write_table(pa.table({"text": ["a"], "tag": ["x"]}), tmp_path / "columns.parquet")
    fails(tmp_path / "columns.parquet", "'label'", "'text', 'tag'")
    parquet.write_table(pa.table({"a": ["a"], "b": ["x"]}), tmp_path / "none.parquet")
    fails(tmp_path / "none.parquet", "'a', 'b'")


def test_a_row_of_the_longest_length_is_read(tmp_path: Path) -> None:
    text = "y" * (MAX_ROW_CHARACTERS - 100)
    assert formats.read_file(write(tmp_path, "t.csv", f"text,label\n{text},x\n")).rows[0].prompt == text


def test_numbers_of_any_width_are_written_as_they_were(tmp_path: Path) -> None:
    labels = {
        "float": pa.array([0.1, 0.7], pa.float32()),
        "half": pa.array([0.5, 2.0], pa.float16()),
        "decimal": pa.array([Decimal("1.00"), Decimal("2.50")], pa.decimal128(5, 2)),
    }
    wanted = {"float": ["0.1", "0.7"], "half": ["0.5", "2"], "decimal": ["1", "2.5"]}
    for name, column in labels.items():
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pa.table({"text": ["a", "b"], "label": column}), path)
        assert [row.answer for row in formats.read_file(path).rows] == wanted[name]
    path = tmp_path / "infinite.jsonl"
    path.write_text('{"text": "a", "label": 1e400}\n')
    with pytest.raises(UserError, match="'label' is infinite"):
        formats.read_file(path)


def test_a_column_that_is_not_read_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "pages.csv"
    path.write_text("text,html,label\na," + "x" * 600_000 + ",yes\n")
    assert [row.answer for row in formats.read_file(path).rows] == ["yes"]
    path.write_text("text,html,label\n" + "x" * 600_000 + ",b,yes\n")
    with pytest.raises(UserError, match="split or shorten"):
        formats.read_file(path)
