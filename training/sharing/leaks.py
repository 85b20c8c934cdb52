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

ESCAPE = rb"(?<=\\[nrtbf])|(?<=\\u[0-9a-fA-F]{4})|(?<=%[0-9A-Fa-f]{2})"  # of JSON or of an address: a word may follow
TOKENS = (  # of the Hub, OpenAI and others with its protocol, Stripe, GitHub, GitLab, npm, PyPI, AWS, Slack, Google
    *(rb"hf_[A-Za-z0-9]{30,}", rb"sk-(?=[\w-]{0,99}[0-9])(?=[\w-]{0,99}[A-Z])[\w-]{20,}", rb"sk-(?:\w+-){0,3}[0-9a-f]{32}"),
    *(rb"[sr]k_live_\w{20,}", rb"gh[pousr]_\w{30,}", rb"github_pat_\w{30,}", rb"glpat-[\w-]{20,}", rb"npm_\w{36}"),
    *(rb"pypi-AgE[\w-]{50,}", rb"A(?:KI|SI)A[0-9A-Z]{16}\b", rb"xox[abepr]-[\w-]{10,}", rb"AIza[\w-]{35}"),
    rb"GOCSPX-[\w-]{20,}",
)
SECRET = re.compile(rb"(?:(?<![A-Za-z0-9])|%b)(?:%b)|-----BEGIN [A-Z ]*PRIVATE KEY" % (ESCAPE, b"|".join(TOKENS)))
REVOKE = "remove and revoke it"
SECRET_NAMES = re.compile("(TOKEN|KEY|SECRET|PASSWORD)$")


def check_leaks(files: Files) -> None:
    """Refuse files that contain a token, a key, or a path of this machine.

    Raises:
        UserError: a file contains one; its content is not repeated.
    """
    variables = {name: value for name, value in os.environ.items() if SECRET_NAMES.search(name) and len(value) >= 8}
    remedy = f"{REVOKE}, or unset the variable if it is no secret"
    own = {f"the value of ${name}": (value, remedy) for name, value in variables.items()}
    own |= {"your token of the Hub": (token, REVOKE)} if (token := get_token()) else {}
    patterns = [(SECRET, "what looks like a token or a key", REVOKE)]
    patterns += [(re.compile(re.escape(it)), kind, remedy) for kind, (value, remedy) in own.items() for it in _encodings(value)]
    paths = [_path_pattern(it, path) for path in _local_paths(files) for it in _encodings(path)]
    patterns += [(pattern, "a path of this machine", "remove it") for pattern in paths]
    for name, file in files.items():
        content = file if isinstance(file, bytes) else _read_content(file)
        for pattern, kind, remedy in patterns:
            if found := pattern.search(content):
                line = content.count(b"\n", 0, found.start()) + 1
                raise UserError(f"{name} contains {kind}, in line {line}; nothing was uploaded: {remedy}.")


def _local_paths(files: Files) -> set[str]:
    """The home, the working directory and the parent of the model directory, with and without symlinks resolved."""
    parents = {path.parent.parent for it in files.values() if isinstance(it, Path) for path in (it.absolute(), it.resolve())}
    return {str(path) for path in (Path.home(), Path.cwd(), *parents)} - {os.sep}


def _path_pattern(encoded: bytes, path: str) -> re.Pattern[bytes]:
    """A pattern for a path: `/home/ann` is not in `/home/anna`; of `/root` or `/app` only paths below count, that begin so."""
    if len(Path(path).parts) == 2:
        return re.compile(rb"(?:(?<![\w.~])|%b)%b[/\\]\w" % (ESCAPE, re.escape(encoded)))
    return re.compile(re.escape(encoded) + rb"(?![\w.-])")


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
