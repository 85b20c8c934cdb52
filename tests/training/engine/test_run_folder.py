"""The output directory of a run: what is refused, the lock, and the metrics."""

import json
import os

import pytest
from accelerate import Accelerator

from tests.conftest import Processes
from training.engine.metrics import LMMetrics
from training.engine.run_folder import RunFolder
from training.errors import UserError


def folder(path) -> RunFolder:
    return RunFolder(path, Accelerator())


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "already contains a finished model: pass another --output_dir"),
        ("metrics.jsonl", "already contains an unfinished run: resume it with --resume, or pass another --output_dir"),
        ("notes.txt", "is not empty: pass another --output_dir"),
    ],
)
def test_a_directory_in_use_is_refused_with_the_remedy(tmp_path, file, message):
    (tmp_path / file).write_text("kept")
    with pytest.raises(UserError, match=message):
        folder(tmp_path).check(resume=False)
    assert (tmp_path / file).read_text() == "kept"


@pytest.mark.parametrize("content", ["", '{"step": 0, "eval_loss": 5.7}\n'])
def test_the_directory_of_a_run_without_a_step_is_used_again(tmp_path, content):
    (tmp_path / "logs").mkdir()
    (tmp_path / "metrics.jsonl").write_text(content)
    folder(tmp_path).check(resume=True)  # also of one that was killed before it had metrics, while it prepared the data
    assert (tmp_path / "metrics.jsonl").read_text() == content
    (tmp_path / "metrics.jsonl").unlink()
    folder(tmp_path).check(resume=True)
    (tmp_path / "metrics.jsonl").write_text(content)
    folder(tmp_path).check(resume=False)
    folder(tmp_path).check(resume=False)
    folder(tmp_path).open()
    for step in '{"step": 1, "loss": 5.7}\n', "":
        (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 5.7}\n' + step)
        with pytest.raises(UserError, match="unfinished run"):
            folder(tmp_path).check(resume=False)
        (tmp_path / "checkpoints").mkdir(exist_ok=True)


def test_a_run_is_started_in_a_new_or_empty_directory_and_resumed_in_its_own(tmp_path):
    folder(tmp_path).check(resume=False)
    folder(tmp_path / "new" / "deep").check(resume=False)
    folder(tmp_path / "new").check(resume=True)
    (tmp_path / "metrics.jsonl").write_text("")
    folder(tmp_path).check(resume=True)
    (tmp_path / "config.json").write_text("")  # finished, but perhaps longer training is asked for
    folder(tmp_path).check(resume=True)
    (tmp_path / "metrics.jsonl").unlink()  # not a run: a model that was downloaded
    with pytest.raises(UserError, match="a finished model"):
        folder(tmp_path).check(resume=True)


def test_a_system_without_posix_locks(tmp_path):
    """Such as Windows: nothing is locked, and everything else works. (TRL and others lock differently there.)"""
    program = f"""import pathlib, sys
sys.modules["fcntl"] = None
assert "training" not in sys.modules
import training.classify, training.evaluate, training.plan, training.pretrain
from accelerate import Accelerator
from training.engine.run_folder import RunFolder
first, second = (RunFolder(pathlib.Path({str(tmp_path)!r}), Accelerator()) for _ in range(2))
first.open()
second.check(resume=True)
second.open(resume_step=0)
"""
    Processes(exec, tmp_path.with_name("log"), [program, {}]).wait()


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written .*: pass the name of a new directory"):
        folder(tmp_path / "file").check(resume=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        folder(tmp_path / "new").check(resume=False)


def test_a_read_only_disk_is_refused(mount):
    path = mount("size=64k")
    (path / "metrics.jsonl").write_text("")
    mount("ro")
    for name, resume in (("new", False), ("", True)):
        with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\): pass the name of a new directory"):
            folder(path / name).check(resume)


def test_two_runs_cannot_share_a_directory(tmp_path):
    first = folder(tmp_path)
    first.open()
    first.log_evaluation(1, LMMetrics(1.0, 2.0, 3.0))
    with pytest.raises(UserError, match="another run has just started there"):
        folder(tmp_path).open()
    for refused in (lambda: folder(tmp_path).open(resume_step=0), lambda: folder(tmp_path).check(resume=True)):
        with pytest.raises(UserError, match="another run is writing there. Wait for it to end"):
            refused()
    rows = first.history
    assert rows == [{"step": 1, "eval_loss": 1.0, "eval_perplexity": 2.0, "eval_bits_per_byte": 3.0}]
    del first
    again = folder(tmp_path)
    again.open(resume_step=1)
    assert again.history == rows


def test_a_resumed_run_drops_later_metrics(tmp_path):
    run = folder(tmp_path)
    run.open()
    for step in (0, 5, 10):
        run.log_evaluation(step, LMMetrics(float(step), 2.0, 3.0))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 11, "lo\xff')  # killed while writing
    rows = run.history
    del run
    resumed = folder(tmp_path)
    resumed.open(resume_step=5)
    assert resumed.history == rows[:2]
    resumed.log_evaluation(6, LMMetrics(6.0, 2.0, 3.0))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 5, 6]
    del resumed
    anew = folder(tmp_path)
    anew.open(resume_step=-1)
    assert anew.history == []


def test_results_are_published_all_at_once(tmp_path):
    """Beside the files of the run; after an error nothing is left."""
    (tmp_path / "metrics.jsonl").write_text("")
    with folder(tmp_path).publish() as directory:
        (directory / "config.json").write_text("{}")
        (directory / "weights").write_text("1")
        assert sorted(path.name for path in tmp_path.iterdir()) == [directory.name, "metrics.jsonl"]
    names = ["config.json", "metrics.jsonl", "weights"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names

    def fail():
        with folder(tmp_path).publish() as directory:
            (directory / "config.json").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "config.json").read_text() == "{}"
