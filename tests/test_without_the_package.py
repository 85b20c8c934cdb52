"""A saved directory works in a process that cannot import the package."""

import json
import os
import subprocess
import sys

import pytest
import torch

from modeling_scratchgpt import ScratchGPTTokenizer
from tests.conftest import WITHOUT_THE_PACKAGE

PROGRAM = (
    WITHOUT_THE_PACKAGE
    + """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
backbone = AutoModel.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("to be or not", return_tensors="pt")
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
generate = pipeline("text-generation", model=folder, trust_remote_code=True)
with torch.no_grad():
    result = {
        "classes": [type(thing).__name__ for thing in (config, tokenizer, model, backbone, generate.model)],
        "modules": [type(model).__module__.split(".")[0], type(tokenizer).__module__.split(".")[0]],
        "ids": inputs["input_ids"][0].tolist(),
        "logits": model(**inputs).logits[0, -1].tolist(),
        "hidden": backbone(**inputs).last_hidden_state[0, -1].tolist(),
        "text": generate("to be or not", max_new_tokens=8, do_sample=False)[0]["generated_text"],
    }
model.save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
print("RESULT" + json.dumps(result))
"""
)


@pytest.fixture
def folder(tiny_model, tmp_path):
    tokenizer = ScratchGPTTokenizer.train(["to be or not to be, that is the question"] * 9, 290)
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load_elsewhere(folder, tmp_path) -> dict:
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / "again")],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.split("RESULT")[1])


def test_auto_classes_and_pipeline_need_only_the_directory(tiny_model, folder, tmp_path):
    result = load_elsewhere(folder, tmp_path)
    tokenizer = ScratchGPTTokenizer.from_pretrained(folder)
    inputs = tokenizer("to be or not", return_tensors="pt")
    assert result["classes"] == [
        "ScratchGPTConfig", "ScratchGPTTokenizer", "ScratchGPTForCausalLM", "ScratchGPTModel", "ScratchGPTForCausalLM",
    ]  # fmt: skip
    assert result["modules"] == ["transformers_modules", "transformers_modules"]
    assert result["ids"] == inputs["input_ids"][0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(result["logits"]), tiny_model(**inputs).logits[0, -1])
        torch.testing.assert_close(torch.tensor(result["hidden"]), tiny_model.model(**inputs).last_hidden_state[0, -1])
    assert result["text"].startswith("to be or not")
    # What was loaded there and saved again is as complete as what was loaded.
    again = tmp_path / "again"
    assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()}
    assert (
        json.loads((again / "config.json").read_text())["auto_map"]
        == json.loads((folder / "config.json").read_text())["auto_map"]
    )
