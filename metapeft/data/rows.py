"""Records of a data file (dicts) -> rows of one shape, with the line of every mistake."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Number
from typing import Any, Literal

from metapeft.data.task import Prompt
from metapeft.errors import UserError

Shape = Literal["text+label", "prompt+completion", "messages"]
COLUMNS: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt+completion": ("prompt", "completion"),
    "text+label": ("text", "label"),
}
ROLES = ("system", "user", "assistant", "tool")
MAX_ROW_CHARACTERS = 500_000  # more than the longest context of today's open models (128k tokens)


@dataclass(frozen=True)
class Row:
    """What goes in and what must come out: `answer` is a label, or a completion."""

    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class Table:
    shape: Shape
    rows: tuple[Row, ...]


def parse(records: Iterable[tuple[int, dict[str, Any]]], source: str, unit: str = "line") -> Table:
    """Rows from (number, record) pairs; `number` counts `unit`s (line, row) of `source` from 1, for the messages.

    Raises UserError naming source, line and column of the first row that cannot be used.
    """
    shape: Shape | None = None
    first, rows = 0, []
    for number, record in records:
        where = f"{source} {unit} {number}"
        if shape is None:
            shape, first = shape_of(record, where), number
        elif any(column not in record for column in COLUMNS[shape]):
            raise UserError(misfit(record, shape, f"{unit} {first}", where))
        if shape == "messages":
            rows.append(conversation(record["messages"], where))
        else:
            question, answer = COLUMNS[shape]
            rows.append(Row(cell(record[question], question, where), cell(record[answer], answer, where).strip()))
        row = rows[-1]
        characters = len(row.answer) + (
            len(row.prompt) if isinstance(row.prompt, str) else sum(len(text) for _, text in row.prompt)
        )
        if characters > MAX_ROW_CHARACTERS:
            raise UserError(too_long(where, characters))
    if shape is None:
        raise UserError(f"{source} holds no rows; add rows with {choices()}")
    return Table(shape, tuple(rows))


def shape_of(record: dict[str, Any], where: str) -> Shape:
    for shape, columns in COLUMNS.items():
        if all(column in record for column in columns):
            return shape
    found = listed(record)
    for columns in COLUMNS.values():
        here = [c for c in columns if c in record]
        if here:
            missing = next(c for c in columns if c not in record)
            raise UserError(f"{where} has {here[0]!r} but no column {missing!r} (found {found}); add or rename it")
    raise UserError(f"{where} has no usable columns (found {found}); rename them to {choices()}")


def misfit(record: dict[str, Any], shape: Shape, first: str, where: str) -> str:
    for other, columns in COLUMNS.items():
        if all(column in record for column in columns):
            return f"{where} is {other} while {first} is {shape}; use one row format per file"
    missing = next(column for column in COLUMNS[shape] if column not in record)
    return f"{where} has no column {missing!r} (found {listed(record)}); add it, as {first} has it"


def cell(value: Any, column: str, where: str) -> str:
    """One value as text: numbers become their shortest notation, true and false those words.

    Raises UserError for what is missing, empty, not text, or not encodable.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise UserError(f"{where}: column {column!r} is missing ({value}); fill it or delete the row")
    if isinstance(value, Number) and not isinstance(value, complex):
        if isinstance(value, float | Decimal) and not math.isfinite(value):
            raise UserError(f"{where}: column {column!r} is infinite; write it as text, or delete the row")
        if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
            return str(int(value))  # 1.0 is how tables write the label 1 once a column held a gap
        if isinstance(value, Decimal):
            return str(int(value)) if value == value.to_integral_value() else format(value.normalize(), "f")
        try:
            return str(value)
        except ValueError as error:  # an integer of over 4,300 digits
            raise UserError(f"{where}: column {column!r} holds too large a number; write it as text") from error
    if not isinstance(value, str):
        kind = type(value).__name__
        raise UserError(f"{where}: column {column!r} must be text or a number, not {kind}; convert it to text")
    if not value.strip():
        raise UserError(f"{where}: column {column!r} is empty; fill it or delete the row")
    if column == "label" and value.strip().lower() == "nan":
        raise UserError(f"{where}: column {column!r} is NaN (a missing value); fill it or delete the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell it: "\\ud83d"
        raise UserError(
            f"{where}: column {column!r} holds half of a surrogate pair, which is no character; remove it"
        ) from error
    return value


def conversation(messages: Any, where: str) -> Row:
    """Chat messages: the last one, the assistant's, is the answer; those before it are the prompt."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or len(messages) < 2:
        raise UserError(f"{where}: 'messages' must be a list of at least two messages (user, then assistant)")
    turns = []
    for index, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise UserError(f"{where}: message {index} must be an object with 'role' and 'content'")
        role = message["role"]
        if role not in ROLES:
            raise UserError(f"{where}: message {index} has the role {str(role)[:30]!r}; use one of {', '.join(ROLES)}")
        turns.append((str(role), cell(message["content"], f"content of message {index}", where)))
    if turns[-1][0] != "assistant":
        raise UserError(f"{where}: the last message is the {turns[-1][0]}'s; end each row with the assistant's answer")
    if all(role != "user" for role, _ in turns):
        raise UserError(f"{where}: no message is the user's; put the question before the answer")
    return Row(tuple(turns[:-1]), turns[-1][1].strip())


def too_long(where: str, characters: int) -> str:
    return (
        f"{where} is {characters:,} characters long, over the limit of {MAX_ROW_CHARACTERS:,}; "
        "split or shorten it (is a quote or line break missing?)"
    )


def listed(names: Iterable[Any]) -> str:
    """Column names for a message; a hostile header must not flood the terminal."""
    shown = [repr(str(name)[:30]) for name in names]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "") if shown else "none"


def choices() -> str:
    return "text and label, prompt and completion, or messages"
