"""Base models: which are accepted, and the errors about the others."""

import json
import shutil

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from tests.training.conftest import evaluations
from training import pretrain
from training.engine.pretrained import load_config_and_tokenizer, load_tokenizer
from training.errors import UserError


def test_continued_pretraining_of_gpt2s_own_directory(real_data, tune, tmp_path):
    files = real_data / "gpt2-tokenizer"
    GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=3, n_positions=64)).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "vocab.json").write_bytes((files / "encoder.json").read_bytes())
    (tmp_path / "gpt2" / "merges.txt").write_bytes((files / "vocab.bpe").read_bytes())
    folder = tune(pretrain, "--max_steps", "4", base=tmp_path / "gpt2")
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"], config["max_position_embeddings"]) == ("scratchgpt", 50257, 64)
    losses = [row["eval_loss"] for row in evaluations(folder)]
    assert losses[-1] < losses[0]
    assert "A small GPT, fine-tuned from gpt2 with ScratchGPT" in (folder / "README.md").read_text()


def test_the_adapter_of_a_model_is_not_a_base(tune):
    folder = tune(pretrain, "--lora_r", "2", "--max_steps", "1")
    with pytest.raises(UserError, match="contains an adapter: merge it into its model, and pass the directory of that"):
        tune(pretrain, base=folder / "adapter", output="other")


def test_the_default_base_before_it_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"outputs/pretrain is not a directory: .*, or train it first, with training/pretrain\.py\."
    ):
        load_config_and_tokenizer("outputs/pretrain", 8)
    (tmp_path / "outputs" / "pretrain").mkdir(parents=True)
    (tmp_path / "outputs" / "pretrain" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="outputs/pretrain contains an unfinished run: finish it, with --resume, or"):
        load_config_and_tokenizer("outputs/pretrain", 8)


def test_a_tokenizer_that_makes_its_library_panic(run, tmp_path):
    """A panic in Rust is not an `Exception` in Python."""
    shutil.copytree(run, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoints"))
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["continuing_subword_prefix"] = "longer than a token"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"model: its tokenizer cannot be loaded \(tokenizers panicked: "):
        load_tokenizer(str(tmp_path / "model"), trust_remote_code=False)
