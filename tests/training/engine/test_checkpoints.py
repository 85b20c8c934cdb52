import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM
from tests.training.conftest import ROOT
from training.engine import checkpoints
from training.engine.checkpoints import (
    GracefulShutdown,
    atomic_directory,
    check_output_folder,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from training.engine.optimizers import make_optimizers, make_schedules
from training.errors import UserError


def test_new_and_empty_folders_are_fine(tmp_path):
    check_output_folder(tmp_path / "new" / "deep")
    (tmp_path / "empty").mkdir()
    check_output_folder(tmp_path / "empty")


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("config.json", "a finished model: pass another --output_dir"),
        ("metrics.jsonl", "a run that did not finish: go on with it by --resume, or pass another --output_dir"),
        ("notes.txt", "files: pass another --output_dir"),
    ],
)
def test_a_folder_in_use_says_what_is_there_and_what_to_pass(tmp_path, file, what):
    (tmp_path / file).write_text("kept")
    with pytest.raises(UserError, match=f"already holds {what}"):
        check_output_folder(tmp_path)
    assert (tmp_path / file).read_text() == "kept"


def test_only_an_unfinished_run_can_go_on(tmp_path):
    check_output_folder(tmp_path / "new", resume=True)
    (tmp_path / "metrics.jsonl").write_text("")
    check_output_folder(tmp_path, resume=True)
    (tmp_path / "config.json").write_text("")
    with pytest.raises(UserError, match="a finished model"):
        check_output_folder(tmp_path, resume=True)


def test_a_system_without_posix_locks(tmp_path):
    """As Windows is; there a folder is anybody's. (What instruct.py uses asks for other locks on Windows, not for these.)"""
    program = f"""import pathlib, sys
sys.modules["fcntl"] = None
import training.classify, training.evaluate, training.plan, training.pretrain
from training.engine.checkpoints import check_output_folder, locked
path = pathlib.Path({str(tmp_path)!r}, "metrics.jsonl")
first = locked(path, "x+b")
locked(path).close()
check_output_folder(path.parent, resume=True)
"""
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written .*: give the name of a new folder"):
        check_output_folder(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        check_output_folder(tmp_path / "new")


def test_a_disk_that_may_only_be_read_is_named(mount):
    folder = mount("size=64k")
    (folder / "metrics.jsonl").write_text("")
    mount("ro")
    for name, resume in (("new", False), ("", True)):
        with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\): give the name of a new folder"):
            check_output_folder(folder / name, resume)


def test_all_files_appear_or_none(tmp_path):
    folder = tmp_path / "model"
    with atomic_directory(folder) as temporary:
        (temporary / "config.json").write_text("{}")
        (temporary / "weights").write_text("1")
        assert [path for path in folder.iterdir() if path != temporary] == []
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "weights"]

    def fail():
        with atomic_directory(tmp_path / "other") as temporary:
            (temporary / "config.json").write_text("{}")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert list((tmp_path / "other").iterdir()) == []


class Run:
    """A little training run, a pure function of its steps."""

    def __init__(self, config: ScratchGPTConfig, optimizer: str):
        torch.manual_seed(0)
        self.model = ScratchGPTForCausalLM(config).train()
        self.optimizers = make_optimizers(self.model, optimizer, 1e-2, 0.02, 0.1)
        self.schedules = make_schedules(self.optimizers, "cosine", 2, 10, 0.1, 0.2)
        self.done = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.done += 1
            ids = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(self.done))
            self.model(ids, labels=ids).loss.backward()
            for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    def save(self, folder: Path, validation_loss: float = 1.0, keep: int = 2) -> None:
        schedules = [schedule.state_dict() for schedule in self.schedules]
        state = {"step": self.done, "validation_loss": validation_loss, "schedules": schedules}
        save_checkpoint(folder, Accelerator(), self.model, self.optimizers, state, keep)

    def load(self, path: Path, state: dict) -> None:
        load_checkpoint(path, state, self.model, self.optimizers)
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        self.done = state["step"]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert [name for name in one.keys() | two.keys() if not torch.equal(one[name], two[name])] == []


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_run_goes_on_bit_by_bit(tiny_config, tmp_path, optimizer, tied):
    config = ScratchGPTConfig(**{**tiny_config.to_dict(), "tie_word_embeddings": tied})
    straight = Run(config, optimizer)
    straight.train(9)
    interrupted = Run(config, optimizer)
    interrupted.train(4)
    interrupted.save(tmp_path)
    interrupted.train(5)
    assert_equal(interrupted.weights(), straight.weights())  # saving changes nothing
    resumed = Run(config, optimizer)
    resumed.load(*find_checkpoint(tmp_path, print))
    resumed.train(5)
    assert_equal(resumed.weights(), straight.weights())


def test_the_last_ones_and_the_best_are_kept(tiny_config, tmp_path):
    run = Run(tiny_config, "adamw")
    for loss in (5.0, 3.0, 4.0, 4.5, 4.2):
        run.train(1)
        run.save(tmp_path, loss)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004", "step-00000005"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "missing"])
def test_a_damaged_checkpoint_is_passed_over(tiny_config, tmp_path, file, damage):
    run = Run(tiny_config, "muon")
    run.train(1)
    run.save(tmp_path)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002")
    path = tmp_path / "step-00000002" / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes({"flipped": content, "truncated": content[: len(content) // 2], "empty": b""}[damage])
    said = []
    path, state = find_checkpoint(tmp_path, said.append)
    assert path.name == "step-00000001"
    assert state["step"] == 1
    assert len(said) == 1
    assert "step-00000002 is damaged" in said[0]
    run.train(1)
    run.save(tmp_path)  # the run comes by the damaged one again, and takes its place
    path, state = find_checkpoint(tmp_path, said.append)
    assert (path.name, state["step"], len(said)) == ("step-00000002", 2, 1)
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)
    assert find_checkpoint(tmp_path, said.append) is None


def test_a_full_disk_leaves_the_checkpoint_before(tiny_config, tmp_path, monkeypatch):
    run = Run(tiny_config, "adamw")
    run.train(1)
    run.save(tmp_path)

    def full(*_):
        raise checkpoints.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    run.train(1)
    with pytest.raises(UserError, match=r"cannot be written .*No space left.*: make room there, then go on with --resume"):
        run.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert find_checkpoint(tmp_path, print)[1]["step"] == 1


def test_what_a_killed_run_was_writing_is_cleaned_up(tiny_config, tmp_path):
    (tmp_path / ".writing-abc").mkdir()
    (tmp_path / ".writing-abc" / "model.safetensors").write_text("half")
    run = Run(tiny_config, "adamw")
    run.train(1)
    run.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_signals_ask_for_a_stop():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with GracefulShutdown(Accelerator()) as stop:
            assert not stop.requested()
            os.kill(os.getpid(), number)
            assert stop.requested()
            with pytest.raises(KeyboardInterrupt):  # a second Ctrl-C means it
                os.kill(os.getpid(), signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
