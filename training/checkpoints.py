"""Folders that a run leaves behind: new when it starts, whole when it ends."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.arguments import UserError


def check_output_folder(folder: Path) -> None:
    """Refuse a folder that holds something, so that no result is ever written over.

    Raises:
        UserError: the folder is not empty, is not a folder, or cannot be written.
    """
    try:
        str(folder).encode()
        in_use = folder.is_dir() and any(folder.iterdir())
        if not in_use:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            folder.rmdir()  # it comes back with the first result
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--output_dir {folder!s:.200} cannot be written ({reason}): give the name of a new folder.") from error
    if in_use:
        if (folder / "config.json").exists():
            what = "a finished model"
        elif (folder / "metrics.jsonl").exists():
            what = "a run that did not finish"
        else:
            what = "files"
        raise UserError(f"--output_dir {folder} already holds {what}: pass another --output_dir, or move that folder away.")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when all of them are written, and vanish when one fails."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        yield temporary
        # config.json is what makes a folder a model: it comes last.
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
