"""Training, resuming, early stopping, and what is printed, on a tiny task."""

import gc
import hashlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch._dynamo.exc import TorchDynamoException
from torch.utils.data import DataLoader, Dataset

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM
from tests.conftest import TINY
from training.data.samplers import MixtureBatchSampler
from training.engine.arguments import EngineArguments
from training.engine.consistency import Start, find_start
from training.engine.optimizers import lr_factor
from training.engine.run_folder import RunFolder
from training.engine.train import TrainResult, train
from training.errors import UserError


@dataclass(frozen=True)
class Metrics:
    loss: float

    def __str__(self) -> str:
        return f"loss {self.loss:.3f}"


class RandomRows(Dataset):
    """Rows of random ids; `interrupt_after` rows, reading one more raises KeyboardInterrupt."""

    def __init__(self, interrupt_after: int | None):
        self.left = interrupt_after

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        ids = torch.randint(3, 300, (13,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids[:-1], "shift_labels": ids[1:]}


class RandomTask:
    """Language modeling on random rows; `losses`, if given, take the place of the measured ones, from the first step on."""

    flops_per_token = 1.0
    eval_split = "validation"

    def __init__(self, interrupt_after: int | None = None, losses: list[float] | None = None, **options):
        defaults = {"batch_size": 2, "max_steps": 9, "eval_steps": 3, "save_steps": 2, "learning_rate": 1e-2}
        self.arguments = EngineArguments(**{**defaults, "gradient_accumulation_steps": 2, "report_to": "none", **options})
        self.data_digest, self.losses, self.rows = "data", losses, RandomRows(interrupt_after)

    def build_model(self) -> ScratchGPTForCausalLM:
        set_seed(0)
        return ScratchGPTForCausalLM(ScratchGPTConfig(**TINY, hidden_dropout=0.1))

    def train_dataloader(self) -> DataLoader:
        num_batches = self.arguments.max_steps * self.arguments.gradient_accumulation_steps
        sampler = MixtureBatchSampler([100], self.arguments.batch_size, num_batches, seed=0)
        return DataLoader(self.rows, batch_sampler=sampler)

    @torch.no_grad()
    def evaluate(self, model, split: str = "validation") -> Metrics:
        model.eval()
        ids = torch.arange(3, 63)[None]
        measured = model(ids, labels=ids).loss.item()
        self.number = getattr(self, "number", -1) + 1
        return Metrics(measured if self.losses is None or not self.number else self.losses[self.number - 1])

    def save_model(self, model, directory, weights) -> None:
        model.save_pretrained(directory, state_dict=weights)

    def preview(self, model) -> list[str]:
        return [f"{model.model.norm.weight.sum():.4f}", "second example"]


def run(path, task: RandomTask, scaler=None) -> tuple[TrainResult, ScratchGPTForCausalLM, RunFolder]:
    accelerator, model = Accelerator(cpu=True), task.build_model()
    accelerator.scaler = scaler
    run_folder = RunFolder(path, accelerator)
    start = find_start(accelerator, task.arguments, run_folder)
    return train(accelerator, task, model, run_folder, start), model, run_folder


def history(run_folder: RunFolder) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in run_folder.history]


@pytest.mark.parametrize("interrupt_after", [3, 17, 35])  # within the first step; after a checkpoint; in the last step
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, interrupt_after):
    expected, straight, straight_folder = run(tmp_path / "straight", RandomTask())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", RandomTask(interrupt_after))
    result, resumed, resumed_folder = run(tmp_path / "resumed", RandomTask(resume=True))
    assert history(resumed_folder) == history(straight_folder)
    assert (result.before, result.after, result.steps, result.tokens) == (expected.before, expected.after, 9, 9 * 4 * 12)
    for (name, one), two in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_resumed_run_continues_with_its_loss_scale(tmp_path):
    """Of float16, whose loss Accelerate scales on GPUs only. It is doubled after every second step."""
    scales = []
    for steps, exponent in ((4, 10), (6, 16)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**exponent, growth_interval=2)
        run(tmp_path, RandomTask(max_steps=steps, resume=steps > 4), scaler)
        scales.append(scaler.get_scale())
        gc.collect()  # of the directory's lock
    assert scales == [2.0**12, 2.0**13]


def test_a_run_that_was_interrupted_after_its_last_step_only_evaluates(tmp_path):
    expected, straight, run_folder = run(tmp_path, RandomTask())
    rows = history(run_folder)
    del run_folder  # which holds the lock
    gc.collect()
    result, model, again = run(tmp_path, RandomTask(resume=True, interrupt_after=0))
    assert (result.after, result.preview_after, result.steps) == (expected.after, expected.preview_after, 9)
    assert history(again) == rows
    assert all(torch.equal(one, two) for one, two in zip(straight.parameters(), model.parameters(), strict=True))


def test_early_stopping_needs_a_disk_that_all_machines_share(tmp_path, monkeypatch):
    monkeypatch.setattr("training.engine.train.gather_object", lambda seen: [*seen, False])  # of the second machine
    with pytest.raises(UserError, match="is not on a disk that all machines share, which --early_stopping_patience needs"):
        run(tmp_path / "out", RandomTask(early_stopping_patience=2))
    run(tmp_path / "other", RandomTask())


def test_early_stopping_restores_the_model_with_the_lowest_loss(tmp_path, capsys):
    task = RandomTask(losses=[4.0, 3.0, 3.5, 3.6, 9.0], early_stopping_patience=2, max_steps=30, save_steps=100)
    result, model, run_folder = run(tmp_path, task)
    assert result.steps == 12  # evaluated at 3, 6, 9 and 12; the lowest loss is that of step 6
    assert result.after.loss == 9.0  # evaluated again after restoring
    assert [row["eval_loss"] for row in run_folder.history if "eval_loss" in row][1:] == [4.0, 3.0, 3.5, 3.6]
    assert "Restored the model of step 6, the saved one with the lowest held-out loss" in capsys.readouterr().out
    weights = load_file(run_folder.checkpoints / "step-00000006" / "model.safetensors")
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "--seed is 5, but the run in .* was started with 0: resume it with that value"),
        ({"optimizer": "muon"}, "--optimizer is muon, but the run in .* was started with adamw"),
        (
            {"batch_size": 4},
            "--batch_size times --gradient_accumulation_steps is 8, but 4 in the run in .*: resume it with",
        ),
        ({"max_steps": 1}, "--max_steps is 1, but the run in .* has done 2: pass at least as many"),
        ({"data_digest": "other"}, "the data of the run in .* has changed since it was started"),
    ],
)
def test_a_run_is_resumed_only_with_its_own_settings_and_data(tmp_path, change, message):
    """Refused before the model is evaluated."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, RandomTask(interrupt_after=17))
    digest = change.pop("data_digest", "data")
    task = RandomTask(resume=True, **change)
    task.data_digest = digest
    task.evaluate = None
    with pytest.raises(UserError, match=message):
        run(tmp_path, task)


def test_a_run_is_resumed_with_settings_that_affect_only_the_steps_to_come(tmp_path, capsys):
    """They are printed, recorded, and take effect; the steps before are those of the first settings."""
    _, _, straight_folder = run(tmp_path / "straight", RandomTask())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", RandomTask(interrupt_after=17))
    options = {"batch_size": 4, "gradient_accumulation_steps": 1, "eval_steps": 2, "gradient_checkpointing": True}
    _, _, folder = run(tmp_path / "resumed", RandomTask(resume=True, max_steps=7, **options))
    first, second = ([row["loss"] for row in history(one) if "loss" in row] for one in (straight_folder, folder))
    assert second[:2] == first[:2]
    assert second == pytest.approx(first[:7], abs=0.05)  # the same rows of other random numbers for dropout
    del folder
    gc.collect()
    result, _, folder = run(tmp_path / "resumed", RandomTask(resume=True, learning_rate=1e-4, max_steps=10, **options))
    rates = [row["learning_rate"] for row in history(folder) if "loss" in row]
    assert rates[7:] == [1e-4 * lr_factor(step, RandomTask(max_steps=10).arguments) for step in (7, 8, 9)]
    changes = "batch_size 2 -> 4, eval_steps 3 -> 2, gradient_accumulation_steps 2 -> 1, gradient_checkpointing False -> True"
    assert result.notes == [
        f"from step 2 with {changes}, max_steps 9 -> 7",
        "from step 7 with learning_rate 0.01 -> 0.0001, max_steps 7 -> 10",
    ]
    assert "From step 7 with learning_rate 0.01 -> 0.0001, max_steps 7 -> 10" in capsys.readouterr().out


def test_a_finished_run_is_resumed_only_to_train_longer(tmp_path):
    def start(**options) -> Start:
        run_folder = RunFolder(tmp_path, Accelerator(cpu=True))
        run_folder.check(resume=True)
        return find_start(run_folder.accelerator, RandomTask(resume=True, **options).arguments, run_folder)

    run(tmp_path, RandomTask())
    gc.collect()
    assert not start().is_finished  # killed before it was published
    (tmp_path / "config.json").write_text("{}")
    assert start().is_finished
    assert start(learning_rate=1.0).is_finished
    longer = start(max_steps=12)
    assert (longer.is_finished, longer.checkpoint[1]["step"], longer.changes) == (False, 9, ["max_steps 9 -> 12"])
    assert (start().chosen["precision"], longer.chosen) == ("no", None)  # whether compiling pays depends on the length


def test_the_best_model_is_named_if_the_last_one_is_saved(tmp_path, capsys):
    result, model, _ = run(tmp_path, RandomTask(losses=[5.0, 6.0, 6.6], save_steps=3))
    note = "the final model has a held-out loss of 6.600; the lowest was 5.000, whose model is in step-00000003"
    assert result.notes == [f"{note}: to keep the best model, pass --early_stopping_patience"]
    assert note[1:] in capsys.readouterr().out
    best = ScratchGPTForCausalLM.from_pretrained(tmp_path / "checkpoints" / "step-00000003")
    assert not torch.equal(best.model.norm.weight, model.model.norm.weight)


def test_only_a_model_that_was_evaluated_is_the_best(tmp_path):
    """Evaluated after steps 2, 4 and 6, and saved after 3 and 6: the model of step 2 is lost, that of step 3 has no loss."""
    options = {"eval_steps": 2, "save_steps": 3, "max_steps": 6, "save_total_limit": 1}
    result, model, folder = run(tmp_path, RandomTask(losses=[5.0, 6.0, 6.6], **options))
    note = "the final model has a held-out loss of 6.600; the lowest was 5.000: to keep the best model, pass"
    assert result.notes == [f"{note} --early_stopping_patience"]
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-00000006"]
    del folder
    gc.collect()
    result, resumed, _ = run(tmp_path, RandomTask(losses=[6.6], resume=True, early_stopping_patience=9, **options))
    assert not any("restored" in note for note in result.notes)
    assert all(torch.equal(one, two) for one, two in zip(resumed.parameters(), model.parameters(), strict=True))


class CompilerEnds(RandomTask):
    """A signal arrives in the fourth step, and ends the compiler, too, as Ctrl-C in a terminal does."""

    calls = 0

    def build_model(self) -> ScratchGPTForCausalLM:
        model = super().build_model()
        model.register_forward_pre_hook(self.fail)
        return model

    def fail(self, model, inputs) -> None:
        self.calls += model.training
        if self.calls == 7:
            os.kill(os.getpid(), signal.SIGINT)
            raise TorchDynamoException("g++ was killed")


def test_a_signal_that_also_ends_the_compiler(tmp_path, capsys):
    _, straight, _ = run(tmp_path / "straight", RandomTask())
    with pytest.raises(SystemExit, match="130"):
        run(tmp_path / "out", CompilerEnds(save_steps=100))
    assert "Stopped after step 3. To continue, run the same command with --resume." in capsys.readouterr().out
    gc.collect()
    _, resumed, _ = run(tmp_path / "out", RandomTask(save_steps=100, resume=True))
    assert all(torch.equal(one, two) for one, two in zip(straight.parameters(), resumed.parameters(), strict=True))


def make_checkpoint(directory: Path, change: Callable[[dict[str, Any]], object], **options: Any) -> None:
    """A checkpoint of one step, with a changed state."""
    run(directory, RandomTask(max_steps=1, **options))
    gc.collect()
    path = directory / "checkpoints" / "step-00000001"
    state, digests = (json.loads((path / name).read_text()) for name in ("state.json", "manifest.json"))
    change(state)
    (path / "state.json").write_text(json.dumps(state))
    digests["state.json"] = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(digests))


@pytest.mark.parametrize("change", [lambda state: state["settings"].update(new=1), lambda state: state.pop("notes")])
def test_a_checkpoint_of_another_version(tmp_path, change):
    make_checkpoint(tmp_path, change)
    with pytest.raises(UserError, match="was started by another program, or by another version of this one: resume it with"):
        run(tmp_path, RandomTask(resume=True))


def test_a_checkpoint_of_a_version_without_an_option(tmp_path):
    """The default is what that version did."""
    make_checkpoint(tmp_path / "default", lambda state: state["settings"].pop("seed"))
    assert run(tmp_path / "default", RandomTask(max_steps=2, resume=True))[0].steps == 2
    make_checkpoint(tmp_path / "other", lambda state: state["settings"].pop("seed"), seed=7)
    with pytest.raises(UserError, match="--seed is 7, but the run in .* was started with 0: resume it with that value"):
        run(tmp_path / "other", RandomTask(max_steps=2, resume=True, seed=7))


def test_checkpoints_by_time(tmp_path):
    names = []
    for minutes in (0.0, 1e-9):
        directory = tmp_path / str(minutes)
        run(directory, RandomTask(max_steps=4, save_steps=100, save_total_limit=9, save_minutes=minutes))
        names.append(sorted(path.name for path in (directory / "checkpoints").iterdir()))
    assert names == [["step-00000004"], [f"step-0000000{step}" for step in range(1, 5)]]


def test_what_is_printed(tmp_path, capsys):
    """All examples before the first step and after the last, one in between."""
    result, _, run_folder = run(tmp_path, RandomTask())
    out = capsys.readouterr().out
    losses = {row["step"]: row["eval_loss"] for row in run_folder.history if "eval_loss" in row}
    before, at_3, at_6, at_9 = (
        out.index(f"{start}: loss {losses[step]:.3f}")
        for start, step in (("Before training", 0), ("\nstep 3", 3), ("\nstep 6", 6), ("\nstep 9", 9))
    )
    parts = out[before:at_3], out[at_3:at_6], out[at_6:at_9], out[at_9:]
    assert [part.count("second example") for part in parts] == [1, 0, 0, 1]
    assert result.preview_before[0] in parts[0]
    assert result.preview_after[0] in parts[3]
    assert str(result) == f"9 steps, 432 tokens, {result.seconds:.1f} seconds (excluding evaluation)"
    assert result.seconds == pytest.approx(sum(row.get("seconds", 0) for row in run_folder.history))
