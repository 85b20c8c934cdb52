"""The output directory of a run: its files, its lock, its metrics, and the model that is published there at the end.

OUTPUT_DIR/
    metrics.jsonl        one JSON object per step and per evaluation; locked by the run that writes it
    checkpoints/         see checkpoints.py
    logs/                of trackers that write files
    config.json, ...     the model directory, published atomically at the end
"""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from modeling_scratchgpt.atomic import atomic_directory, remove_abandoned
from training.errors import UserError, explain_errors

METRICS, CHECKPOINTS, LOGS = "metrics.jsonl", "checkpoints", "logs"
CARD, CURVE, ADAPTER = "README.md", "loss.png", "adapter"  # every recipe writes a card and a curve; LoRA an adapter
SCORES = "metrics.json"  # final metrics, of fine-tuned models
PREDICTIONS, MISTAKES = "predictions.png", "mistakes.md"  # of a classifier
RESPONSES, RESPONSES_PAGE = "responses.jsonl", "responses.md"  # of a model that follows instructions


class RunFolder:
    """The output directory of one run, which `open` creates.

    Attributes:
        history: the rows of metrics.jsonl: `step`, `loss`, `grad_norm`, `tokens`, `seconds`, `learning_rate` (AdamW's) and
            `muon_learning_rate` (with Muon) of an optimizer step; `step` and the metrics, with the prefix `eval_`, of an
            evaluation; with `whole_eval_`, of one on all of the held-out data after others on a part. Only on the main process.
    """

    def __init__(self, path: Path, accelerator: Accelerator):
        self.path, self.checkpoints = path, path / CHECKPOINTS
        self.accelerator = accelerator
        self.history: list[dict[str, Any]] = []

    def check(self, resume: bool) -> None:
        """Refuse a directory that is not empty; with `resume`, only one without a run. Nothing is overwritten.

        Raises:
            UserError: the directory is not empty, is not a directory, or cannot be written; another run is writing there.
        """
        resumes = resume and (self.path / METRICS).exists()
        if not self._check_writable() or resumes or self._remove_unused():
            return
        if (self.path / "config.json").exists():
            problem = "already contains a finished model: pass another --output_dir, or move it"
        elif not (self.path / METRICS).exists():
            problem = "is not empty: pass another --output_dir, or move it"
        else:
            problem = "already contains an unfinished run: resume it with --resume, or pass another --output_dir"
        raise UserError(f"--output_dir {self.path} {problem}.")

    def _remove_unused(self) -> bool:
        """Remove the metrics of a run that has ended before its first step; True if there is nothing else but logs."""
        metrics = self.path / METRICS
        if {path.name for path in self.path.iterdir()} - {METRICS, LOGS}:
            return False
        content = metrics.read_bytes() if metrics.exists() else b""
        is_unused = not content or (content.startswith(b'{"step": 0, ') and content.count(b"\n") == 1)
        if is_unused:
            metrics.unlink(missing_ok=True)
        return is_unused

    def _check_writable(self) -> bool:
        """True if the directory exists and is not empty."""
        try:
            str(self.path).encode()
            exists = self.path.is_dir()
            if (self.path / METRICS).exists():
                self._acquire_lock("r+b").close()
            if exists and any(self.path.iterdir()):
                return True
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            if not exists:
                self.path.rmdir()  # it is created again with the first result
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            problem = f"--output_dir {self.path!s:.200} cannot be written ({reason})"
            raise UserError(f"{problem}: pass the name of a new directory.") from error
        return False

    def _acquire_lock(self, mode: str) -> Any:
        """Open metrics.jsonl and lock it, on systems that have such locks, until the file is closed."""
        file: Any = open(self.path / METRICS, mode)  # noqa: SIM115
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ModuleNotFoundError:
            pass  # Windows
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.close()
                problem = f"--output_dir {self.path}: another run is writing there"
                raise UserError(f"{problem}. Wait for it to end, or pass another directory.") from error
            # Other errors: a file system without locks, where other runs cannot be detected.
        return file

    def open(self, resume_step: int | None = None) -> None:
        """Create the directory, lock it for this run, and read the metrics back.

        Args:
            resume_step: the step that the run resumes from; rows of later steps are dropped. None for a new run.

        Raises:
            UserError: another run was faster.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.accelerator.is_main_process:
            return
        resumes = resume_step is not None and (self.path / METRICS).exists()
        try:
            self._file = self._acquire_lock("r+b" if resumes else "x+b")
        except FileExistsError as error:
            raise UserError(f"--output_dir {self.path}: another run has just started there, pass another.") from error
        remove_abandoned(self.path)
        kept = 0  # bytes
        with suppress(ValueError, TypeError, LookupError):  # the run was killed while it wrote the last line
            for line in self._file.read().splitlines(keepends=True):
                row = json.loads(line)
                if row["step"] > resume_step or not line.endswith(b"\n"):
                    break
                self.history.append(row)
                kept += len(line)
        os.truncate(self.path / METRICS, kept)

    def log_step(self, step: Any) -> None:
        """Append a `Step` of the training loop to metrics.jsonl, and send it to the trackers."""
        values = {name: value for name, value in asdict(step).items() if value is not None}
        self._log(values.pop("number"), values, "train/")

    def log_evaluation(self, step: int, metrics: Any, prefix: str = "eval_") -> None:
        """The same for the metrics of an evaluation after this step, a dataclass."""
        self._log(step, {prefix + name: value for name, value in asdict(metrics).items()}, "eval/")

    def _log(self, step: int, values: dict[str, Any], prefix: str) -> None:
        self.accelerator.log({prefix + name.removeprefix("eval_"): value for name, value in values.items()}, step=step)
        if self.accelerator.is_main_process:
            self.history.append({"step": step, **values})
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.history[-1]) + "\n")

    @contextmanager
    def publish(self) -> Iterator[Path]:
        """Yield a temporary directory; its files appear in this one when all of them are written, `config.json` last."""
        with explain_full_disk(self.path), atomic_directory(self.path) as temporary:
            yield temporary


def explain_full_disk(directory: Path) -> AbstractContextManager[None]:
    """Turn the errors of safetensors, which hide the system's, into one line."""
    remedy = ": free some space, then use --resume"
    return explain_errors(f"{directory} cannot be written", SafetensorError, remedy=remedy)
