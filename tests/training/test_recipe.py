"""The program around a run: trackers, memory, notebooks, and the positions of a base model."""

import platform
import re
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import accelerate.tracking
import pytest
import torch
from accelerate.utils import DistributedType, DynamoBackend, LoggerType

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTTokenizer
from tests.training.conftest import SMALL, TUNING, interrupted_after, rows, write_rows
from training import classify, instruct, pretrain, recipe
from training.cli import parse_arguments
from training.engine import loop
from training.engine.flops import flops_per_token
from training.engine.launch import start_accelerator
from training.engine.loop import count_items
from training.errors import UserError, explain_out_of_memory


@pytest.fixture
def wandb(monkeypatch) -> SimpleNamespace:
    """A stand-in for the library, which keeps what is sent to it."""
    module = SimpleNamespace(runs=[], logged=[], config={})

    def init(**options: object) -> SimpleNamespace:
        module.runs.append(options)
        return SimpleNamespace(log=lambda values, step: module.logged.append(step), finish=lambda: None)

    module.init = init
    module.config = SimpleNamespace(update=lambda values, allow_val_change: module.logged.append(values))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.WANDB])
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    return module


def test_a_tracker_without_a_login_is_an_error_before_any_data_is_read(wandb, book, tmp_path, monkeypatch):
    def init(**options: object) -> None:
        raise RuntimeError("api_key not configured (no-tty).\nCall wandb.login(key=...)")

    wandb.init = init
    monkeypatch.setattr(pretrain, "read_corpora", None)
    message = r"--report_to wandb cannot be started \(api_key not configured \(no-tty\). Call .*\): log in to it, or pass "
    with pytest.raises(UserError, match=message + "--report_to none"):
        pretrain.main(["--dataset", book, *SMALL, "--report_to", "wandb", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_continues_the_run_of_its_tracker(wandb, book, tmp_path):
    words = ["--dataset", book, *SMALL, "--report_to", "wandb", "--output_dir"]
    with interrupted_after(3):
        pretrain.main([*words, str(tmp_path / "out")])
    assert wandb.logged[1:] == [0, 1, 2, 3]
    assert wandb.logged[0]["vocab_size"] == "300"
    pretrain.main([*words, str(tmp_path / "out"), "--resume"])
    assert [step for step in wandb.logged if isinstance(step, int)] == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12, 12]
    first, second = wandb.runs
    assert first == second
    assert first["project"] == "scratchgpt"
    assert first["resume"] == "allow"
    assert len(first["id"]) == 8


def test_a_run_that_is_out_of_memory_says_what_to_lower_and_starts_again(book, tmp_path, monkeypatch):
    """An error of the real allocator, in the first step."""
    words = ["--dataset", book, *SMALL, "--max_steps", "1", "--output_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "count_items", lambda batch: torch.empty(10**17))
        message = r"^out of memory with one row at a time \(.*\): lower --context_length, pass --gradient_checkpointing, or "
        with pytest.raises(UserError, match=message):
            pretrain.main(words)
    assert [row["step"] for row in rows(tmp_path)] == [0]
    pretrain.main(words)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 1]
    message = r"^out of memory \(CUDA .*\): lower --batch_size, and raise --gradient_accumulation_steps as much, lower"
    with pytest.raises(UserError, match=message), explain_out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(RuntimeError, match="^shapes differ$"), explain_out_of_memory():
        raise RuntimeError("shapes differ")


def test_a_batch_that_does_not_fit_is_divided(run, book, tmp_path, monkeypatch, capsys):
    """The run is the one whose batches fit, and its card says so."""

    errors = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ]

    def count_items(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(batch["input_ids"]) > 1 + (len(sizes) < 12):
            raise errors.pop(0)
        sizes.append(len(batch["input_ids"]))
        return counted(batch)

    sizes, counted = list[int](), loop.count_items
    monkeypatch.setattr(loop, "count_items", count_items)
    pretrain.main(["--dataset", book, *SMALL, "--output_dir", str(tmp_path)])
    assert sizes == [2, 2] * 6 + [1, 1, 1, 1] * 6
    for expected, row in zip(rows(run), rows(tmp_path), strict=True):
        assert row.pop("seconds", None) is None or expected.pop("seconds")
        assert row == pytest.approx(expected, rel=1e-3)
    notes = [
        "out of memory: from step 1 on, 2 batches of 2 rows per step",
        "out of memory: from step 7 on, 4 batches of 1 rows per step",
    ]
    printed = capsys.readouterr().out
    assert all(note[1:] in printed for note in notes)
    assert "; ".join(notes) in (tmp_path / "README.md").read_text()


def test_optimizers_that_do_not_fit_are_not_stepped_again(book, tmp_path, monkeypatch):
    """Smaller batches do not help, and Muon has changed the weights when the state of AdamW is allocated."""
    steps = []

    def step(self, closure=None):
        steps.append(self)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(UserError, match=r"^out of memory \(CUDA .*\): choose a smaller model, or divide it over several GPUs"):
        pretrain.main(["--dataset", book, *SMALL, "--output_dir", str(tmp_path)])
    assert len(steps) == 1


@pytest.mark.parametrize(
    ("device", "precision", "has_tf32", "expected"),
    [
        ("cuda", "float32", True, "A100, processes: 1, .*, float32 \\(TF32\\)"),
        ("cuda", "float32", False, "A100, .*, float32"),
        ("cuda", "bfloat16", True, "A100, .*, bfloat16"),
        ("cpu", "float32", True, f"{platform.machine()} CPU, .*, float32"),  # beside a GPU
        ("mps", "auto", False, f"{platform.machine()} MPS, .*, float32 \\(auto: the device is not fast in bfloat16\\)"),
    ],
)
def test_the_device_that_a_card_names(monkeypatch, device, precision, has_tf32, expected):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    for name, value in (("is_available", True), ("get_device_name", "A100"), ("is_tf32_supported", has_tf32)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO))
    accelerator = SimpleNamespace(
        device=torch.device(device), distributed_type=DistributedType.NO, num_processes=1, state=state,
        mixed_precision="bf16" if precision == "bfloat16" else "no",
    )  # fmt: skip
    assert re.fullmatch(expected, recipe.hardware(accelerator, precision))


def test_the_training_of_a_tokenizer_ends_with_ctrl_c(book, tmp_path, monkeypatch):
    """At once: code in Rust would end first if Python handled the signal."""
    train, handlers = ScratchGPTTokenizer.train, []

    def record(*arguments, **options):
        handlers.append(signal.getsignal(signal.SIGINT))
        return train(*arguments, **options)

    monkeypatch.setattr(ScratchGPTTokenizer, "train", record)
    words = ["--vocab_size", "291", "--max_steps", "1", "--output_dir", str(tmp_path)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in a job of the background
    try:
        pretrain.main(["--dataset", book, *SMALL, *words])
        assert handlers == [signal.SIG_DFL]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_notebook_launches_two_processes(book, tmp_path):
    words = ["--dataset", book, *SMALL, "--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = f"""from accelerate import notebook_launcher
from training import pretrain
if __name__ == "__main__":
    notebook_launcher(pretrain.main, args=({words},), num_processes=2, use_port="{port}")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert "processes: 2, threads per process: " in run.stdout
    assert [row["step"] for row in rows(tmp_path / "out")] == [0, 1, 2, 2]


@pytest.mark.parametrize("recipe", [classify.ClassifyRecipe, instruct.InstructRecipe])
def test_the_flops_of_a_token_are_those_of_the_mean_length(recipe, run, tmp_path):
    """Of 100 examples whose lengths differ: the maximum, the median and the context length differ from the mean."""
    words = ["night " * (1 + 12 * (number % 4 == 0)) + str(number) for number in range(100)]
    table = [{"text": w, "label": "long" if len(w) > 20 else "short", "instruction": w, "output": "calm"} for w in words]
    options = ["--dataset", write_rows(tmp_path / "table.json", table), "--base_model", str(run), "--num_train_epochs", "1"]
    options += ["--batch_size", "1", "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    arguments = parse_arguments(recipe.arguments_class, "test", options)
    recipe.check(arguments)
    found = recipe(arguments, start_accelerator())
    batches = list(found.train_dataloader())
    read = sum(batch["input_ids"].numel() for batch in batches)  # batches of one row have no padding
    config = ScratchGPTConfig.from_pretrained(run)
    none, one = (flops_per_token(config, length, has_head=False) for length in (0, 1))
    body = found.flops_per_token
    if recipe is instruct.InstructRecipe:  # FLOPs are counted per label, and tokens without a label need no head
        labels = sum(count_items(batch)[0].item() for batch in batches)
        assert labels < read / 2
        body = (found.flops_per_token - 6 * config.vocab_size * config.hidden_size) * labels / read
    assert (body - none) / (one - none) == pytest.approx(read / len(batches) - 0.5, abs=0.5)  # rounded down


def test_a_base_model_with_fewer_positions_than_the_file(run, book, tmp_path, capsys):
    """It has 32; the file of the recipe says 256. What is typed must fit."""
    options = [word for word in TUNING[pretrain] if word not in ("--context_length", "32")]
    words = ["--dataset", book, *options, "--base_model", str(run), "--max_steps", "1", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--context_length 33 is longer than the 32 positions of .*: lower it"):
        pretrain.main([*words, "--context_length=33"])
    pretrain.main(words)
    assert f"--context_length: the 32 positions of {run}, instead of 256\n" in capsys.readouterr().out
    assert rows(tmp_path / "out")[1]["tokens"] == 4 * 32
