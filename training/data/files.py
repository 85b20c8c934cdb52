"""Readers of local files: plain text, and tables (JSON, JSON lines, CSV, TSV and Parquet), which are read row by row.

Notable:
- The loaders of `datasets` are not used: they guess types, read a missing column and the text "NA" as null, and cannot name the
  line of an error.
- Every error in a file is a `UserError` that names the file, the line or row, the problem and the remedy.
- Text is UTF-8. A byte order mark at its beginning is dropped.
"""

import codecs
import csv
import glob
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from training.errors import UserError, one_line

TABLE_ENDINGS = (".jsonl", ".parquet", ".csv", ".tsv")
FILE_ENDINGS = (".txt", ".md", *TABLE_ENDINGS)
Row = dict[str, Any]
HEAD = 2**20  # bytes at the beginning of a text file that are checked before any long work
LONGEST_DOCUMENT = 2**31 - 2  # bytes; Arrow's offsets have 32 bits


def find_files(source: str, endings: tuple[str, ...] = FILE_ENDINGS) -> list[Path]:
    """Sorted: the file itself, those that match the glob, or all below the directory with these extensions; at least one."""

    def fail(error: OSError) -> None:
        raise error

    try:
        path = Path(os.path.expanduser(source))
        str(path).encode()
        if path.is_dir():
            problem = f"this directory has no {', '.join(endings)} file"
            names = (Path(directory) / file for directory, _, files in os.walk(path, onerror=fail) for file in files)
            found = sorted(name for name in names if name.suffix.lower() in endings and name.is_file())
        elif not path.exists() and glob.has_magic(str(path)):
            problem = "no file matches this pattern"
            found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        else:
            problem, found = "no such file or directory", [path] * path.is_file()
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}: {error.filename}.") from error
    except ValueError as error:
        raise UserError(f"{source!r}: not a valid file name ({error}).") from error
    if not found:
        raise UserError(f"{source}: {problem}.")
    return found


def read_file(path: Path, text_column: str, errors: str) -> Iterator[str]:
    """Yield the text of every row of a table (null as an empty text), or the whole text of any other file.

    Args:
        errors: of bytes that are not UTF-8: `"strict"` raises, `"replace"` replaces them by �.

    Raises:
        UserError: the file cannot be read, is not what its extension promises, or has a row without text.
    """
    if path.suffix.lower() in TABLE_ENDINGS:
        for location, row in read_rows(path, {text_column: "text_column"}, errors):
            yield get_text(row, text_column, location, errors)
    else:
        with _system_errors(path):
            yield _text_file(path, errors)


def read_rows(
    path: Path, columns: dict[str, str], errors: str, header: Sequence[str] | None = None
) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a table, each with its location, with which errors about the row begin.

    Args:
        path: a file with any other extension is read as tab-separated.
        columns: the columns to read, each with the option that names it; all columns if empty.
        header: column names of a CSV or TSV file without a header; empty if it has one, and the recipe an option `--columns`.

    Raises:
        UserError: the file cannot be read, is not what its extension promises, or lacks a column.
    """
    if header and path.suffix.lower() in (".json", ".jsonl", ".parquet"):
        raise UserError(f"{path} has its own column names: leave out --columns.")
    with _system_errors(path):
        match path.suffix.lower():
            case ".json":
                yield from _check_rows(_json_rows(path, errors), columns)
            case ".jsonl":
                yield from _check_rows(_jsonl_rows(path, columns, errors), columns)
            case ".parquet":
                yield from _parquet_rows(path, columns, errors)
            case _:
                yield from _separated_rows(path, columns, errors, header)


def read_lines(path: Path | str, errors: str) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a file, or of standard input if the path is "-"; `UserError` if one is not UTF-8."""
    with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, _decoded(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, path, number, errors)


def check_file(path: Path, text_column: str, errors: str) -> None:
    """Check the beginning of a file, with the errors of `read_file`."""
    if path.suffix.lower() in TABLE_ENDINGS:
        next(read_file(path, text_column, errors), None)
    else:
        with _system_errors(path):
            _text_file(path, errors, HEAD)


def digest_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    with _system_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def get_text(row: Row, text_column: str, location: str, errors: str = "strict") -> str:
    """The text of a row, empty if it is null.

    Raises:
        UserError: it is not a text, or not valid Unicode. The message begins with the location of the row.
    """
    text = row[text_column]
    if not isinstance(text, str | None):
        raise UserError(f"{location} has no text under {text_column!r} but {type(text).__name__}: it must be a text.")
    if text is None or text.isascii():
        return text or ""
    if errors != "strict":
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", errors)
    try:  # JSON can contain half of a surrogate pair, UTF-8 cannot
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{location} has half of a character ({error}): correct it, or set --encoding_errors replace."
        ) from error
    return text


def number_rows(rows: Iterable[Any], location: str) -> Iterator[tuple[str, Any]]:
    """Yield rows with their locations, from row 1."""
    return ((f"{location} {number}", row) for number, row in enumerate(rows, start=1))


def refuse_empty(locations: list[str], field: str) -> None:
    """Raise `UserError` if there are rows in which `field` is empty."""
    if locations:
        others = f", and so have {len(locations) - 1:,} more rows: leave them" if len(locations) > 1 else ": leave this row"
        raise UserError(f"{locations[0]} has an empty {field}{others} out.")


def check_columns(location: str, columns: dict[str, str], existing: Iterable[str], advice: str = "") -> None:
    """Raise `UserError` if one of the columns, each given with the option that names it, does not exist."""
    for column, option in columns.items():
        if column not in existing:
            names = ", ".join(map(str, existing)) or "nothing"
            raise UserError(f"{location} has no {column!r}; it has {names:.200}. Set --{option}{advice}.")


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}.") from error


def _text_file(path: Path, errors: str, num_bytes: int = -1) -> str:
    """The text of a file, or of the lines in its first bytes."""
    if path.stat().st_size > LONGEST_DOCUMENT:
        raise UserError(f"{path}: a document may have at most 2 GB: split the file.")
    with open(path, "rb") as file:
        data = file.read(num_bytes)
    if len(data) == num_bytes:
        data = data[: data.rfind(b"\n") + 1]  # it may end inside a character
    return _decoded(data, path, 1, errors).removeprefix("\ufeff")


def _json_rows(path: Path, errors: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(_text_file(path, errors))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): it must be a list of objects, or be named .jsonl.") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} is not a list but {type(rows).__name__}: it must be a list of objects.")
    yield from number_rows(rows, f"{path}: row")


def _jsonl_rows(path: Path, columns: dict[str, str], errors: str) -> Iterator[tuple[str, Any]]:
    for number, line in read_lines(path, errors):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not JSON ({error}): {_expect_object(columns)}.") from error
        yield f"{path}: line {number}", row


def _check_rows(rows: Iterable[tuple[str, Any]], columns: dict[str, str]) -> Iterator[tuple[str, Row]]:
    for location, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{location} is not an object but {type(row).__name__}: {_expect_object(columns)}.")
        check_columns(location, columns, row)
        yield location, row


def _expect_object(columns: dict[str, str]) -> str:
    example = ", ".join(f'"{column}": "..."' for column in columns or ("name",))
    return f"it must look like {{{example}}}"


def _separated_rows(path: Path, columns: dict[str, str], errors: str, names: Sequence[str] | None) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(LONGEST_DOCUMENT)  # the default is 131,072 characters
    is_csv = path.suffix.lower() == ".csv"  # in TSV, quotes have no special meaning
    lines = (line for _, line in read_lines(path, errors))
    options: Any = {"strict": True} if is_csv else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(lines, **options)
    try:
        header = names or next(reader, [])
        advice = ", or, if these are not names but the first row, pass the names of the columns with --columns"
        check_columns(f"{path}", columns, header, advice if names == [] else "")
        if repeated := [column for column in columns if list(header).count(column) > 1]:
            raise UserError(f"{path} has two columns {repeated[0]!r}: give each its own name.")
        for row in filter(None, reader):
            if len(row) != len(header):
                remedy = "texts with commas in quotes" if is_csv else "texts with tabs in a .csv file, in quotes"
                raise UserError(
                    f"{path}: line {reader.line_num} has {len(row)} columns, the header has {len(header)}: put {remedy}."
                )
            if row == names:
                raise UserError(f"{path}: line {reader.line_num} has the names of the columns: leave out --columns.")
            yield f"{path}: line {reader.line_num}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} is not CSV ({error}).") from error


def _parquet_rows(path: Path, columns: dict[str, str], errors: str) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            check_columns(f"{path}", columns, file.schema_arrow.names)
            names = list(columns) or file.schema_arrow.names
            for batch in file.iter_batches(batch_size=100, columns=names):
                for values in zip(*(batch.column(name) for name in names), strict=True):
                    number += 1
                    cells = (_cell(value, path, number, errors) for value in values)
                    yield f"{path}: row {number}", dict(zip(names, cells, strict=True))
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a Parquet file, or a corrupt one ({error}).") from error
    except (ValueError, OverflowError, LookupError) as error:  # invalid texts or times, or two columns of one name
        raise UserError(f"{path}: row {number} cannot be read ({one_line(error)}).") from error


def _cell(value: Any, path: Path, number: int, errors: str) -> Any:
    if not value.is_valid or not isinstance(value, pa.StringScalar | pa.LargeStringScalar | pa.StringViewScalar):
        return value.as_py()
    return _decoded(value.as_buffer(), path, number, errors, "row")


def _decoded(data: Any, path: Path | str, first: int, errors: str, unit: str = "line") -> str:
    """Decode bytes that begin with line `first` of the file, or are row `first`."""
    if unit == "line" and b"\0" in data:
        raise UserError(f"{path}: a binary file; ScratchGPT reads UTF-8 text.")
    try:
        return str(data, "utf-8", errors)
    except UnicodeDecodeError as error:
        number = first + (error.object.count(b"\n", 0, error.start) if unit == "line" else 0)
        start = error.start - (error.object.rfind(b"\n", 0, error.start) + 1 if unit == "line" else 0)
        raise UserError(
            f"{path}: not UTF-8 text (byte {start} of {unit} {number} is {error.object[error.start]:#x}): save it as "
            "UTF-8, or set --encoding_errors replace."
        ) from error
