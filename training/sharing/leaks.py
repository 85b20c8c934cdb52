"""Refuse to upload secrets, and paths that describe this machine.

An error names the file and does not repeat the secret.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import get_token

from training.errors import UserError

Files = Mapping[str, Path | bytes]  # name in the repository -> local file, or content

# A token starts a word, or follows an escape sequence of JSON.
SECRET = re.compile(
    rb"(?:(?<![A-Za-z0-9])|(?<=\\[nrtbf])|(?<=\\u[0-9a-fA-F]{4}))(?:hf_[A-Za-z0-9]{30,}|sk-[\w-]{20,}|gh[pousr]_\w{30,}|github_pat_\w{30,}"
    rb"|AKIA[0-9A-Z]{16}\b|xox[abpr]-[\w-]{10,}|AIza[\w-]{35})|-----BEGIN [A-Z ]*PRIVATE KEY"
)
SECRET_NAMES = re.compile("(TOKEN|KEY|SECRET|PASSWORD)$")


def check_leaks(files: Files) -> None:
    """Refuse files that contain a token, a key, or a path of this machine.

    Raises:
        UserError: a file contains one; its content is not repeated.
    """
    own = [value for name, value in os.environ.items() if SECRET_NAMES.search(name) and len(value) >= 8]
    secrets = [SECRET, *(re.compile(re.escape(it)) for value in (*own, get_token() or "") if value for it in _encodings(value))]
    paths = [re.compile(re.escape(it) + _path_end(path)) for path in _local_paths(files) for it in _encodings(path)]
    for name, file in files.items():
        content = file if isinstance(file, bytes) else _read_content(file)
        if any(secret.search(content) for secret in secrets):
            raise UserError(f"{name} contains what looks like a token or a key; nothing was uploaded: remove and revoke it.")
        if any(path.search(content) for path in paths):
            raise UserError(f"{name} contains a path of this machine; nothing was uploaded: remove it.")


def _local_paths(files: Files) -> set[str]:
    """The home, the working directory and the parent of the model directory, with and without symlinks resolved."""
    parents = {path.parent.parent for it in files.values() if isinstance(it, Path) for path in (it.absolute(), it.resolve())}
    return {str(path) for path in (Path.home(), Path.cwd(), *parents)} - {os.sep}


def _path_end(path: str) -> bytes:
    """A pattern for the end of a path: `/home/ann` is not in `/home/anna`, and of `/root` or `/app` only paths below count."""
    return rb"[/\\]\w" if len(Path(path).parts) == 2 else rb"(?![\w.-])"


def _encodings(text: str) -> Iterator[bytes]:
    """A text as plain bytes, and as JSON and YAML escape it."""
    yield os.fsencode(text)
    yield json.dumps(text)[1:-1].encode()
    yield json.dumps(text, ensure_ascii=False)[1:-1].encode(errors="surrogateescape")


def _read_content(path: Path) -> bytes:
    """Read a file; of safetensors weights the header only, as the rest is numbers."""
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            return file.read(min(100_000_000, int.from_bytes(file.read(8), "little")))
        return file.read()
