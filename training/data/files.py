"""Readers of local files: plain text, and tables (JSON, JSON lines, CSV, TSV and Parquet), which are read row by row.

Notable:
- The loaders of `datasets` are not used: they guess types, read a missing column and the text "NA" as null, and cannot name the
  line of an error.
- Text is UTF-8 unless `--encoding` or a byte order mark of UTF-16 says otherwise. A byte order mark is dropped.
"""

import bz2
import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

from training.data.encoding import Encoding
from training.errors import UserError, explain_errors, one_line

JSON_LINES = (".jsonl", ".ndjson")
TABLE_ENDINGS = (*JSON_LINES, ".json", ".parquet", ".csv", ".tsv")
FILE_ENDINGS = (".txt", ".md", *TABLE_ENDINGS)
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}  # of CSV files
Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]  # each with its location, with which errors about it begin
BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}  # first, since UTF-16's begins the same
BYTE_ORDER_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8"}
LONGEST_DOCUMENT = 2**31 - 2  # bytes; Arrow's offsets have 32 bits
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"  # the first line of the file that stands for one that is not there
DAMAGED = (EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)  # of compressed files


def _zip_members(archive: zipfile.ZipFile) -> list[str]:
    """The names of the files in an archive, without the resource forks that macOS adds."""
    return [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]


def _open_zip(path: Path, mode: str = "rb") -> Any:
    archive = zipfile.ZipFile(path)
    if len(names := _zip_members(archive)) != 1:
        raise UserError(f"{path} contains {len(names)} files: unpack it, or pass an archive of one file.")
    with explain_errors(f"{path} cannot be read", RuntimeError):  # encrypted, or compressed by an unknown method
        return archive.open(names[0])


def _open_zstd(path: Path, mode: str = "rb") -> Any:
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
OPENERS |= {".zst": _open_zstd, ".zip": _open_zip}


def ending(path: Path) -> str:
    """The extension that tells the format of a file, in lower case; of a compressed file, the one before or in the archive."""
    if path.suffix.lower() == ".zip":
        with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            endings = [Path(name).suffix.lower() for name in _zip_members(archive)]
            if len(endings) == 1 and endings[0] in FILE_ENDINGS:
                return endings[0]
    return (path.with_suffix("") if path.suffix.lower() in OPENERS else path).suffix.lower()


def _walk(directory: Path, fail: Callable[[OSError], None]) -> Iterator[Path]:
    """Yield the files below a directory, also in directories that are symbolic links, but none that is hidden."""
    seen = set()
    for name, children, files in os.walk(directory, onerror=fail, followlinks=True):
        real = os.path.realpath(name)
        children[:] = [child for child in children if not child.startswith((".", "__MACOSX"))] if real not in seen else []
        if real not in seen:
            yield from (Path(name) / file for file in files if not file.startswith("."))
        seen.add(real)


def find_files(source: str, endings: tuple[str, ...] = FILE_ENDINGS) -> list[Path]:
    """Sorted: the file itself, those that match the glob, or all below the directory with these extensions; at least one."""

    def fail(error: OSError) -> None:
        raise error

    try:
        path = Path(os.path.expanduser(source))
        str(path).encode()
        if path.is_dir():
            problem = f"this directory has no {', '.join(endings)} file"
            found = sorted(file for file in _walk(path, fail) if ending(file) in endings and file.is_file())
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


def read_file(path: Path, text_column: str, encoding: Encoding, num_bytes: int = -1) -> Iterator[str]:
    """Yield the text of every row of a table (null as an empty text), or the text of any other file, or of its first bytes.

    Raises:
        UserError: the file cannot be read, is not what its extension promises, or has a row without text.
    """
    if ending(path) in TABLE_ENDINGS:
        for location, row in read_rows(path, {text_column: "text_column"}, encoding):
            yield get_text(row, text_column, location, encoding.errors)
    else:
        with _system_errors(path):
            yield _text_file(path, encoding, num_bytes)


def read_rows(path: Path, columns: dict[str, str], encoding: Encoding, header: Sequence[str] | None = None) -> Rows:
    """Yield the rows of a table. A column "meta.text" is the field `text` of the objects in the column `meta`.

    Args:
        path: a file with any other extension is read as tab-separated.
        columns: the columns to read, each with the option that names it; all columns if empty.
        header: column names of a CSV or TSV file without a header; empty if it has one, and the recipe an option `--columns`.

    Raises:
        UserError: the file cannot be read, is not what its extension promises, or lacks a column.
    """
    if header and ending(path) not in (".csv", ".tsv") and ending(path) in TABLE_ENDINGS:
        raise UserError(f"{path} has its own column names: leave out --columns.")
    with _system_errors(path):
        match ending(path):
            case ".json" | ".jsonl" | ".ndjson":
                yield from _json_rows(path, columns, encoding)
            case ".parquet":
                yield from _parquet_rows(path, columns, encoding.errors)
            case _:
                yield from _separated_rows(path, columns, encoding, header)


def read_lines(path: Path | str, encoding: Encoding) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a file, or of standard input if the path is "-"; `UserError` if one is not text."""
    with _open(path, encoding) as (file, codec), _codec_errors(path, codec):
        if codec != "utf-8":
            yield from enumerate(io.TextIOWrapper(file, codec, encoding.errors, newline="\n"), start=1)
            return
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            yield number, _decoded(line, path, number, encoding.errors)


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
        raise UserError(f"{location} has half of a character ({error}): fix it, or set --encoding_errors replace.") from error
    return text


def join_texts(row: Row, text_columns: Sequence[str], location: str, errors: str = "strict") -> str:
    """The texts of a row that are not empty, each on a line of its own; errors as in `get_text`."""
    return "\n".join(filter(str.strip, (get_text(row, column, location, errors) for column in text_columns)))


def number_rows(rows: Iterable[Any], location: str) -> Rows:
    """Yield rows with their locations, from row 1."""
    return ((f"{location} {number}", row) for number, row in enumerate(rows, start=1))


def refuse_empty(locations: list[str], field: str) -> None:
    """Raise `UserError` if there are rows in which `field` is empty."""
    if locations:
        others = f", and so have {len(locations) - 1:,} more rows: leave them" if len(locations) > 1 else ": leave this row"
        raise UserError(f"{locations[0]} has an empty {field}{others} out.")


def check_columns(location: str, columns: dict[str, str], existing: Iterable[str], advice: str = "") -> None:
    """Raise `UserError` if one of the columns, each given with the option that names it, does not exist."""
    for column, name in columns.items():
        if column not in existing:
            names = ", ".join(map(str, existing)) or "nothing"
            raise UserError(f"{location} has no {column!r}; it has {names:.200}. Set --{name}{advice}.")


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}.") from error
    except DAMAGED as error:
        raise UserError(f"{path}: a damaged {path.suffix} file ({one_line(error)}).") from error


def _codec_errors(path: Path | str, codec: str) -> AbstractContextManager[None]:
    return explain_errors(f"{path}: not {codec} text", UnicodeError, ": set --encoding or --encoding_errors replace")


def _refuse_pointer(path: Path | str) -> None:
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} is a pointer of git-LFS, not the data: run `git lfs pull` in its directory.")


@contextmanager
def _open(path: Path | str, encoding: Encoding) -> Iterator[tuple[Any, str]]:
    """Yield the decompressed content of a file, or standard input for "-", and its codec."""
    if path != "-":
        _refuse_pointer(path)
    opener = OPENERS.get(Path(path).suffix.lower(), open)
    content: Any = nullcontext(sys.stdin.buffer) if path == "-" else opener(path, "rb")
    with content as file:
        marks = (codec for mark, codec in BYTE_ORDER_MARKS.items() if file.peek(len(mark)).startswith(mark))
        yield file, next(marks, encoding.name)


def _text_file(path: Path, encoding: Encoding, num_bytes: int = -1) -> str:
    """The text of a file, or of the lines in its first bytes."""
    with _open(path, encoding) as (file, codec):
        data = file.read(num_bytes if num_bytes >= 0 else LONGEST_DOCUMENT + 1)
    if max(path.stat().st_size, len(data)) > LONGEST_DOCUMENT:
        raise UserError(f"{path}: a document may have at most 2 GB: split the file.")
    is_part = len(data) == num_bytes  # it may end inside a character
    if codec == "utf-8":
        return _decoded(data[: data.rfind(b"\n") + 1] if is_part else data, path, 1, encoding.errors).removeprefix("\ufeff")
    with _codec_errors(path, codec):
        return codecs.getincrementaldecoder(codec)(encoding.errors).decode(data, final=not is_part)


def _json_rows(path: Path, columns: dict[str, str], encoding: Encoding) -> Rows:
    """Yield the objects of a list, which only a .json file can be, or of a file with one object per line."""
    rows = _json_lines(path, columns, encoding)
    if ending(path) == ".json" and (text := _text_file(path, encoding)).lstrip().startswith("["):
        try:
            rows = number_rows(json.loads(text), f"{path}: row")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({error}): it must be a list of objects, or one object per line.") from error
    for location, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{location} is not an object but {type(row).__name__}: {_expect_object(columns)}.")
        yield location, _with_fields(row, columns, location)


def _json_lines(path: Path, columns: dict[str, str], encoding: Encoding) -> Rows:
    for number, line in read_lines(path, encoding):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not JSON ({error}): {_expect_object(columns)}.") from error
        yield f"{path}: line {number}", row


def _with_fields(row: Row, columns: dict[str, str], location: str) -> Row:
    """The row with the columns that are fields of others, such as "meta.text"; `UserError` if one does not exist."""
    for column in columns:
        value: Any = row
        for name in column.split(".") if column not in row else ():
            value = value.get(name) if isinstance(value, dict) else None
        if value is not row and value is not None:
            row = {**row, column: value}
    check_columns(location, columns, row)
    return row


def _expect_object(columns: dict[str, str]) -> str:
    example = ", ".join(f'"{column}": "..."' for column in columns or ("name",))
    return f"it must look like {{{example}}}"


def _separated_rows(path: Path, columns: dict[str, str], encoding: Encoding, names: Sequence[str] | None) -> Rows:
    csv.field_size_limit(LONGEST_DOCUMENT)  # the default is 131,072 characters
    is_csv = ending(path) == ".csv"  # in TSV, quotes have no special meaning
    lines: Iterator[str] = chain.from_iterable(_split_at_returns(line, is_csv) for _, line in read_lines(path, encoding))
    options: Any = {"strict": True} if is_csv else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    if is_csv:
        first = next(lines, "")
        lines = chain([first], lines)
        found = {mark: next(csv.reader([first], delimiter=mark), []) for mark in SEPARATORS}
        fits = {mark: len(it) == len(names) if names else columns.keys() <= {*it} for mark, it in found.items()}
        options["delimiter"] = max(found, key=lambda mark: (fits[mark], len(found[mark])))
    separators = SEPARATORS[options["delimiter"]]
    reader = csv.reader(lines, **options)
    try:
        header = names or next(reader, [])
        advice = ", or, if these are not names but the first row, pass the names of the columns with --columns"
        where = f"{path}" if separators == "commas" or not is_csv else f"{path}, separated by {separators},"
        check_columns(where, columns, header, advice if names == [] else "")
        if repeated := [column for column in columns if list(header).count(column) > 1]:
            raise UserError(f"{path} has two columns {repeated[0]!r}: give each its own name.")
        for row in filter(None, reader if is_csv else map(_unquote, reader)):
            location = f"{path}: line {reader.line_num}"
            if len(row) != len(header):
                remedy = f"texts with {separators} in quotes" if is_csv else "texts with tabs in a .csv file, in quotes"
                raise UserError(f"{location} has {len(row)} columns, the header has {len(header)}: put {remedy}.")
            if row == names:
                raise UserError(f"{location} has the names of the columns: leave out --columns.")
            yield location, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} is not CSV ({error}).") from error


def _split_at_returns(line: str, is_csv: bool) -> Iterable[str]:
    """Split a line where it has a carriage return, which ends the lines of old spreadsheets for the Mac.

    Not in TSV with other line ends, where it is part of a text: there are no quotes around it.
    """
    has_returns = "\r" in line.removesuffix("\n").removesuffix("\r") and (is_csv or not line.endswith("\n"))
    return io.StringIO(line, newline="") if has_returns else (line,)


def _unquote(cells: list[str]) -> list[str]:
    """The cells of a row of TSV, without the quotes that pandas and Excel put around a text with quotes, which they double."""
    return [text.replace('""', '"') if (text := _quoted(cell)) else cell for cell in cells]


def _quoted(cell: str) -> str:
    """The text between quotes in which all quotes, at least one, are doubled; else empty."""
    text = cell[1:-1]
    is_quoted = len(cell) > 3 and cell[0] == cell[-1] == '"' and '""' in text and '"' not in text.replace('""', "")
    return text if is_quoted else ""


def stored_features(path: Path) -> dict[str, Any]:
    """The features that `datasets` has stored in a Parquet file, among them the names of classes; empty for other files."""
    if ending(path) != ".parquet" or path.suffix.lower() in OPENERS:
        return {}
    _refuse_pointer(path)
    with _system_errors(path), explain_errors(f"{path}: not a Parquet file, or a corrupt one", (pa.ArrowException, ValueError)):
        schema = pq.read_schema(path)
        return Features.from_arrow_schema(schema) if b"huggingface" in (schema.metadata or {}) else {}


def _parquet_rows(path: Path, columns: dict[str, str], errors: str) -> Rows:
    _refuse_pointer(path)
    number = 0
    try:
        compressed = OPENERS.get(path.suffix.lower())
        source: Any = pa.BufferReader(compressed(path).read()) if compressed else path
        with pq.ParquetFile(source, memory_map=not compressed) as file:
            existing = file.schema_arrow.names
            top_level = {name if name in existing else name.split(".")[0]: source for name, source in columns.items()}
            check_columns(f"{path}", top_level, existing)
            names = list(top_level) or existing
            for batch in file.iter_batches(batch_size=100, columns=names):
                for values in zip(*(batch.column(name) for name in names), strict=True):
                    number += 1
                    cells = (_cell(value, path, number, errors) for value in values)
                    location = f"{path}: row {number}"
                    yield location, _with_fields(dict(zip(names, cells, strict=True)), columns, location)
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
        raise UserError(f"{path}: a binary file, or text in another encoding: set --encoding, such as utf-16.")
    try:
        return str(data, "utf-8", errors)
    except UnicodeDecodeError as error:
        number = first + (error.object.count(b"\n", 0, error.start) if unit == "line" else 0)
        start = error.start - (error.object.rfind(b"\n", 0, error.start) + 1 if unit == "line" else 0)
        raise UserError(
            f"{path}: not UTF-8 text (byte {start} of {unit} {number} is {error.object[error.start]:#x}): set --encoding, "
            "such as latin-1, or --encoding_errors replace."
        ) from error
