"""Runs that go on from a model that is there already, whole or with LoRA."""

import json
import re
import shutil
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from modeling_scratchgpt import ScratchGPTForCausalLM, ScratchGPTTokenizer
from modeling_scratchgpt.lora import load_adapter
from tests.training.conftest import launch, rows
from tests.training.test_surviving import LAUNCHERS, kill_when, start, steps_done
from training import pretrain
from training.engine.checkpoints import frozen_digest
from training.engine.pretrained import load_config_and_tokenizer, load_tokenizer
from training.errors import UserError

FURTHER = [
    "--context_length", "32", "--batch_size", "4", "--max_steps", "14", "--eval_steps", "8", "--save_steps", "4",
    "--validation_fraction", "0.1", "--report_to", "none",
]  # fmt: skip
LORA = [*FURTHER, "--lora_r", "4", "--lora_dropout", "0.1"]


@pytest.fixture(scope="module")
def adapted(run, book, caches, tmp_path_factory):
    """A finished run with LoRA, and its base."""
    base, folder = run[0], tmp_path_factory.mktemp("adapted") / "run"
    before = (base / "model.safetensors").read_bytes()
    process = launch(LAUNCHERS[1], "--dataset", book, "--base_model", str(base), *LORA, "--output_dir", str(folder), **caches)
    assert process.returncode == 0, process.stderr
    assert (base / "model.safetensors").read_bytes() == before
    return base, folder, process.stdout


def test_a_run_with_lora_leaves_the_merged_model_and_the_adapter(adapted):
    base, folder, said = adapted
    assert "LoRA: 4,352 of " in said
    losses = [row["loss"] for row in rows(folder) if "learning_rate" not in row]
    assert losses[-1] < losses[0]
    merged, ids = AutoModelForCausalLM.from_pretrained(folder), torch.arange(20)[None]
    ours = ScratchGPTForCausalLM.from_pretrained(base)
    load_adapter(ours, folder / "adapter")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
    with torch.no_grad():
        expected = merged(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert "trained further from book with ScratchGPT" in (folder / "README.md").read_text()
    ScratchGPTTokenizer.from_pretrained(folder)


def test_its_checkpoints_hold_the_adapter_alone(adapted):
    _, folder, _ = adapted
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        names = load_file(checkpoint / "model.safetensors").keys()
        assert names
        assert all(".lora_" in name for name in names)
        assert all(".lora_" in name for name in load_file(checkpoint / "optimizer.safetensors"))


def test_a_killed_run_ends_with_the_same_bits(adapted, book, caches, tmp_path):
    """Killed after a step at which the held-out data was looked at."""
    base, straight, _ = adapted
    folder = tmp_path / "killed"
    options = ["--dataset", book, "--base_model", str(base), *LORA, "--output_dir", str(folder)]
    killed = start(LAUNCHERS[1], *options, **caches)
    assert kill_when(killed, lambda: steps_done(folder) >= 10)
    resumed = launch(LAUNCHERS[1], *options, "--resume", **caches)
    assert resumed.returncode == 0, resumed.stderr
    assert "Going on after step 8" in resumed.stdout
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        ends = [load_file(run / file) for run in (folder, straight)]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_a_run_does_not_go_on_from_another_base(adapted, book, tmp_path, monkeypatch):
    """And an adapter's folder is no base."""
    base, folder, _ = adapted
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(folder / "checkpoints", tmp_path / "run" / "checkpoints")
    shutil.copy(folder / "metrics.jsonl", tmp_path / "run")
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob("step-*/state.json")).read_text())
    model = ScratchGPTForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 0.01
    model.save_pretrained(tmp_path / "base")
    assert frozen_digest(ScratchGPTForCausalLM.from_pretrained(base).requires_grad_(False)) != frozen_digest(
        ScratchGPTForCausalLM.from_pretrained(tmp_path / "base").requires_grad_(False)
    )
    assert len(state["frozen"]) == 64
    words = ["--dataset", book, "--output_dir", str(tmp_path / "out"), *FURTHER, "--base_model", str(folder / "adapter")]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
    with pytest.raises(UserError, match="holds an adapter: merge it into its model, and give the folder of that"):
        pretrain.main()


def test_gpt2s_own_folder_is_trained_further(real_data, book, caches, tmp_path):
    files = real_data / "gpt2-tokenizer"
    GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=3, n_positions=64)).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "vocab.json").write_bytes((files / "encoder.json").read_bytes())
    (tmp_path / "gpt2" / "merges.txt").write_bytes((files / "vocab.bpe").read_bytes())
    options = ["--dataset", book, "--base_model", str(tmp_path / "gpt2"), *FURTHER, "--max_steps", "4"]
    process = launch(LAUNCHERS[1], *options, "--output_dir", str(tmp_path / "out"), **caches)
    assert process.returncode == 0, process.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"], config["max_position_embeddings"]) == ("scratchgpt", 50257, 64)
    losses = [row["loss"] for row in rows(tmp_path / "out") if "learning_rate" not in row]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lora_r", "4"], "--lora_r 4 adapts a model that is there already: give it by --base_model"),
        (["--base_model", "BASE", "--use_dora", "True"], "--use_dora True is for LoRA: give its rank by --lora_r"),
        (["--base_model", "BASE", "--lora_r", "4", "--lora_target_modules", "all-linear", "q_proj"], "give all-linear alone"),
        (["--base_model", "nowhere"], "--base_model nowhere cannot be loaded"),
        (["--base_model", "BASE", "--context_length", "64"], "--context_length 64 is longer than the 32 positions of"),
        (["--base_model", "BASE", "--lora_r", "-1"], "r must be a positive integer, got -1"),
        (["--base_model", "BASE", "--lora_r", "99"], "r is 99, but model.layers.0.self_attn.q_proj is 32 x 32"),
        (["--base_model", "BASE", "--lora_r", "4", "--lora_target_modules", "c_attn"], "selects no layer; the linear layers"),
    ],
)
def test_mistakes_end_in_one_line(words, expected, run, book, tmp_path, monkeypatch):
    words = [str(run[0]) if word == "BASE" else word for word in words]
    arguments = ["--dataset", book, "--output_dir", str(tmp_path / "out"), *FURTHER, *words]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    with pytest.raises(UserError, match=re.escape(expected)):
        pretrain.main()
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"outputs/pretrain is no folder: .*, or train it first, by training/pretrain\.py\."):
        load_config_and_tokenizer("outputs/pretrain", 8)
    (tmp_path / "outputs" / "pretrain").mkdir(parents=True)
    (tmp_path / "outputs" / "pretrain" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="outputs/pretrain holds a run that did not finish: go on with it first, by --resume"):
        load_config_and_tokenizer("outputs/pretrain", 8)


def test_a_tokenizer_that_makes_its_library_panic_is_refused(run, tmp_path):
    """A panic of Rust's is no `Exception` in Python."""
    shutil.copytree(run[0], tmp_path / "model", ignore=shutil.ignore_patterns("checkpoints"))
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["continuing_subword_prefix"] = "longer than a token"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"model: its tokenizer cannot be loaded \(tokenizers panicked: "):
        load_tokenizer(str(tmp_path / "model"), trust_remote_code=False)
