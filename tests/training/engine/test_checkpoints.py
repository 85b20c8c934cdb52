import hashlib
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM
from training.engine import checkpoints
from training.engine.arguments import EngineArguments
from training.engine.checkpoints import find_checkpoint, load_checkpoint, save_checkpoint
from training.engine.loop import GracefulShutdown
from training.engine.optimizers import build_optimizers, lr_factor, set_learning_rates
from training.errors import UserError


class Run:
    """A short training run, a pure function of its steps."""

    def __init__(self, config: ScratchGPTConfig, optimizer: str):
        torch.manual_seed(0)
        self.model = ScratchGPTForCausalLM(config).train()
        arguments = EngineArguments(optimizer=optimizer, learning_rate=1e-2, max_steps=10, warmup_ratio=0.2)
        self.arguments, self.optimizers = arguments, build_optimizers(arguments, self.model)
        self.done = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.done += 1
            ids = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(self.done))
            self.model(ids, labels=ids).loss.backward()
            set_learning_rates(self.optimizers, lr_factor(self.done - 1, self.arguments))
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()

    def save(self, folder: Path, eval_loss: float = 1.0, limit: int = 2) -> None:
        state = {"step": self.done, "eval_loss": eval_loss}
        save_checkpoint(folder, Accelerator(), self.model, self.optimizers, state, limit, self.save_model)

    def save_model(self, directory: Path, weights: dict[str, torch.Tensor]) -> None:
        self.model.save_pretrained(directory, state_dict=weights)

    def load(self, path: Path, state: dict) -> None:
        load_checkpoint(path, state, self.model, self.optimizers)
        self.done = state["step"]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert [name for name in one.keys() | two.keys() if not torch.equal(one[name], two[name])] == []


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_resumed_run_has_the_same_weights(tiny_config, tmp_path, optimizer, tied):
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


def test_a_damaged_checkpoint_does_not_displace_later_ones(tiny_config, tmp_path):
    """Of the same steps, which are taken again; although its loss was the lowest."""
    run = Run(tiny_config, "adamw")
    for _ in range(2):
        run.train(2)
        run.save(tmp_path, eval_loss=3.0 - run.done / 2)
    (tmp_path / "step-00000004" / "optimizer.safetensors").unlink()
    run.load(*find_checkpoint(tmp_path, print))
    run.train(1)
    for limit in (2, 1):
        run.save(tmp_path, eval_loss=2.5, limit=limit)
        kept = sorted(path.name for path in tmp_path.iterdir())
        assert kept == ["step-00000002", "step-00000003", "step-00000004"]  # the best, and the latest; the damaged one stays


def test_the_model_is_hashed_while_the_optimizer_is_written(tiny_config, tmp_path, monkeypatch):
    is_hashed, save_file, file_digest = threading.Event(), checkpoints.save_file, hashlib.file_digest

    def hash_file(file, name):
        digest = file_digest(file, name)
        if Path(file.name).name == "model.safetensors":
            is_hashed.set()
        return digest

    def wait_and_save(tensors, path):
        assert is_hashed.wait(10)
        save_file(tensors, path)

    monkeypatch.setattr(hashlib, "file_digest", hash_file)
    monkeypatch.setattr(checkpoints, "save_file", wait_and_save)
    run = Run(tiny_config, "adamw")
    run.train(1)
    run.save(tmp_path)
    assert find_checkpoint(tmp_path, pytest.fail)


def test_the_last_checkpoints_and_the_best_are_kept(tiny_config, tmp_path):
    run = Run(tiny_config, "adamw")
    for loss in (5.0, 3.0, 4.0, 4.5, 4.2):
        run.train(1)
        run.save(tmp_path, loss)
        if run.done == 1:
            shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000001-copy")  # the user's own is not deleted
    names = ["step-00000001-copy", "step-00000002", "step-00000004", "step-00000005"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert find_checkpoint(tmp_path, print)[0].name == names[-1]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "missing"])
def test_a_damaged_checkpoint_is_skipped(tiny_config, tmp_path, file, damage):
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
    warnings = []
    path, state = find_checkpoint(tmp_path, warnings.append)
    assert path.name == "step-00000001"
    assert state["step"] == 1
    assert len(warnings) == 1
    assert "step-00000002 is damaged" in warnings[0]
    run.train(1)
    run.save(tmp_path)  # the run reaches that step again, and replaces the damaged one
    path, state = find_checkpoint(tmp_path, warnings.append)
    assert (path.name, state["step"], len(warnings)) == ("step-00000002", 2, 1)
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)
    assert find_checkpoint(tmp_path, warnings.append) is None


def test_a_full_disk_leaves_the_earlier_checkpoint(tiny_config, tmp_path, monkeypatch):
    run = Run(tiny_config, "adamw")
    run.train(1)
    run.save(tmp_path)

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    run.train(1)
    with pytest.raises(UserError, match=r"cannot be written .*No space left.*: free some space, then use --resume"):
        run.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert find_checkpoint(tmp_path, print)[1]["step"] == 1


def test_signals_request_a_stop():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        with GracefulShutdown(Accelerator()) as shutdown:
            assert not shutdown.requested()
            os.kill(os.getpid(), number)
            assert shutdown.requested()
            with pytest.raises(KeyboardInterrupt):  # the second Ctrl-C
                os.kill(os.getpid(), signal.SIGINT)
    assert before == [signal.getsignal(number) for number in numbers]


def test_ignored_signals_stay_ignored(monkeypatch):
    """As SIGHUP under nohup, and SIGINT in the background of a script."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        with GracefulShutdown(Accelerator()) as shutdown:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not shutdown.requested()
            os.kill(os.getpid(), signal.SIGTERM)
            assert shutdown.requested()
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_thread_trains_without_signals():
    with ThreadPoolExecutor(1) as pool:
        shutdown = pool.submit(lambda: GracefulShutdown(Accelerator()).__enter__()).result()
    assert not shutdown.requested()
