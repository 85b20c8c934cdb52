"""Atomic writes, with writers that are killed, that fail, and that run at the same time."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modeling_scratchgpt import atomic
from modeling_scratchgpt.atomic import atomic_directory, atomic_file, remove_abandoned

WRITER = """
import sys, time
from pathlib import Path
from atomic import atomic_directory, atomic_file

kind, path = sys.argv[1], Path(sys.argv[2])
with (atomic_file if kind == "file" else atomic_directory)(path) as temporary:
    (temporary if kind == "file" else temporary / "config.json").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_killed_writer_changes_nothing(kind, exists, tmp_path):
    path = tmp_path / "result"
    config = path if kind == "file" else path / "config.json"
    if exists:
        config.parent.mkdir(exist_ok=True)
        config.write_text("old")
    process = subprocess.Popen(  # in the directory of atomic.py, which needs nothing else of the package
        [sys.executable, "-c", WRITER, kind, path], cwd=Path(atomic.__file__).parent, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.communicate()
    assert config.read_text() == "old" if exists else not path.exists()
    parent = path if kind == "directory" and exists else tmp_path
    assert len(list(parent.glob(".writing-*"))) == 1
    remove_abandoned(parent)
    assert [entry.name for entry in parent.iterdir()] == ([config.name] if exists else [])


@pytest.mark.parametrize("write", [atomic_file, atomic_directory])
def test_an_error_deletes_the_temporary(write, tmp_path):
    def fail() -> None:
        with write(tmp_path / "result") as temporary:
            (temporary if write is atomic_file else temporary / "part").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())


def test_disks_without_modes_or_that_cannot_sync_directories(tmp_path, monkeypatch):
    """As those of Windows in WSL, and folders that virtual machines share; an error of a file counts."""
    fsync, problem = os.fsync, errno.EINVAL

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or problem == errno.EIO:
            raise OSError(problem, os.strerror(problem))
        fsync(descriptor)

    def refuse(*_) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "chmod", refuse)
    with atomic_directory(tmp_path / "result") as temporary:
        (temporary / "file").write_text("whole")
    with atomic_file(tmp_path / "result" / "file") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "result" / "file").read_text() == "new"
    problem = errno.EIO
    with pytest.raises(OSError, match="Input/output error"), atomic_file(tmp_path / "result" / "file") as temporary:
        temporary.write_text("lost")
    assert (tmp_path / "result" / "file").read_text() == "new"


def test_an_existing_directory_keeps_its_other_files_and_gets_config_json_last(tmp_path, monkeypatch):
    result = tmp_path / "result"
    for name, text in {"notes.txt": "mine", "config.json": "old", "code/old.py": "old"}.items():
        (result / name).parent.mkdir(parents=True, exist_ok=True)
        (result / name).write_text(text)
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (moved.append(Path(target).name), replace(source, target)))
    with atomic_directory(result) as temporary:
        (temporary / "code").mkdir()
        for name in ("config.json", "weights", "code/new.py"):
            (temporary / name).write_text("new")
    assert sorted(moved) == ["code", "config.json", "weights"]
    assert moved[-1] == "config.json"
    files = {str(path.relative_to(result)): path.read_text() for path in result.rglob("*") if path.is_file()}
    assert files == {"notes.txt": "mine", "config.json": "new", "weights": "new", "code/new.py": "new"}


@pytest.mark.parametrize("write", [atomic_file, atomic_directory])
def test_two_writers_at_once_have_their_own_temporaries(write, tmp_path):
    result = tmp_path / "result"
    if write is atomic_directory:
        result.mkdir()
    with write(result) as first, write(result) as second:
        assert first != second
        for temporary, text in ((first, "first"), (second, "second")):
            (temporary if write is atomic_file else temporary / "text").write_text(text)
    assert (result if write is atomic_file else result / "text").read_text() == "first"


@pytest.mark.parametrize(("umask", "file_mode", "directory_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_the_mode_follows_the_umask(umask, file_mode, directory_mode, tmp_path):
    """Also that of weights: safetensors creates files that only their owner can read."""
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "file") as temporary:
            save_file({"weight": torch.zeros(1)}, temporary)
        with atomic_directory(tmp_path / "directory") as temporary:
            for path in (temporary / "weights", temporary / "onnx" / "weights"):
                path.parent.mkdir(exist_ok=True)
                save_file({"weight": torch.zeros(1)}, path)
    finally:
        os.umask(before)
    files = [tmp_path / "file", tmp_path / "directory" / "weights", tmp_path / "directory" / "onnx" / "weights"]
    assert {path.stat().st_mode & 0o777 for path in files} == {file_mode}
    assert {path.parent.stat().st_mode & 0o777 for path in files[1:]} == {directory_mode}
