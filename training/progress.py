"""Progress bars on a terminal and in notebooks; a line every ten seconds where the output is a file."""

import sys
from contextlib import suppress
from typing import Any

from tqdm.auto import tqdm

SECONDS = 10.0  # between two lines in a file
LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_fmt}{postfix}, {remaining} left"


class _Lines:
    """A text stream that gets whole lines, without the control characters of a bar; if it is closed, they are lost."""

    def __init__(self, stream: Any):
        self.stream, self.encoding = stream, getattr(stream, "encoding", None)

    def write(self, text: str) -> None:
        if shown := text.replace("\x1b[A", "").strip("\r\n "):
            with suppress(OSError):
                self.stream.write(shown + "\n")

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


def is_interactive() -> bool:
    """True if a bar can be redrawn: on a terminal or in a notebook."""
    return (sys.stderr is not None and sys.stderr.isatty()) or any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)


def bar_options(hidden: bool = False) -> dict[str, Any]:
    """Arguments for tqdm; without `disable` if it is shown, so that the variable `TQDM_DISABLE` counts."""
    if hidden or sys.stderr is None:
        return {"disable": True}
    if is_interactive():
        return {}
    return {"file": _Lines(sys.stderr), "bar_format": LINE, "mininterval": SECONDS, "delay": SECONDS}
