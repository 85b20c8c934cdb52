"""Adapter files of another base, and damaged ones. Tests with PEFT are in tests/reference."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_scratchgpt.lora import LoraConfig, add_adapter, load_adapter, save_adapter
from modeling_scratchgpt.lora.files import CONFIG, WEIGHTS
from tests.modeling_scratchgpt.lora.test_adapters import logits, model_of, shake


@pytest.fixture
def saved(tmp_path) -> Path:
    model = model_of()
    add_adapter(model, LoraConfig(r=2))
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {CONFIG, WEIGHTS}
    return tmp_path / "adapter"


def refused(saved: Path, expected: str, **fields: Any) -> None:
    """Loading fails, and does not change a model with one trainable adapter."""
    model = model_of(**fields)
    add_adapter(model, LoraConfig(r=3), "mine")
    before, trained = logits(model), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=expected):
        load_adapter(model, saved)
    assert torch.equal(logits(model), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_an_adapter_of_another_base(saved):
    refused(saved, r"q_proj.lora_A.weight is \(2, 32\), expected \(2, 64\): it or adapter_config.json is", hidden_size=64)
    refused(saved, "has the unknown model.layers.1", num_hidden_layers=1)
    refused(saved, "lacks model.layers.2", num_hidden_layers=3)
    other = model_of()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="was trained on other weights than this model's: load the base it belongs to"):
        load_adapter(other, saved)
    load_adapter(model_of().bfloat16(), saved)


def test_an_adapter_of_a_head_that_shares_its_trained_weight(tmp_path):
    model = model_of()
    add_adapter(model, LoraConfig(r=2, target_modules=["lm_head"], modules_to_save=["embed_tokens"]))
    shake(model)
    save_adapter(model, tmp_path)
    loaded = model_of()
    load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_damaged_adapters(saved):
    whole = (saved / WEIGHTS).read_bytes()
    for content in (b"", whole[:100], whole[:-10]):
        (saved / WEIGHTS).write_bytes(content)
        refused(saved, "adapter_model.safetensors is damaged or not a safetensors file")
    (saved / WEIGHTS).write_bytes(whole)
    tensors = load_file(saved / WEIGHTS)
    name = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, saved / WEIGHTS)
    refused(saved, f"lacks {name.removeprefix('base_model.model.')}")
    for told in ("[1]", '{"a": 1}', '{"a": ["x", 1]}'):
        save_file(tensors, saved / WEIGHTS, {"base": told})
        refused(saved, "adapter_model.safetensors is damaged")
    save_file({**tensors, "more": torch.ones(1)}, saved / WEIGHTS)
    refused(saved, "has the unknown more")
    for content in (b"[1]", b"{", b"\xff", b'{"peft_type": "LORA", "r": "x"}', b'{"peft_type": "LORA", "target_modules": 3}'):
        (saved / CONFIG).write_bytes(content)
        refused(saved, "adapter_config.json: ")
    (saved / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json: it is not an adapter"):
        load_adapter(model_of(), saved)
    with pytest.raises(FileNotFoundError, match="./nowhere is neither a directory nor the id of a repository"):
        load_adapter(model_of(), "./nowhere")


def test_saving_without_an_adapter_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="the model has no adapter 'default': its adapters are: none"):
        save_adapter(model_of(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_base_is_recognised_in_every_precision(saved):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        load_adapter(model_of().to(dtype), saved)


@pytest.mark.parametrize("rank", [3, 2**31, 10**30])
def test_a_rank_other_than_that_of_the_matrices_is_refused_before_allocating(saved, rank):
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**config, "r": rank}))
    refused(saved, rf"q_proj.lora_A.weight is \(2, 32\), expected \({rank}, 32\): it or adapter_config.json is damaged")
