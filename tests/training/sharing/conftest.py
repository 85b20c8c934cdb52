"""A finished model to upload, and a Hub on this machine to upload it to."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

import hub_upload
from tests.hub_server import Hub

UPLOADED = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "loss.png", "metrics.jsonl", "attention.py", "configuration_scratchgpt.py", "cross_entropy.py", "interchange.py",
    "modeling_scratchgpt.py", "packed_linear.py", "tokenization_scratchgpt.py",
}  # fmt: skip


@pytest.fixture
def hub():
    server = Hub()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def model(run, tmp_path) -> Path:
    """The directory of a finished run with a license, and with files that must not be uploaded."""
    directory = shutil.copytree(run, tmp_path / "book")
    edit_card(directory, "---\n", "---\nlicense: apache-2.0\n")
    (directory / ".env").write_text("KEY=1")
    (directory / "notes.txt").write_text("mine")
    (directory / "optimizer.pt").write_bytes(b"0")
    return directory


def edit_card(directory: Path, old: str, new: str) -> None:
    card = directory / "README.md"
    card.write_text(card.read_text().replace(old, new, 1))


@pytest.fixture
def upload(hub, tmp_path, monkeypatch, capsys):
    """Run `hub_upload.py` in this process, without those parts that take seconds: see `test_checks.py` and `test_page.py`."""
    monkeypatch.setattr("training.sharing.checks.check_loads", lambda *_: None)
    export = tmp_path / "export"
    (export / "onnx").mkdir(parents=True)
    (export / "onnx" / "model.onnx").write_bytes(b"graph")
    (export / "README.md").write_text('# book\n\n```js\npipeline("PATH_OR_HUB_ID");\n```\n\n## Size\n\n- 8 bits: 7.0 MB\n')
    (export / "held_out.jsonl").write_text("{}")  # must not be uploaded
    (export / "config.json").write_text("{}")
    monkeypatch.setattr("hub_upload.export", lambda directory: (export, ""))
    monkeypatch.setattr("hub_upload.check_page", lambda directory: "The page was started.")
    changed = {"ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    changed["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in (changed | {"HF_TOKEN_PATH": str(tmp_path / "no_token")}).items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)

    def run_main(*argv: object, token: str = "hf_ann") -> str:
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(sys, "argv", ["hub_upload.py", *map(str, argv)])
        hub_upload.main()
        return capsys.readouterr().out

    return run_main


def hub_environment(hub: Hub, tmp_path: Path, token: str = "hf_ann") -> dict[str, str]:
    """Environment variables that point a process to the Hub on this machine, with an empty cache."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    changed = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    return {**inherited, **changed, **({"HF_TOKEN": token} if token else {})}


def run_python(*argv: object, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **options)  # type: ignore[call-overload]
