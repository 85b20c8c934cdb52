"""Runs that are really stopped and killed, or run out of disk, and the results after they are resumed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import Processes, on_two_processes
from tests.training.conftest import PRETRAIN, ROOT, SMALL, rows, run_module, run_program
from training import pretrain
from training.engine.checkpoints import find_checkpoint
from training.errors import UserError

# Dropout, so that random numbers matter; accumulation, so that a step is more than a batch.
OPTIONS = [
    *SMALL, "hidden_dropout=0.1", "attention_dropout=0.1", "--max_steps", "40", "--eval_steps", "8", "--save_steps", "4",
    "--gradient_accumulation_steps", "2", "--optimizer", "muon",
]  # fmt: skip
# Large enough that writing a checkpoint takes a while.
LARGE = [*OPTIONS, "--max_steps", "6", "--eval_steps", "6", "--save_steps", "1", "--model", "intermediate_size=20000"]


def wait_for(run: Processes, condition: Callable[[], bool]) -> None:
    """Wait until a condition holds while the processes run."""
    deadline = time.monotonic() + 200
    while not condition():
        assert all(process.is_alive() for process in run.processes), run.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def results(folder: Path) -> tuple[bytes, list]:
    """The weights, bit by bit, and the metrics: all that interruptions must not change."""
    metrics = [{name: value for name, value in row.items() if name != "seconds"} for row in rows(folder)]
    return (folder / "model.safetensors").read_bytes(), metrics


@pytest.fixture(scope="module")
def straight(book, tmp_path_factory) -> Path:
    """The directory of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    pretrain.main(["--dataset", book, *OPTIONS, "--output_dir", str(folder)])
    return folder


def test_a_stopped_and_killed_run_ends_as_if_uninterrupted(straight, book, tmp_path):
    """While it is paused, no other run can use its directory; Ctrl-C saves a checkpoint; SIGKILL leaves the last one."""
    folder = tmp_path / "run"
    options = ["--dataset", book, *OPTIONS, "--save_steps", "10", "--output_dir", str(folder)]
    first = Processes(run_program, tmp_path / "first", ["pretrain", *options])
    wait_for(first, lambda: steps_done(folder) >= 5)
    first.signal(signal.SIGSTOP)
    for resume in ([], ["--resume"]):
        with pytest.raises(
            UserError, match=f"--output_dir {folder}: another run is writing there. Wait for it to end, or pass"
        ):
            pretrain.main([*options, *resume])
    first.signal(signal.SIGINT)
    first.signal(signal.SIGCONT)
    output = first.wait(130)
    assert output.count("Stopping after this step and saving a checkpoint. Ctrl-C stops at once.") == 1
    assert "To continue, run the same command with --resume." in output
    assert "Traceback" not in output
    stopped = steps_done(folder)
    second = Processes(run_program, tmp_path / "second", ["pretrain", *options, "--resume"])
    wait_for(second, lambda: steps_done(folder) >= max(stopped + 1, 22))
    second.signal(signal.SIGKILL)
    second.wait(-signal.SIGKILL)
    pretrain.main([*options, "--resume"])
    assert results(folder) == results(straight)


def test_a_run_whose_output_is_no_longer_read_is_saved(book, tmp_path):
    """Ctrl-C also ends the `tee` that reads the output."""
    folder = tmp_path / "run"
    options = ["--dataset", book, *SMALL, "--max_steps", "9999", "--eval_steps", "1", "--save_steps", "9999"]
    command = [sys.executable, PRETRAIN, *options, "--output_dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            if line.startswith(b"step 3:"):
                break
        process.send_signal(signal.SIGINT)
        process.stdout.close()
        process.wait(100)
    assert find_checkpoint(folder / "checkpoints", pytest.fail)[1]["step"] >= 3


def test_a_run_whose_launcher_is_stopped(straight, book, tmp_path):
    """`accelerate launch` passes no signal on: the run stops and saves by itself when its launcher has ended."""
    folder = tmp_path / "run"
    options = ["--dataset", book, *OPTIONS, "--save_steps", "40", "--output_dir", str(folder)]
    config = str(ROOT / "training" / "configs" / "accelerate" / "cpu.yaml")
    words = ["accelerate.commands.launch", "--config_file", config, PRETRAIN, *options]
    launcher = Processes(run_module, tmp_path / "log", words, OMP_NUM_THREADS="1")
    wait_for(launcher, lambda: steps_done(folder) >= 5)
    (trainer,) = psutil.Process(launcher.processes[0].pid).children()
    launcher.signal(signal.SIGTERM)
    launcher.wait(-signal.SIGTERM)
    assert psutil.wait_procs([trainer], timeout=30)[1] == []
    output = launcher.log.read_text()
    assert "To continue, run the same command with --resume." in output, output
    assert 5 <= steps_done(folder) < 40
    pretrain.main([*options, "--resume"])
    assert results(folder) == results(straight)


def test_two_processes_train_and_resume_like_one(run, book, tmp_path):
    """To the same bits with two processes again, also under torchrun; with one process to the same losses."""
    on_cpu = {"ACCELERATE_USE_CPU": "true"}
    options = ["--dataset", book, *SMALL, "--save_steps", "3", "--output_dir"]
    torchrun = ["torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    Processes(run_module, tmp_path / "torchrun", [*torchrun, PRETRAIN, *options, str(tmp_path / "straight")], **on_cpu).wait()
    words = ["pretrain", *options, str(tmp_path / "two")]
    killed = Processes(run_program, tmp_path / "killed", words, count=2, **on_cpu)
    wait_for(killed, lambda: any((tmp_path / "two" / "checkpoints").glob("step-*")))
    killed.signal(signal.SIGKILL)
    killed.wait(-signal.SIGKILL)
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    assert "Resuming from step" in on_two_processes(run_program, tmp_path, [*words, "--resume"], **on_cpu)
    pretrain.main([*options, str(tmp_path / "one"), "--resume"])
    assert results(tmp_path / "two") == results(tmp_path / "straight")
    for name in ("two", "one"):
        for expected, row in zip(rows(run), rows(tmp_path / name), strict=True):
            assert row.pop("seconds", None) is None or expected.pop("seconds")
            assert row == pytest.approx(expected, rel=1e-3)


def test_a_run_that_is_killed_while_writing_a_checkpoint(book, tmp_path):
    options = ["--dataset", book, *LARGE]
    pretrain.main([*options, "--save_steps", "6", "--output_dir", str(tmp_path / "straight")])
    folder = tmp_path / "killed"
    checkpoints = folder / "checkpoints"
    writer = Processes(run_program, tmp_path / "log", ["pretrain", *options, "--output_dir", str(folder)])

    def is_writing() -> bool:
        """Checked while the run is paused: a file that is incomplete then is incomplete when it is killed."""
        writer.signal(signal.SIGSTOP)
        while psutil.Process(writer.processes[0].pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        found = any(checkpoints.glob(".writing-*/*"))
        if not found:
            writer.signal(signal.SIGCONT)
        return found

    wait_for(writer, lambda: any(checkpoints.glob("step-*")))
    wait_for(writer, is_writing)
    writer.signal(signal.SIGKILL)
    writer.wait(-signal.SIGKILL)
    assert list(checkpoints.glob(".writing-*"))
    os.truncate(max(checkpoints.glob("step-*")) / "model.safetensors", 100)  # and the disk has lost a piece
    pretrain.main([*options, "--output_dir", str(folder), "--resume"])
    assert not list(checkpoints.glob(".writing-*"))
    assert results(folder) == results(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_signals_at_any_moment(book, tmp_path, number):
    """Twenty times, from the imports to the card; a run that ends is compared, and another started."""
    generator = random.Random(number)
    options = ["--dataset", book, *OPTIONS, "--resume", "--output_dir"]

    def begin(name: str) -> subprocess.Popen:
        command = [sys.executable, "training/pretrain.py", *options, str(tmp_path / name)]
        environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / f"cache-{name}")}
        streams: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=environment, **streams)

    start_time = time.monotonic()
    process = begin("straight")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    duration = time.monotonic() - start_time
    signals, ended = 0, 0
    while signals < 20 or not ended:
        process = begin(f"run-{ended}")
        is_signalled = signals < 20
        try:
            output, _ = process.communicate(timeout=generator.uniform(0, duration) if is_signalled else 200)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            output, _ = process.communicate(timeout=100)
            signals += 1
        is_importing = "Reading" not in output  # until then Python prints what stopped it
        assert process.returncode in (0, 2, 130, -number) or is_importing, output
        assert "Traceback" not in output or is_importing, output
        if process.returncode in (0, 2):  # 2: the last signal came after the end
            assert process.returncode == 0 or "already contains a finished model" in output, output
            assert results(tmp_path / f"run-{ended}") == results(tmp_path / "straight")
            ended += 1


@pytest.mark.slow
def test_a_disk_that_is_full_again_and_again(straight, book, mount):
    folder, failures = Path(), 0
    for kilobytes in (4, 16, 64, 128, 256, 320, 384, 448, 512, 640, 768, 1024, 1500, 64_000):
        folder = mount(f"size={kilobytes}k") / "run"
        options = ["--dataset", book, *OPTIONS, "--output_dir", str(folder)]
        process = subprocess.run([sys.executable, PRETRAIN, *options, "--resume"], capture_output=True, text=True, timeout=280)
        if process.returncode == 0:
            break
        assert process.returncode == 2, process.stderr
        assert "Traceback" not in process.stderr
        assert "No space left on device" in process.stderr.splitlines()[-1]
        failures += 1
    assert failures > 4
    assert results(folder) == results(straight)
