"""Data files -> rows: .jsonl (one JSON object per line), .csv (RFC 4180), .parquet. All text is UTF-8.

Whatever the bytes are, the outcome is rows or one UserError that names file, line and column.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metapeft.data.rows import MAX_ROW_CHARACTERS, Table, listed, parse, too_long
from metapeft.errors import UserError

SUFFIXES = (".jsonl", ".csv", ".parquet")
READ = ("messages", "prompt", "completion", "text", "label")  # columns; others are passed over


def read_file(path: Path) -> Table:
    """The rows of one file. Raises UserError for anything that is not a readable file of rows."""
    suffix = path.suffix.lower()
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UserError(
                f"{path} is a folder; give a file ({', '.join(SUFFIXES)}) or a folder with a train file in it"
            )
        if suffix not in SUFFIXES:
            kind = repr(suffix) if suffix else "(no extension)"
            raise UserError(f"cannot read {path}: unknown type {kind}; give {', '.join(SUFFIXES)}")
        if not stat.S_ISREG(mode):
            raise UserError(f"{path} is not a regular file; give a file ({', '.join(SUFFIXES)})")
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no such file: {path}; check the name and the folder") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    if not data.strip():
        raise UserError(f"{path} is empty; put one example on each line")
    if suffix == ".parquet":
        return parse(parquet_records(data, path), str(path), "row")
    text = decode(data, path)
    return parse(csv_records(text, path) if suffix == ".csv" else jsonl_records(text, path), str(path))


def decode(data: bytes, path: Path) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} is encoded as UTF-16; save it as UTF-8")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        shift = 3 if data.startswith(codecs.BOM_UTF8) else 0
        offset = error.start + shift
        line = data.count(b"\n", 0, offset) + 1
        raise UserError(
            f"{path} line {line} is not UTF-8 (byte 0x{data[offset]:02x} at offset {offset}); save the file as UTF-8"
        ) from error


def jsonl_records(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """https://jsonlines.org; blank lines are skipped."""
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if not line.strip():
            continue
        where = f"{path} line {number}"
        if len(line) > MAX_ROW_CHARACTERS:
            raise UserError(too_long(where, len(line)))
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            whole = " (a JSON array: write one object per line instead)" if number == 1 and line[0] == "[" else ""
            what = error.msg[:1].lower() + error.msg[1:] + whole
            raise UserError(f"{where} column {error.colno} is not valid JSON: {what}; fix the line") from error
        except (ValueError, RecursionError) as error:  # a number of over 4,300 digits; brackets nested thousands deep
            raise UserError(f"{where} is JSON that cannot be read ({str(error)[:60]}); fix the line") from error
        if not isinstance(record, dict):
            raise UserError(f'{where} is a {type(record).__name__}, not an object such as {{"text": …, "label": …}}')
        yield number, record


def csv_records(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """RFC 4180 with a header line; columns other than those of the row format are ignored."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # our own limit speaks more clearly
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1  # where this record starts: it may span lines
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path} line {line} is not valid CSV: {error} (a quote left open?); fix the line"
            ) from error
        if not any(fields):
            continue  # blank
        read = [text for name, text in zip(header or fields, fields, strict=False) if not header or name in READ]
        if sum(map(len, read)) > MAX_ROW_CHARACTERS:
            raise UserError(too_long(f"{path} line {line}", sum(map(len, read))))
        if not header:
            header = [field.strip() for field in fields]
            check_header(header, path)
        elif len(fields) != len(header):
            raise UserError(
                f"{path} line {line} has {len(fields)} fields where the header has {len(header)}; "
                "quote texts that contain commas"
            )
        else:
            yield line, dict(zip(header, fields, strict=True))


def check_header(header: list[str], path: Path) -> None:
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise UserError(f"{path} line 1: the header names {listed(twice)} more than once; rename or delete the copies")
    if len(header) == 1:
        for separator, name in (("\t", "tabs"), (";", "semicolons"), ("|", "bars")):
            if separator in header[0]:
                raise UserError(f"{path} is separated by {name}; separate its columns by commas")


def parquet_records(data: bytes, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """https://parquet.apache.org; only the columns of the row formats are decoded."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as parquet

    number = 0
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise UserError(f"{path} names the column {listed(twice)} more than once; rename or delete the copies")
        columns = [name for name in names if name in READ]
        short = [name for name in columns if file.schema_arrow.field(name).type in (pa.float16(), pa.float32())]
        others = dict.fromkeys(names)  # without their values, so that a message can name them
        for batch in file.iter_batches(columns=columns or names[:1]):
            for record in batch.to_pylist():
                number += 1
                for name in short:  # 0.1, not the 0.10000000149011612 that is nearest to it
                    record[name] = None if record[name] is None else float(str(np.float32(record[name])))
                yield number, others | record
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many kinds for broken bytes
        at = f"row {number + 1} of {path}" if number else str(path)
        raise UserError(
            f"{at} cannot be read as Parquet ({str(error).splitlines()[0][:100]}); write it again"
        ) from error
