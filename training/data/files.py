"""Files of texts: plain text, and tables (JSON, JSON lines, CSV, TSV and Parquet), which are read row by row.

Notable:
- Rows are read one by one here and not by `datasets`' own loaders: those guess types, take a missing column and the text "NA"
  for nothing, and cannot say which line is wrong.
- Every mistake in a file is a `UserError` that names the file, the line or row, what is wrong with it and what to do.
- Text is UTF-8. A mark of byte order at its beginning is no part of it.
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
HEAD = 2**20  # bytes of a text file that are looked at before long work
LONGEST_DOCUMENT = 2**31 - 2  # bytes; Arrow counts them with 32 bits


def find_files(source: str, endings: tuple[str, ...] = FILE_ENDINGS) -> list[Path]:
    """The file itself, what the glob matches, or all files below the folder with one of these endings; sorted."""

    def fail(error: OSError) -> None:
        raise error

    try:
        path = Path(os.path.expanduser(source))
        str(path).encode()
        if path.is_dir():
            names = (Path(folder) / file for folder, _, files in os.walk(path, onerror=fail) for file in files)
            found = sorted(name for name in names if name.suffix.lower() in endings and name.is_file())
            if not found:
                raise UserError(f"{source}: there is no {', '.join(endings)} file in this folder.")
            return found
        if not path.exists() and glob.has_magic(str(path)):
            found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
            if not found:
                raise UserError(f"{source}: no file here matches this pattern.")
            return found
        if not path.is_file():
            raise UserError(f"{source}: no such file or folder.")
        return [path]
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}: {error.filename}.") from error
    except ValueError as error:
        raise UserError(f"{source!r}: this is no name of a file ({error}).") from error


def read_file(path: Path, text_column: str, errors: str) -> Iterator[str]:
    """The text of every row, or of the whole file where its ending is that of no table; a row that says null is blank.

    Args:
        text_column: the column, or the JSON key, that holds the text.
        errors: `"strict"` refuses what is not UTF-8, `"replace"` puts � in its place.

    Raises:
        UserError: the file cannot be read, is not what its ending says, or has a row without text.
    """
    if path.suffix.lower() in TABLE_ENDINGS:
        for place, row in read_rows(path, {text_column: "text_column"}, errors):
            yield get_text(row, text_column, place, errors)
    else:
        with _system_errors(path):
            yield _text_file(path, errors)


def read_rows(
    path: Path, columns: dict[str, str], errors: str, header: Sequence[str] | None = None
) -> Iterator[tuple[str, Row]]:
    """The rows of a table, each with its place, which an error about it says first.

    Args:
        path: a file whose ending is that of no table is taken for tab-separated.
        columns: those to read, and of each the option that names it; with none, whatever a row holds.
        errors: as in `read_file`.
        header: names of the columns of a CSV or TSV file that begins without them; none where `--columns` could give them.

    Raises:
        UserError: the file cannot be read, is not what its ending says, or lacks a column.
    """
    if header and path.suffix.lower() in (".json", ".jsonl", ".parquet"):
        raise UserError(f"{path} names its own columns: leave out --columns.")
    with _system_errors(path):
        match path.suffix.lower():
            case ".json":
                yield from _json_rows(path, columns, errors)
            case ".jsonl":
                yield from _jsonl_rows(path, columns, errors)
            case ".parquet":
                yield from _parquet_rows(path, columns, errors)
            case _:
                yield from _separated_rows(path, columns, errors, header)


def read_lines(path: Path | str, errors: str) -> Iterator[tuple[int, str]]:
    """The numbered lines of a file, or of standard input where the path is "-".

    Raises:
        UserError: they are not UTF-8.
    """
    with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, _decoded(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, path, number, errors)


def check_file(path: Path, text_column: str, errors: str) -> None:
    """Refuse what the beginning of a file shows to be wrong.

    Raises:
        UserError: as `read_file`.
    """
    with _system_errors(path):
        if path.suffix.lower() in TABLE_ENDINGS:
            next(read_file(path, text_column, errors), None)
        else:
            _check_text_file(path, errors)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with _system_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def get_text(row: Row, text_column: str, place: str, errors: str = "strict") -> str:
    """The text of a row; `place` is what an error says first."""
    text = row[text_column]
    if not isinstance(text, str | None):
        raise UserError(f"{place} has no text under {text_column!r} but {type(text).__name__}: it must be a text.")
    if text is None or text.isascii():
        return text or ""
    if errors != "strict":
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", errors)
    try:  # JSON can spell half of a character, text cannot hold it
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place} holds half of a character ({error}): mend it, or set --encoding_errors replace.") from error
    return text


def refuse_empty(places: list[str], what: str) -> None:
    """Refuse rows in which `what` is empty, naming the first of their places."""
    if places:
        others = f", and so have {len(places) - 1:,} more of its rows: leave them" if len(places) > 1 else ": leave this row"
        raise UserError(f"{places[0]} has an empty {what}{others} out.")


def check_columns(place: str, columns: dict[str, str], there: Iterable[str], advice: str = "") -> None:
    """Refuse what lacks one of the columns, which are given with the option that names each."""
    for column, option in columns.items():
        if column not in there:
            names = ", ".join(map(str, there)) or "nothing"
            raise UserError(f"{place} has no {column!r}; it has {names:.200}. Set --{option}{advice}.")


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}.") from error


def _text_file(path: Path, errors: str) -> str:
    _check_text_file(path, errors)
    return _decoded(path.read_bytes().removeprefix(codecs.BOM_UTF8), path, 1, errors)


def _check_text_file(path: Path, errors: str) -> None:
    """What can be said after a look at its beginning."""
    if path.stat().st_size > LONGEST_DOCUMENT:
        raise UserError(f"{path}: a document can have 2 GB at most: cut the file into several.")
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if len(head) == HEAD:
        head = head[: head.rfind(b"\n") + 1]  # it may end within a character
    _decoded(head, path, 1, errors)


def _json_rows(path: Path, columns: dict[str, str], errors: str) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(_text_file(path, errors))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): it must hold a list of objects, or be named .jsonl.") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} holds no list but {type(rows).__name__}: it must be a list of objects.")
    for number, row in enumerate(rows, start=1):
        place = f"{path}: row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{place} is no object but {type(row).__name__}.")
        check_columns(place, columns, row)
        yield place, row


def _jsonl_rows(path: Path, columns: dict[str, str], errors: str) -> Iterator[tuple[str, Row]]:
    like = ", ".join(f'"{column}": "..."' for column in columns or ("name",))
    for number, line in read_lines(path, errors):
        if line.isspace():
            continue
        place = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place} is not JSON ({error}): it must look like {{{like}}}.") from error
        if not isinstance(row, dict):
            raise UserError(f"{place} is no object but {type(row).__name__}: it must look like {{{like}}}.")
        check_columns(place, columns, row)
        yield place, row


def _separated_rows(path: Path, columns: dict[str, str], errors: str, names: Sequence[str] | None) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(LONGEST_DOCUMENT)  # the default is 131,072 characters
    is_csv = path.suffix.lower() == ".csv"  # in TSV, quotes are characters as any other
    lines = (line for _, line in read_lines(path, errors))
    form: Any = {"strict": True} if is_csv else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(lines, **form)
    try:
        header = names or next(reader, [])
        advice = ", or, if these are no names but the first row, name the columns by --columns" if names == [] else ""
        check_columns(f"{path}", columns, header, advice)
        if twice := [column for column in columns if list(header).count(column) > 1]:
            raise UserError(f"{path} has two columns {twice[0]!r}: give each a name of its own.")
        for row in reader:
            if row and len(row) != len(header):
                what = "commas" if is_csv else "tabs"
                raise UserError(
                    f"{path}: line {reader.line_num} has {len(row)} columns, the header has {len(header)}: put texts that hold "
                    f"{what} into {'quotes' if is_csv else 'a .csv file, in quotes'}."
                )
            if row and row == names:
                raise UserError(f"{path}: line {reader.line_num} holds the names of the columns: leave out --columns.")
            if row:
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
        raise UserError(f"{path}: this is not a Parquet file, or a damaged one ({error}).") from error
    except (ValueError, OverflowError, LookupError) as error:  # texts that are none, times that are none, two columns of a name
        raise UserError(f"{path}: row {number} cannot be read ({one_line(error)}).") from error


def _cell(value: Any, path: Path, number: int, errors: str) -> Any:
    if not value.is_valid or not isinstance(value, pa.StringScalar | pa.LargeStringScalar | pa.StringViewScalar):
        return value.as_py()
    return _decoded(value.as_buffer(), path, number, errors, "row")


def _decoded(data: Any, path: Path | str, first: int, errors: str, unit: str = "line") -> str:
    """The text of these bytes, which start with the `first` line (or are that row) of the file."""
    if unit == "line" and b"\0" in data:
        raise UserError(f"{path}: this is a binary file; ScratchGPT reads UTF-8 text.")
    try:
        return str(data, "utf-8", errors)
    except UnicodeDecodeError as error:
        number = first + (error.object.count(b"\n", 0, error.start) if unit == "line" else 0)
        start = error.start - (error.object.rfind(b"\n", 0, error.start) + 1 if unit == "line" else 0)
        raise UserError(
            f"{path}: not UTF-8 text (byte {start} of {unit} {number} is {error.object[error.start]:#x}): save it as "
            "UTF-8, or set --encoding_errors replace."
        ) from error
