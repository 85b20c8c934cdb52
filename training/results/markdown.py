"""Texts of others in Markdown, so that they show as they are: none is taken for markup."""

import re

from training.errors import printable

TEXT = 500  # characters of a text in a file for people


def plain(text: str, most: int) -> str:
    """A text as one line of so many characters at most, with nothing in it that a terminal would obey."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= most else f"{line[:most]}..."


def code(text: str, most: int = TEXT) -> str:
    """A text that Markdown shows as it is."""
    text = plain(text, most)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def block(text: str, language: str = "text") -> str:
    """The same of many lines, whatever fences stand in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def cell(text: str) -> str:
    """The same in a table."""
    return code(text.replace("|", "\\|"))
