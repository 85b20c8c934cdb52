"""Texts from elsewhere in Markdown: shown verbatim, so that nothing in them is markup."""

import re
from collections.abc import Iterable

from training.errors import printable

MAX_TEXT = 500  # characters of a text


def plain(text: str, max_length: int) -> str:
    """A text as one line of at most `max_length` characters, without control characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= max_length else f"{line[:max_length]}..."


def code(text: str, max_length: int = MAX_TEXT) -> str:
    """A text as inline code."""
    text = plain(text, max_length)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def block(text: str, language: str = "text") -> str:
    """A text as a code block, with a fence longer than any in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def cell(text: str) -> str:
    """A text as inline code in a cell of a table."""
    return code(text.replace("|", "\\|"))


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """A table from its first line and the cells of the others, all of which are Markdown."""
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)])
