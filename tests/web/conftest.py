"""The exports that the tests of the page and of its server read."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import made_once
from tests.web.pages import BEYOND, CLASSIFIERS, LANGUAGE_MODELS, edit_json, export, quantize, save_model


@pytest.fixture(scope="session")
def exports(tmp_path_factory) -> dict[str, Path]:
    """ONNX exports: a chat and a completion model in 32 bits, which compute what Python computes, and an 8-bit classifier."""

    def make(directory: Path) -> None:
        for kind in ("chat", "markup", "characters", "classifier"):
            save_model(kind, directory / f"{kind}-model")
            export(directory / f"{kind}-model", directory / kind, "--attentions")
        quantize(directory / "classifier")
        for kind in ("chat", "markup", "characters"):
            edit_json(directory / kind / "config.json", **{"transformers.js_config": {"dtype": "fp32"}})
        file = directory / "markup" / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "content": BEYOND, "id": 1000})
        file.write_text(json.dumps(tokenizer))
        shutil.copytree(directory / "chat", directory / "completion")
        edit_json(directory / "completion" / "tokenizer_config.json", chat_template=None)
        for kind in ("regression", "multi_label_classification"):
            shutil.copytree(directory / "classifier", directory / kind)
            edit_json(directory / kind / "config.json", problem_type=kind)

    directory = made_once(tmp_path_factory, "exports", make)
    return {kind: directory / kind for kind in (*LANGUAGE_MODELS, *CLASSIFIERS)}
