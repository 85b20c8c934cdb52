"""LoRA adapters of a model. Comparisons with PEFT are in tests/reference."""

import copy
import json
from functools import partial
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTForSequenceClassification
from modeling_scratchgpt.lora import (
    LoraConfig,
    LoraLinear,
    add_adapter,
    add_weighted_adapter,
    delete_adapter,
    disable_adapter,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unmerge_adapter,
)
from modeling_scratchgpt.lora.files import CONFIG
from tests.conftest import MODERN, TINY

IDS = torch.arange(24).view(2, 12)


def model_of(**fields: Any) -> ScratchGPTForCausalLM:
    torch.manual_seed(0)
    return ScratchGPTForCausalLM(ScratchGPTConfig(**{**TINY, **fields})).eval()


def shake(model: nn.Module, seed: int = 0) -> None:
    """Perturb the trainable parameters, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits.float()


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_gpt2_124m_with_rank_16_trains_2654208_parameters():
    with torch.device("meta"):
        model = ScratchGPTForCausalLM(ScratchGPTConfig.from_preset("124M"))
        add_adapter(model, LoraConfig(r=16))
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 2_654_208
    assert trainable_parameters(model) == "2,654,208 of 127,094,016 parameters are trained (2.09%)"


@pytest.mark.parametrize("fields", [{}, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_new_adapter_changes_nothing_and_training_never_changes_the_base(fields, use_dora):
    model = model_of(**fields)
    before, state = logits(model), bits(model)
    add_adapter(model, LoraConfig(r=4, use_dora=use_dora))
    torch.testing.assert_close(logits(model), before, atol=1e-6 if use_dora else 0, rtol=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # even with all parameters
    for _ in range(5):
        model.train()(IDS, labels=IDS).loss.backward()
        assert all((parameter.grad is not None) == (".lora_" in name) for name, parameter in model.named_parameters())
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert (logits(model) - before).abs().max() > 1e-3
    with disable_adapter(model):
        assert torch.equal(logits(model), before)
    delete_adapter(model, "default")
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_unmerging_and_saving_the_merged_model(dtype, tie, use_dora, tmp_path):
    model = model_of(tie_word_embeddings=tie).to(dtype)
    state = bits(model)
    add_adapter(model, LoraConfig(r=4, use_dora=use_dora))
    shake(model)
    adapted, most = logits(model), 1e-5 if dtype == torch.float32 else 0.05
    merge_adapter(model)
    assert (logits(model) - adapted).abs().max() < most
    with disable_adapter(model):
        assert all(torch.equal(model.get_parameter(name.replace("_proj.", "_proj.base_layer.")), state[name]) for name in state)
    assert (logits(model) - adapted).abs().max() < most
    unmerge_adapter(model)
    assert torch.equal(logits(model), adapted)
    for each in (model, model.model):
        with pytest.raises(ValueError, match="this model has adapters: save them with `save_adapter`"):
            each.save_pretrained(tmp_path)
    merged = merge_and_unload(model)
    layer = "model.layers.0.mlp.up_proj.weight"
    assert merged.get_parameter(layer).dtype == dtype
    merged.save_pretrained(tmp_path)
    read = ScratchGPTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(read), logits(merged))
    assert (read.lm_head.weight is read.model.embed_tokens.weight) == tie


def test_generation_is_the_same_with_an_adapter_and_merged():
    model = model_of()
    add_adapter(model, LoraConfig(r=4))
    shake(model)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    adapted = model.generate(IDS, **options)
    assert torch.equal(merge_and_unload(model).generate(IDS, **options), adapted)


def test_several_adapters_are_switched_combined_saved_and_deleted(tmp_path):
    model = model_of()
    base = logits(model)
    alone, deltas = {}, {}
    layer_name = "model.layers.1.self_attn.v_proj"
    for seed, name in enumerate(("a", "b")):
        add_adapter(model, LoraConfig(r=2 + seed, lora_alpha=5, target_modules=["v_proj", "up_proj"][: seed + 1]), name)
        shake(model, seed)
        alone[name], deltas[name] = logits(model), model.get_submodule(layer_name).get_delta_weight(name)
    set_adapter(model, "a")
    assert torch.equal(logits(model), alone["a"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"model.layers.{layer}.self_attn.v_proj.lora_{part}.a" for layer in range(2) for part in "AB"}

    set_adapter(model, "a", "b")
    both = logits(model)
    add_weighted_adapter(model, {"a": 1.0, "b": 1.0}, "sum")
    torch.testing.assert_close(logits(model), both)
    add_weighted_adapter(model, {"a": 0.5, "b": -2.0}, "mixed")
    torch.testing.assert_close(model.get_submodule(layer_name).get_delta_weight("mixed"), 0.5 * deltas["a"] - 2 * deltas["b"])
    save_adapter(model, tmp_path, "mixed")
    other = model_of()
    load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), logits(model))
    set_adapter(model)
    assert torch.equal(logits(model), base)
    set_adapter(model, "b", trainable=False)
    assert torch.equal(logits(model), alone["b"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name in ("a", "sum", "mixed"):
        delete_adapter(model, name)
    assert torch.equal(logits(model), alone["b"])
    merged = merge_and_unload(model)
    torch.testing.assert_close(logits(merged), alone["b"], atol=1e-6, rtol=1e-5)


def test_a_new_head_is_trained_in_full_and_saved_with_its_adapter(tmp_path):
    torch.manual_seed(0)
    model = ScratchGPTForSequenceClassification(ScratchGPTConfig(**TINY, num_labels=3)).eval()
    head, before = model.score.weight.detach().clone(), logits(model)
    add_adapter(model, LoraConfig(r=2, modules_to_save=["score"]))
    assert not isinstance(model.score, LoraLinear)
    assert model.score.weight.requires_grad
    shake(model)
    adapted = logits(model)
    with disable_adapter(model):
        assert torch.equal(model.score.weight, head)
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), adapted)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == "SEQ_CLS"
    torch.manual_seed(0)
    other = ScratchGPTForSequenceClassification(ScratchGPTConfig(**TINY, num_labels=3)).eval()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), adapted)
    torch.testing.assert_close(logits(merge_and_unload(other)), adapted, atol=1e-6, rtol=1e-5)


def test_tied_weights_stay_tied_when_trained_in_full():
    model = model_of(tie_word_embeddings=True)
    base = model.lm_head.weight
    add_adapter(model, LoraConfig(r=2, modules_to_save=["lm_head"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight is not base
    shake(model)
    copied = copy.deepcopy(model)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert torch.equal(logits(copied), logits(model))
    delete_adapter(model, "default")
    assert model.lm_head.weight is model.model.embed_tokens.weight is base


def test_an_adapter_of_half_precision_weights_learns_in_float32():
    model = model_of().bfloat16()
    add_adapter(model, LoraConfig(r=2))
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert model(IDS).logits.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.float()(IDS, labels=IDS).loss.backward()


def test_a_quantized_base_is_adapted_but_not_merged(tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    model = model_of(hidden_size=64)
    plain = logits(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    before = logits(model)
    assert 0 < (before - plain).abs().max() < 0.1
    add_adapter(model, LoraConfig(r=4))
    assert torch.equal(logits(model), before)
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    shake(model.eval())
    with pytest.raises(ValueError, match=r"q_proj cannot be merged because it is quantized, sharded or of a special class"):
        merge_adapter(model)
    save_adapter(model, tmp_path)
    other = model_of(hidden_size=64)
    load_adapter(other, tmp_path)
    assert (logits(merge_and_unload(other)) - logits(model)).abs().max() < 0.1
    with pytest.raises(ValueError, match="use_dora needs the plain weight of .* it is quantized, sharded"):
        add_adapter(model, LoraConfig(use_dora=True), "dora")


@pytest.mark.parametrize("bits_", [4, 8])
def test_qlora(bits_, tmp_path):
    """A base in 4 or 8 bits by bitsandbytes, loaded by transformers; the result equals PEFT's."""
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    fields = {"hidden_size": 64, "hidden_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0}
    model_of(**fields).save_pretrained(tmp_path / "base")

    def quantized() -> ScratchGPTForCausalLM:
        config = BitsAndBytesConfig(
            load_in_4bit=bits_ == 4, load_in_8bit=bits_ == 8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        return ScratchGPTForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu").train()

    model = quantized()  # not eval(): on some CPUs bitsandbytes then packs the weights, which cannot be trained
    before = logits(model)
    assert 0 < (before - logits(model_of(**fields))).abs().max() < 0.5
    add_adapter(model, LoraConfig(r=4))
    assert torch.equal(logits(model), before)
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(quantized(), tmp_path / "adapter").train()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="q_proj cannot be merged because it is quantized"):
        merge_adapter(model)


# Regressions ------------------------------------------------------------------------------------------------------------


def test_a_tied_head_that_was_trained_in_full_is_untied_by_merging():
    """Else a later call of `tie_weights`, as by `resize_token_embeddings`, would replace it by the embedding."""
    model = model_of(tie_word_embeddings=True)
    add_adapter(model, LoraConfig(r=2, modules_to_save=["lm_head"], ensure_weight_tying=False))
    shake(model)
    expected = logits(model)
    merge_and_unload(model).tie_weights()
    torch.testing.assert_close(logits(model), expected)
    kept = model_of(tie_word_embeddings=True)
    add_adapter(kept, LoraConfig(r=2))
    assert merge_and_unload(kept).config.tie_word_embeddings


def test_a_tied_head_with_an_adapter_is_untied_by_merging(tmp_path):
    model = model_of(tie_word_embeddings=True)
    before = model.model.embed_tokens.weight.detach().clone()
    add_adapter(model, LoraConfig(r=4, target_modules=["lm_head"]))
    shake(model)
    adapted = logits(model)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-5)
    unmerge_adapter(model)
    assert torch.equal(logits(model), adapted)
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.weight
    merge_and_unload(model).save_pretrained(tmp_path)
    assert torch.equal(model.model.embed_tokens.weight, before)
    torch.testing.assert_close(logits(ScratchGPTForCausalLM.from_pretrained(tmp_path)), adapted, atol=1e-5, rtol=1e-5)


def test_layers_that_share_a_weight_share_it_again_after_unmerging():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    weight = model[0].weight
    before = weight.detach().clone()
    add_adapter(model, LoraConfig(r=2, init_lora_weights=False))
    x = torch.randn(3, 4)
    expected = model(x)
    merge_adapter(model)
    torch.testing.assert_close(model(x), expected)
    unmerge_adapter(model)
    delete_adapter(model, "default")
    assert model[0].weight is model[1].weight is weight
    assert torch.equal(weight, before)
    model.append(model[0])
    with pytest.raises(ValueError, match="0 is used in several places of the model"):
        add_adapter(model, LoraConfig(r=2))


def test_the_first_of_two_matching_patterns_wins_after_saving_too(tmp_path):
    model = model_of()
    patterns = {"q_proj": 2, r"layers\.0\.self_attn\.q_proj": 6, r".*v_proj": 3}
    add_adapter(
        model, LoraConfig(r=4, rank_pattern=patterns, alpha_pattern={"q_proj": 8, r"layers\.0\.self_attn\.q_proj": 640})
    )
    shake(model)
    save_adapter(model, tmp_path)
    other = model_of()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"target_modules": ["v_proj"], "bias": "all"}, {"target_modules": ["q_proj"]}),
        ({"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]}, {"target_modules": ["up_proj"]}),
        ({"target_modules": ["up_proj"]}, {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]}),
        ({"target_modules": ["up_proj"]}, {"target_modules": ["q_proj"], "bias": "all"}),
    ],
)
def test_two_adapters_on_one_layer(first, second, tmp_path):
    model = model_of()
    base, expected = logits(model), {}
    for seed, (name, settings_) in enumerate({"a": first, "b": second}.items()):
        add_adapter(model, LoraConfig(r=2, **settings_), name)
        shake(model, seed)
        expected[name] = logits(model)
    for name in ("a", "b"):
        set_adapter(model, name)
        assert torch.equal(logits(model), expected[name])
        save_adapter(model, tmp_path / name, name)
        other = model_of()
        load_adapter(other, tmp_path / name)
        assert torch.equal(logits(other), expected[name])
        read = peft.PeftModel.from_pretrained(model_of(), tmp_path / name)
        torch.testing.assert_close(logits(read), expected[name], atol=1e-5, rtol=1e-5)
    for name in ("a", "b"):
        delete_adapter(model, name)
    assert torch.equal(logits(model), base)


def test_replaced_parameters_move_with_the_model():
    model = model_of()
    add_adapter(model, LoraConfig(r=2, modules_to_save=["lm_head"]))
    model.bfloat16()
    with disable_adapter(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        logits(model)
    merge_adapter(model)
    model.double()
    unmerge_adapter(model)
    logits(model)
    delete_adapter(model, "default")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_deleting_the_last_adapter_restores_which_parameters_are_frozen():
    model = model_of()
    with disable_adapter(model):
        set_adapter(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.model.norm.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    add_adapter(model, LoraConfig(r=2), "a")
    add_adapter(model, LoraConfig(r=2), "b")
    set_adapter(model, "b", trainable=False)
    delete_adapter(model, "a")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    delete_adapter(model, "b")
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_target_modules_on_disk_select_only_the_adapted_layers(tmp_path):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.b = nn.Linear(4, 4), nn.ModuleDict({"proj": nn.Linear(4, 4)})

    model = Block()
    add_adapter(model, LoraConfig(r=2, target_modules="proj"))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == "proj"
    other = Block()
    other.load_state_dict(
        {name.replace(".base_layer", ""): tensor for name, tensor in bits(model).items() if "lora" not in name}
    )
    load_adapter(other, tmp_path)
    assert not isinstance(other.b["proj"], LoraLinear)


# Errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"rank_pattern": {"q_proj": -1}}, "r must be a positive integer, got -1"),
        ({"lora_alpha": 0}, "lora_alpha must be a positive number, got 0"),
        ({"r": True}, "r must be a positive integer, got True"),
        ({"lora_alpha": "16"}, "lora_alpha must be a positive number, got '16'"),
        ({"rank_pattern": [1]}, r"rank_pattern must map name patterns to numbers, got \[1\]"),
        ({"alpha_pattern": {"*": 3}}, r"alpha_pattern '\*' is not a regular expression: nothing to repeat"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of strings, got 'lm_head'"),
        ({"layers_to_transform": (0, 1)}, r"layers_to_transform must be a number or a list of numbers, got \(0, 1\)"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1, got 1.0"),
        ({"bias": "some"}, "bias must be 'none', 'all' or 'lora_only', got 'some'"),
        ({"target_modules": 3}, "target_modules must be a string or a list of strings, got 3"),
        ({"modules_to_save": ["score", None]}, r"modules_to_save must be a list of strings, got \['score', None\]"),
        ({"target_modules": "(q_proj"}, r"target_modules '\(q_proj' is not a regular expression: missing \)"),
        ({"init_lora_weights": "olora"}, "init_lora_weights must be True, False or 'gaussian', got 'olora'"),
        ({"r": 33}, r"r is 33, but model.layers.0.self_attn.q_proj is 32 x 32: its rank is at most 32"),
        (
            {"target_modules": ["c_attn"]},
            r"target_modules \['c_attn'\] selects no layer; the linear layers here are down_proj, ",
        ),
        ({"target_modules": ["norm"]}, "target_modules selects model.norm, a LayerNorm: only nn.Linear is supported"),
        ({"layers_to_transform": 7}, "target_modules 'all-linear' selects no layer"),
        ({"modules_to_save": ["score"]}, "modules_to_save contains 'score', but the model has no such module with parameters"),
    ],
)
def test_invalid_settings_are_refused(values, expected):
    model = model_of()
    state = bits(model)
    with pytest.raises(ValueError, match=expected):
        add_adapter(model, LoraConfig(**values))
    assert model.state_dict().keys() == state.keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_conv1d_of_transformers_gpt2_is_named():
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=3))
    with pytest.raises(
        ValueError, match=r"target_modules selects transformer.h.0.attn.c_attn, a Conv1D: only nn.Linear is supported"
    ):
        add_adapter(model, LoraConfig(target_modules=["c_attn"]))


def test_names_of_adapters():
    model = model_of()
    with pytest.raises(ValueError, match="the model has no adapter 'a': its adapters are: none"):
        set_adapter(model, "a")
    add_adapter(model, LoraConfig(r=2), "a")
    with pytest.raises(ValueError, match="adapter_name 'a' is taken"):
        add_adapter(model, LoraConfig(r=2), "a")
    with pytest.raises(ValueError, match=r"adapter_name 'b\.c' is taken, reserved or not a word of letters and digits"):
        add_adapter(model, LoraConfig(r=2), "b.c")
    for name in ("train", "training", "keys", None, 3):
        with pytest.raises(ValueError, match="is taken, reserved or not a word of letters and digits"):
            add_adapter(model, LoraConfig(r=2), name)
    with pytest.raises(ValueError, match="the weight of adapter 'a' must be a number, got nan"):
        add_weighted_adapter(model, {"a": float("nan")}, "c")
    merge_adapter(model)
    with pytest.raises(ValueError, match="has an adapter merged into it: call `unmerge_adapter` first"):
        add_adapter(model, LoraConfig(r=2), "b")
    unmerge_adapter(model)
    add_adapter(model, LoraConfig(r=2, use_dora=True), "dora")
    with pytest.raises(ValueError, match="adapter 'dora' uses DoRA or trains parameters in full: it cannot be combined"):
        set_adapter(model, "a", "dora")
    with pytest.raises(ValueError, match="adapter 'dora' uses DoRA"):
        add_weighted_adapter(model, {"a": 1.0, "dora": 1.0}, "sum")


@pytest.fixture
def _process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), DistributedDataParallel, nn.DataParallel])
def test_wrapped_models(wrap, tmp_path):
    """The functions refuse a wrapper or a part by name; the wrapper computes with what is done to the model inside."""
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), torch.randn(2, 6)
    expected = model(x)
    with pytest.raises(ValueError, match="adapters belong to the whole model, not to this .*: pass the model that"):
        add_adapter(wrap(model), LoraConfig(r=2))
    add_adapter(model, LoraConfig(r=2, init_lora_weights=False))
    wrapped = wrap(model)
    adapted = wrapped(x)
    assert (adapted - expected).abs().max() > 0.01
    for change in (
        lambda: disable_adapter(wrapped).__enter__(), lambda: set_adapter(wrapped, "default"), lambda: merge_adapter(wrapped),
        lambda: unmerge_adapter(wrapped), lambda: merge_and_unload(wrapped), lambda: delete_adapter(wrapped, "default"),
        lambda: add_weighted_adapter(wrapped, {"default": 1.0}, "sum"), lambda: save_adapter(wrapped, tmp_path),
        lambda: set_adapter(model[0]), lambda: merge_and_unload(model[0]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"not to this ({type(wrapped).__name__}|LoraLinear): pass the model that"):
            change()
    torch.testing.assert_close(wrapped(x), adapted)  # nothing was changed
    with disable_adapter(model):
        torch.testing.assert_close(wrapped(x), expected)
    merge_adapter(model)
    torch.testing.assert_close(wrapped(x), adapted)
    unmerge_adapter(model)
    torch.testing.assert_close(wrapped(x), adapted)
