"""Errors that the user can fix, and text that is safe to print."""

import signal
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging

SMALLER_STEPS = (
    "lower --batch_size, and raise --gradient_accumulation_steps as much, lower --context_length, or pass "
    "--gradient_checkpointing"
)
# Of GPUs; of cuBLAS, when the first backward pass has filled the GPU; of CPUs; of CPUs on Windows.
OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "not enough memory")


class UserError(Exception):
    """An error that only the user can fix. The message names the value given, what is allowed, and the remedy."""


def one_line(error: Exception) -> str:
    """The message of an error, shortened to one line of 200 characters; its type if it has no message."""
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__


def printable(text: str) -> str:
    """Replace control characters, which a terminal would interpret; keep tabs and line ends."""
    shown = (character if character.isprintable() or character in "\n\t" else "�" for character in text.replace("\r\n", "\n"))
    return "".join(shown)


@contextmanager
def explain_errors(problem: str, types: Any = Exception, remedy: str = "") -> Iterator[None]:
    """Turn errors of these types (libraries raise many) into a `UserError` of one line: the problem, the error, the remedy."""
    try:
        yield
    except types as error:
        raise UserError(f"{problem} ({one_line(error)}){remedy}.") from error


def is_out_of_memory(error: Exception) -> bool:
    """True if a device is out of memory; also for messages that Accelerate's `should_reduce_batch_size` does not know."""
    return isinstance(error, MemoryError) or any(part in str(error) for part in OUT_OF_MEMORY)


@contextmanager
def explain_out_of_memory(remedy: str = SMALLER_STEPS) -> Iterator[None]:
    """Turn the errors of all devices that are out of memory into a `UserError` with a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory ({one_line(error)}): {remedy}.") from error


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this context, Ctrl-C ends the program at once, where Python would wait for a long call into other code to end."""
    is_main = threading.current_thread() is threading.main_thread()
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # in the background of a shell it is ignored
    is_changed = is_main and is_default and not hasattr(sys, "ps1")  # an interactive session, such as a notebook, must not end
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL) if is_changed else None
    try:
        yield
    finally:
        if is_changed:
            signal.signal(signal.SIGINT, previous)


@contextmanager
def quiet() -> Iterator[None]:
    """Within this context, transformers logs errors only, and shows no progress bars."""
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
