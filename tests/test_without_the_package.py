"""A saved directory works in a process that cannot import the package."""

import json
import os
import subprocess
import sys

import pytest
import torch

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
from tests.conftest import MODERN, TINY, WITHOUT_THE_PACKAGE, shaken

PROGRAM = (
    WITHOUT_THE_PACKAGE
    + """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

results = []
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    backbone = AutoModel.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer("to be or not", return_tensors="pt")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    generate = pipeline("text-generation", model=folder, trust_remote_code=True)
    with torch.no_grad():
        results.append({
            "classes": [type(thing).__name__ for thing in (config, tokenizer, model, backbone, generate.model)],
            "modules": [type(model).__module__.split(".")[0], type(tokenizer).__module__.split(".")[0]],
            "ids": inputs["input_ids"][0].tolist(),
            "logits": model(**inputs).logits[0, -1].tolist(),
            "hidden": backbone(**inputs).last_hidden_state[0, -1].tolist(),
            "text": generate("to be or not", max_new_tokens=8, do_sample=False)[0]["generated_text"],
        })
    arguments = TrainingArguments(folder + "-trainer", use_cpu=True, report_to=[], label_smoothing_factor=0.1)
    batch = {**inputs, "labels": inputs["input_ids"]}
    results[-1]["smoothed"] = Trainer(model=model, args=arguments).compute_loss(model, batch).item()
    model.save_pretrained(folder + "-again")
    tokenizer.save_pretrained(folder + "-again")

    from peft import IA3Config, get_peft_model  # after the model was loaded

    results[-1]["adapted"] = sorted(get_peft_model(model, IA3Config()).targeted_module_names)
print("RESULTS" + json.dumps(results))
"""
)


def test_auto_classes_and_pipeline_need_only_the_directory(tmp_path):
    tokenizer = ScratchGPTTokenizer.train(["to be or not to be, that is the question"] * 9, 290)
    inputs = tokenizer("to be or not", return_tensors="pt")
    folders = [tmp_path / "gpt2", tmp_path / "modern"]
    for folder, shape in zip(folders, ({}, MODERN), strict=True):
        shaken(ScratchGPTForCausalLM(ScratchGPTConfig(**TINY, **shape)), 0.2).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", PROGRAM, *map(str, folders)]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stderr
    for folder, result in zip(folders, json.loads(process.stdout.split("RESULTS")[1]), strict=True):
        assert result["classes"] == [
            "ScratchGPTConfig", "ScratchGPTTokenizer", "ScratchGPTForCausalLM", "ScratchGPTModel", "ScratchGPTForCausalLM",
        ]  # fmt: skip
        assert result["modules"] == ["transformers_modules", "transformers_modules"]
        assert result["ids"] == inputs["input_ids"][0].tolist()
        model = ScratchGPTForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(result["logits"]), model(**inputs).logits[0, -1])
            log_probabilities = model(**inputs).logits[0, :-1].log_softmax(-1)
            torch.testing.assert_close(torch.tensor(result["hidden"]), model.model(**inputs).last_hidden_state[0, -1])
        # Trainer shifts the labels of the classes it knows by name.
        nll = -log_probabilities[range(len(inputs["input_ids"][0]) - 1), inputs["input_ids"][0, 1:]].mean()
        assert result["smoothed"] == pytest.approx((0.9 * nll - 0.1 * log_probabilities.mean()).item(), rel=1e-5)
        assert result["text"].startswith("to be or not")
        names = [f"model.layers.{layer}.{name}_proj" for layer in (0, 1) for name in ("mlp.down", "self_attn.q", "self_attn.v")]
        assert result["adapted"] == names
        # What was loaded there and saved again is as complete as what was loaded.
        again = folder.with_name(f"{folder.name}-again")
        assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()}
        found, expected = (json.loads((path / "config.json").read_text())["auto_map"] for path in (again, folder))
        assert found == expected


def test_a_subclass_is_saved_as_the_class_whose_files_are_saved(tmp_path):
    """Whether it is defined in a script or in a module, its own code would not load without this package."""
    model = ScratchGPTForCausalLM(ScratchGPTConfig(**TINY))
    model.save_pretrained(tmp_path / "expected")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    for module in ("__main__", __name__):
        model.__class__ = type("Mine", (ScratchGPTForCausalLM,), {"__module__": module})
        model.save_pretrained(tmp_path / module)
        assert {path.name: path.read_bytes() for path in (tmp_path / module).iterdir()} == expected
        assert type(model).__name__ == "Mine"
