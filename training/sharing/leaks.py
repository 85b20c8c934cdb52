"""What must not leave this machine with a model: tokens and keys, and paths that tell of the machine.

Whatever is found stops everything; the file is named, and what stands in it is not repeated.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import get_token

from training.errors import UserError

Files = Mapping[str, Path | bytes]  # what is sent: files, or what stands in them

# At the start of a word, or right behind an escape of JSON.
SECRET = re.compile(
    rb"(?:(?<![A-Za-z0-9])|(?<=\\[nrtbf])|(?<=\\u[0-9a-fA-F]{4}))(?:hf_[A-Za-z0-9]{30,}|sk-[\w-]{20,}|gh[pousr]_\w{30,}|github_pat_\w{30,}"
    rb"|AKIA[0-9A-Z]{16}\b|xox[abpr]-[\w-]{10,}|AIza[\w-]{35})|-----BEGIN [A-Z ]*PRIVATE KEY"
)
SECRET_NAMES = re.compile("(TOKEN|KEY|SECRET|PASSWORD)$")
COMMON = ("/root", "/home", "/tmp")  # places that a text may name without telling of this machine


def check_leaks(files: Files) -> None:
    """Refuse what holds a token, a key, or a path of this machine.

    Raises:
        UserError: one does; it is named, and what it holds is not repeated.
    """
    own = [value for name, value in os.environ.items() if SECRET_NAMES.search(name) and len(value) >= 8]
    secrets = [SECRET, *(re.compile(re.escape(it)) for value in (*own, get_token() or "") if value for it in _spellings(value))]
    places = [re.compile(re.escape(it) + _after(place)) for place in _places(files) for it in _spellings(place)]
    for name, file in files.items():
        content = file if isinstance(file, bytes) else _text_of(file)
        if any(secret.search(content) for secret in secrets):
            raise UserError(f"{name} holds what looks like a token or a key, so nothing was sent: take it out, and renew it.")
        if any(place.search(content) for place in places):
            raise UserError(f"{name} holds a path of this machine, so nothing was sent: take it out.")


def _places(files: Files) -> set[str]:
    """Where we are at home, are called from, and where the model's folder lies; the same without links."""
    folders = {place.parent.parent for it in files.values() if isinstance(it, Path) for place in (it.absolute(), it.resolve())}
    return {str(place) for place in (Path.home(), Path.cwd(), *folders)} - {os.sep}


def _after(place: str) -> bytes:
    """What follows where a path is meant, and not the beginning of another name."""
    return rb"/\w" if place in COMMON else rb"(?![\w.-])"


def _spellings(text: str) -> Iterator[bytes]:
    """As it is, and as JSON and YAML write it."""
    yield os.fsencode(text)
    yield json.dumps(text)[1:-1].encode()
    yield json.dumps(text, ensure_ascii=False)[1:-1].encode(errors="surrogateescape")


def _text_of(path: Path) -> bytes:
    """What a file says in words: all of it, of weights the header."""
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            return file.read(min(100_000_000, int.from_bytes(file.read(8), "little")))
        return file.read()
