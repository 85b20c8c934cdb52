"""Atomic writes: a file or a directory appears under its name when all of it is on the disk, or not at all.

Files get the mode of the umask, whatever wrote them: safetensors creates files that only their owner can read.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".writing-"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. What is written there replaces `path` at the end; after an error it is deleted."""
    temporary = path.with_name(f"{PREFIX}{secrets.token_hex(8)}-{path.name}")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        yield temporary
        set_mode(temporary, mode)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory, which becomes `directory` at the end; after an error it is deleted.

    If `directory` exists, it keeps its other files: the new ones replace those of the same name one by one, `config.json` last,
    since transformers takes a directory with that file for a model.
    """
    exists = directory.is_dir()
    parent = directory if exists else directory.parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f"{PREFIX}{secrets.token_hex(8)}"
    temporary.mkdir()
    mode = temporary.stat().st_mode & 0o666
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            if path.is_file():
                set_mode(path, mode)
            sync(path)
        if not exists:
            os.replace(temporary, directory)
        else:
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
                if path.is_dir():  # os.replace does not replace a directory that has files in it
                    shutil.rmtree(directory / path.name, ignore_errors=True)
                os.replace(path, directory / path.name)
        sync(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_abandoned(directory: Path) -> None:
    """Delete the temporary files and directories that a killed process has left. No other process may be writing there."""
    for path in directory.glob(f"{PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def set_mode(path: Path, mode: int) -> None:
    """Change the mode of a file, except on disks that have no modes, such as those of Windows in WSL."""
    with suppress(PermissionError):
        path.chmod(mode)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a directory, has reached the disk."""
    is_windows, is_directory = os.name == "nt", path.is_dir()
    if is_windows and is_directory:  # it cannot be opened, and needs no sync
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_directory or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that cannot sync directories
            raise
    finally:
        os.close(descriptor)
