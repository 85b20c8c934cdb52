"""The encoding of text files."""

import codecs
from typing import Any, NamedTuple

from training.cli import option
from training.errors import UserError


class Encoding(NamedTuple):
    """The codec of a text, and "strict" or "replace" for bytes that it does not know."""

    name: str = "utf-8"
    errors: str = "strict"


def encoding_option() -> Any:
    return option("utf-8", "encoding of text, JSON, .csv and .tsv files, such as latin-1; UTF-16 with its mark is recognized")


def encoding_errors_option() -> Any:
    return option("strict", "bytes that are not text: strict (an error) or replace", choices=["strict", "replace"])


def encoding_of(arguments: Any) -> Encoding:
    """The encoding that the options name; `UserError` if Python does not know it."""
    try:
        "".encode(arguments.encoding)
    except LookupError as error:
        raise UserError(f"--encoding {arguments.encoding}: {error}; such as utf-8, latin-1, cp1252 or utf-16.") from error
    name = codecs.lookup(arguments.encoding).name
    return Encoding("utf-8" if name == "utf-8-sig" else name, arguments.encoding_errors)
