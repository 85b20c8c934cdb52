"""The conversion command, run in this process."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from modeling_scratchgpt.convert import __main__ as command


@pytest.fixture
def convert(monkeypatch, capsys) -> Callable[..., str]:
    """Runs the command, which must not write to stderr, and returns what it prints."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
        capsys.readouterr()
        command.main()
        output, errors = capsys.readouterr()
        assert not errors
        return output

    return run


@pytest.fixture
def refused(convert, capsys) -> Callable[..., str]:
    """Runs the command, which must fail with a message of one line and write nothing, and returns the message."""

    def run(source: Path | str, destination: Path, *words: object) -> str:
        before = {path: path.stat().st_mtime_ns for path in destination.parent.rglob("*")}
        capsys.readouterr()
        with pytest.raises(SystemExit, match="^2$"):
            convert(source, destination, *words)
        assert {path: path.stat().st_mtime_ns for path in destination.parent.rglob("*")} == before
        message = capsys.readouterr().err
        assert message.count("\n") == 1, message
        return message

    return run
