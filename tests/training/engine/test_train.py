"""Training, resuming, early stopping, and what is printed, on a tiny task."""

import gc
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM
from tests.conftest import TINY
from training.data.samplers import MixtureBatchSampler
from training.engine.arguments import EngineArguments
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

    def __init__(self, interrupt_after: int | None = None, losses: list[float] | None = None, **options):
        defaults = {"batch_size": 2, "max_steps": 9, "eval_steps": 3, "save_steps": 2, "learning_rate": 1e-2}
        self.arguments = EngineArguments(**{**defaults, "gradient_accumulation_steps": 2, "report_to": "none", **options})
        self.data_digest, self.losses, self.rows = "data", losses, RandomRows(interrupt_after)

    def build_model(self) -> ScratchGPTForCausalLM:
        set_seed(0)
        return ScratchGPTForCausalLM(ScratchGPTConfig(**TINY, hidden_dropout=0.1))

    def train_dataloader(self) -> DataLoader:
        num_batches = self.arguments.max_steps * self.arguments.gradient_accumulation_steps
        return DataLoader(self.rows, batch_sampler=MixtureBatchSampler([100], 2, num_batches, seed=0))

    @torch.no_grad()
    def evaluate(self, model, split: str = "validation") -> Metrics:
        model.eval()
        ids = torch.arange(3, 63)[None]
        measured = model(ids, labels=ids).loss.item()
        self.number = getattr(self, "number", -1) + 1
        return Metrics(measured if self.losses is None or not self.number else self.losses[self.number - 1])

    def preview(self, model) -> list[str]:
        return [f"{model.model.norm.weight.sum():.4f}", "second example"]


def run(path, task: RandomTask) -> tuple[TrainResult, ScratchGPTForCausalLM, RunFolder]:
    accelerator, model = Accelerator(cpu=True), task.build_model()
    run_folder = RunFolder(path, accelerator)
    return train(accelerator, task, model, run_folder), model, run_folder


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


def test_a_run_that_was_interrupted_after_its_last_step_only_evaluates(tmp_path):
    expected, straight, run_folder = run(tmp_path, RandomTask())
    rows = history(run_folder)
    del run_folder  # which holds the lock
    gc.collect()
    result, model, again = run(tmp_path, RandomTask(resume=True, interrupt_after=0))
    assert (result.after, result.preview_after, result.steps) == (expected.after, expected.preview_after, 9)
    assert history(again) == rows
    assert all(torch.equal(one, two) for one, two in zip(straight.parameters(), model.parameters(), strict=True))


def test_early_stopping_restores_the_model_with_the_lowest_loss(tmp_path, capsys):
    task = RandomTask(losses=[4.0, 3.0, 3.5, 3.6, 9.0], early_stopping_patience=2, max_steps=30, save_steps=100)
    result, model, run_folder = run(tmp_path, task)
    assert result.steps == 12  # evaluated at 3, 6, 9 and 12; the lowest loss is that of step 6
    assert result.after.loss == 9.0  # evaluated again after restoring
    assert [row["eval_loss"] for row in run_folder.history if "eval_loss" in row][1:] == [4.0, 3.0, 3.5, 3.6]
    assert "Restored the model of step 6, which has the lowest held-out loss" in capsys.readouterr().out
    weights = load_file(run_folder.checkpoints / "step-00000006" / "model.safetensors")
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.5}, "--learning_rate is 0.5, but the run in .* was started with 0.01: resume it with that value"),
        ({"max_steps": 99}, "start a new run in another --output_dir, from the finished model, with --base_model"),
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
