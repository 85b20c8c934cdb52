"""Runs that are killed, stopped or starved, for real, and what they come to when they go on."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.training.conftest import ROOT, SMALL, TORCHRUN, launch, rows
from training import pretrain
from training.errors import UserError

# Dropout, so that random numbers matter; accumulation, so that a step is more than a batch.
OPTIONS = [
    *SMALL, "hidden_dropout=0.1", "attention_dropout=0.1", "--max_steps", "40", "--eval_steps", "8", "--save_steps", "4",
    "--gradient_accumulation_steps", "2", "--optimizer", "muon",
]  # fmt: skip
# Large enough that writing a checkpoint takes a while.
LARGE = [*OPTIONS, "--max_steps", "8", "--save_steps", "1", "--model", "intermediate_size=20000"]

LAUNCHERS = {1: [sys.executable], 2: TORCHRUN}


def start(launcher: list[str], *arguments: str, **environment: str) -> subprocess.Popen:
    """A run in the background."""
    return subprocess.Popen(
        [*launcher, "training/pretrain.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_when(process: subprocess.Popen, moment) -> bool:
    """Kill the run and all its processes, unasked, as soon as the moment has come; False if it was sooner at its end."""
    deadline = time.monotonic() + 120
    while not moment():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.001)
    for each in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
        each.kill()
    process.communicate()
    return True


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("learning_rate") if path.exists() else 0


def outcome(folder: Path) -> tuple[bytes, list]:
    """All that must not depend on what a run went through: the weights, bit by bit, and the losses."""
    return (folder / "model.safetensors").read_bytes(), [(row["step"], row["loss"]) for row in rows(folder)]


@pytest.fixture(scope="module")
def straight(book, caches, tmp_path_factory):
    """Folders of uninterrupted runs, by the number of their processes."""
    folders = {}

    def folder(processes: int) -> Path:
        if processes not in folders:
            folders[processes] = tmp_path_factory.mktemp("straight") / "run"
            options = ["--dataset", book, *OPTIONS, "--output_dir", str(folders[processes])]
            assert launch(LAUNCHERS[processes], *options, ACCELERATE_USE_CPU="true", **caches).returncode == 0
        return folders[processes]

    return folder


@pytest.mark.parametrize(("processes", "kills"), [(1, 2), (2, 1)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(straight, book, caches, tmp_path, processes, kills):
    launcher = LAUNCHERS[processes]
    environment = {**caches, "ACCELERATE_USE_CPU": "true"}
    options = ["--dataset", book, *OPTIONS]
    generator = random.Random(processes)
    folder = tmp_path / "killed"
    resume: list[str] = []
    for part in range(kills):
        process = start(launcher, *options, "--output_dir", str(folder), *resume, **environment)
        last = 16 * part + generator.randrange(5, 16)
        assert kill_when(process, lambda last=last: steps_done(folder) >= last)
        resume = ["--resume"]
    final = launch(launcher, *options, "--output_dir", str(folder), *resume, **environment)
    assert final.returncode == 0, final.stderr
    assert "Going on after step" in final.stdout
    assert outcome(folder) == outcome(straight(processes))


def test_a_run_that_is_killed_while_writing_a_checkpoint(book, caches, tmp_path):
    options = ["--dataset", book, *LARGE]
    assert launch([sys.executable], *options, "--output_dir", str(tmp_path / "straight"), **caches).returncode == 0
    folder = tmp_path / "killed"
    checkpoints = folder / "checkpoints"

    process = start([sys.executable], *options, "--output_dir", str(folder), **caches)

    def is_writing() -> bool:
        """Looked at while the run stands still: what is half-written then is half-written when it is killed."""
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        found = any(checkpoints.glob("step-*")) and any(checkpoints.glob(".writing-*/*"))
        if not found:
            process.send_signal(signal.SIGCONT)
        return found

    assert kill_when(process, is_writing)
    assert list(checkpoints.glob(".writing-*"))
    os.truncate(max(checkpoints.glob("step-*")) / "model.safetensors", 100)  # and the disk has lost a piece
    final = launch([sys.executable], *options, "--output_dir", str(folder), "--resume", **caches)
    assert final.returncode == 0, final.stderr
    assert not list(checkpoints.glob(".writing-*"))
    assert outcome(folder) == outcome(tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_first(straight, book, caches, tmp_path, number):
    options = ["--dataset", book, *OPTIONS, "--save_steps", "1000"]
    folder = tmp_path / "stopped"
    process = start([sys.executable], *options, "--output_dir", str(folder), **caches)
    while steps_done(folder) < 5:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130
    assert output.count("Stopping after this step, which is then saved. Ctrl-C ends it at once.") == 1
    assert "The same command with --resume goes on from there." in output
    assert "Traceback" not in output
    final = launch([sys.executable], *options, "--output_dir", str(folder), "--resume", **caches)
    assert final.returncode == 0, final.stderr
    assert outcome(folder) == outcome(straight(1))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_struck_at_any_moment(book, tmp_path, number):
    """Twenty times, from the imports to the card; a run that got through is compared, and another begun."""
    generator = random.Random(number)
    options = ["--dataset", book, *OPTIONS, "--resume", "--output_dir"]

    def begin(name: str) -> subprocess.Popen:
        return start([sys.executable], *options, str(tmp_path / name), HF_HOME=str(tmp_path / f"home-{name}"))

    began = time.monotonic()
    process = begin("straight")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    whole = time.monotonic() - began
    strikes, ended = 0, 0
    while strikes < 20 or not ended:
        process = begin(f"run-{ended}")
        strike = strikes < 20
        try:
            output, _ = process.communicate(timeout=generator.uniform(0, whole) if strike else 200)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            output, _ = process.communicate(timeout=100)
            strikes += 1
        silent = "Reading" not in output  # until then Python imports, and says in its own words what stopped it
        assert process.returncode in (0, 2, 130, -number) or silent, output
        assert "Traceback" not in output or silent, output
        if process.returncode in (0, 2):  # 2: the last strike came after the end
            assert process.returncode == 0 or "already holds a finished model" in output, output
            assert outcome(tmp_path / f"run-{ended}") == outcome(tmp_path / "straight")
            ended += 1


@pytest.mark.slow
def test_a_disk_that_fills_again_and_again(straight, book, caches, mount):
    folder, failures = Path(), 0
    for kilobytes in (4, 16, 64, 128, 256, 320, 384, 448, 512, 640, 768, 1024, 1500, 64_000):
        folder = mount(f"size={kilobytes}k") / "run"
        options = ["--dataset", book, *OPTIONS, "--output_dir", str(folder)]
        process = launch([sys.executable], *options, "--resume", **caches)
        if process.returncode == 0:
            break
        assert process.returncode == 2, process.stderr
        assert "Traceback" not in process.stderr
        assert "No space left on device" in process.stderr.splitlines()[-1]
        failures += 1
    assert failures > 4
    assert outcome(folder) == outcome(straight(1))


def test_two_runs_into_one_folder(straight, book, caches, tmp_path):
    folder = tmp_path / "shared"
    options = ["--dataset", book, *OPTIONS, "--output_dir", str(folder)]
    first = start([sys.executable], *options, **caches)
    while steps_done(folder) < 5:
        assert first.poll() is None
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    for resume in ([], ["--resume"]):
        second = launch([sys.executable], *options, *resume, **caches)
        assert second.returncode == 2
        assert second.stderr.splitlines()[-1].endswith(
            f"--output_dir {folder}: another run is writing there. Wait for its end, or pass another folder."
        )
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=100)
    assert first.returncode == 0
    assert outcome(folder) == outcome(straight(1))


def test_one_process_goes_on_with_what_two_began(run, book, caches, tmp_path):
    folder = tmp_path / "two"
    options = ["--dataset", book, *SMALL, "--save_steps", "3", "--output_dir", str(folder)]
    process = start(TORCHRUN, *options, ACCELERATE_USE_CPU="true", **caches)
    assert kill_when(process, lambda: len(list((folder / "checkpoints").glob("step-*"))) >= 1)
    final = launch([sys.executable], *options, "--resume", **caches)
    assert final.returncode == 0, final.stderr
    for one, two in zip(rows(run[0]), rows(folder), strict=True):
        assert one["step"] == two["step"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("learning_rate", "0.5", "started with 0.008: go on with that, or start a new run in another --output_dir."),
        ("max_steps", "99", "start a new run in another --output_dir, from the finished model, by --base_model."),
    ],
)
def test_other_settings_cannot_go_on(run, book, tmp_path, monkeypatch, name, value, said):
    """Said before the model is evaluated."""
    folder = tmp_path / "run"
    shutil.copytree(run[0] / "checkpoints", folder / "checkpoints")
    shutil.copy(run[0] / "metrics.jsonl", folder)
    words = ["--dataset", book, *SMALL, "--output_dir", str(folder), "--resume", f"--{name}", value]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pretrain, "evaluate", None)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
    with pytest.raises(UserError) as error:
        pretrain.main()
    assert f"--{name} is {value}, but the run in" in str(error.value)
    assert said in str(error.value)
