"""Logits, losses, gradients and greedy text, compared with transformers' models of the same weights."""

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from accelerate.big_modeling import attach_layerwise_casting_hooks
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM, StaticCache

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM
from tests.conftest import MODERN, TINY, shaken

GPT2_NAMES = {
    "model.embed_tokens": "transformer.wte", "model.embed_positions": "transformer.wpe", "model.layers": "transformer.h",
    "model.norm": "transformer.ln_f", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj", "self_attn.q_proj": "attn.c_attn", "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}  # fmt: skip


def gpt2_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert a state dict to `GPT2LMHeadModel`: query, key and value in one matrix, matrices transposed for Conv1D."""
    result = {}
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            tensor = torch.cat([state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
        is_matrix = tensor.ndim == 2 and "_proj" in name
        for ours, theirs in GPT2_NAMES.items():
            name = name.replace(ours, theirs)
        result[name] = tensor.T if is_matrix else tensor
    return result


def pair_with_gpt2(ours: ScratchGPTForCausalLM) -> GPT2LMHeadModel:
    """transformers' GPT-2 with the same weights, and without dropout."""
    names = {"n_positions": "max_position_embeddings", "n_embd": "hidden_size", "n_layer": "num_hidden_layers"}
    names |= {"vocab_size": "vocab_size", "n_head": "num_attention_heads"}
    fields: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    fields |= {"bos_token_id": None, "eos_token_id": None}
    theirs = GPT2LMHeadModel(GPT2Config(**fields, **{name: getattr(ours.config, mine) for name, mine in names.items()}))
    theirs.load_state_dict(gpt2_state_dict(ours.state_dict()))
    return theirs.eval()


def pair_with_qwen3(ours: ScratchGPTForCausalLM) -> Qwen3ForCausalLM:
    names = ("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    names += ("num_attention_heads", "num_key_value_heads", "rope_parameters", "tie_word_embeddings")
    fields = {name: copy.copy(getattr(ours.config, name)) for name in names}
    theirs = Qwen3ForCausalLM(Qwen3Config(**fields, rms_norm_eps=ours.config.norm_eps))
    theirs.load_state_dict(ours.state_dict())  # the names are the same
    return theirs.eval()


def test_gpt2_124m_gives_the_same_logits_and_gradients():
    ours = shaken(ScratchGPTForCausalLM(ScratchGPTConfig.from_preset("124M")), amount=0.01)
    theirs = pair_with_gpt2(ours)
    ids = torch.randint(0, 50257, (2, 64))
    results = [model(ids, labels=ids) for model in (ours, theirs)]
    assert (results[0].logits - results[1].logits).abs().max() < 1e-4
    for result in results:
        result.loss.backward()
    our_gradients = gpt2_state_dict({name: parameter.grad for name, parameter in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        assert (our_gradients[name] - parameter.grad).abs().max() < 1e-4, name


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0, "original_max_position_embeddings": 16}
CONFIGS = {
    "gpt2": (ScratchGPTConfig(**TINY), pair_with_gpt2),
    "qwen3": (ScratchGPTConfig(**TINY, **MODERN), pair_with_qwen3),
    "qwen3-untied-wide-heads": (
        ScratchGPTConfig(**TINY, **MODERN, tie_word_embeddings=False, head_dim=16, intermediate_size=50),
        pair_with_qwen3,
    ),
    "qwen3-scaled-positions": (ScratchGPTConfig(**TINY, **MODERN, rope_parameters=YARN), pair_with_qwen3),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_same_logits_loss_and_gradients(name, attention):
    config, pair = CONFIGS[name]
    ours = shaken(ScratchGPTForCausalLM(config))
    ours.set_attn_implementation(attention)
    theirs = pair(ours)
    ids = torch.randint(3, config.vocab_size, (3, 40))
    labels = ids.clone()
    labels[:, :7] = -100

    results = [model(ids, labels=labels) for model in (ours, theirs)]
    torch.testing.assert_close(results[0].logits, results[1].logits, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(results[0].loss, results[1].loss)
    for result in results:
        result.loss.backward()
    our_gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    if name == "gpt2":
        our_gradients = gpt2_state_dict(our_gradients)
    for parameter_name, parameter in theirs.named_parameters():
        torch.testing.assert_close(our_gradients[parameter_name], parameter.grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
@pytest.mark.parametrize(
    "make_cache", [None, DynamicCache, partial(StaticCache, max_cache_len=13)], ids=["no", "dynamic", "static"]
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_masks_of_every_width(name, make_cache, attention):
    """Masks may be preallocated for more tokens. The reference gets positions, which our model counts from the mask."""
    config, pair = CONFIGS[name]
    ours = shaken(ScratchGPTForCausalLM(config))
    theirs = pair(ours)
    ids = torch.randint(3, config.vocab_size, (3, 10))
    exact = torch.ones_like(ids)
    exact[0, :4] = exact[1, -2:] = 0  # padding on the left, on the right and none
    start = 7 if make_cache else 0  # of the new tokens

    def logits(model, mask):
        model.set_attn_implementation(attention)
        cache = make_cache and make_cache(config=config)
        positions = (exact.cumsum(-1) - 1).clamp(min=0)
        old, new = ({} if model is ours else {"position_ids": part} for part in (positions[:, :start], positions[:, start:]))
        if start:
            model(ids[:, :start], attention_mask=exact[:, :start], past_key_values=cache, **old)
        output = model(ids[:, start:], attention_mask=mask, past_key_values=cache, **new)
        return output.logits[exact[:, start:].bool()]

    for width, value in itertools.product((10, 12, 13, 30), (0, 1)):
        mask = torch.nn.functional.pad(exact, (0, width - 10), value=value)
        torch.testing.assert_close(logits(ours, mask), logits(theirs, mask), atol=2e-5, rtol=1e-5)
    for narrow in (exact[:, 7:], exact[:, :9]):
        with pytest.raises(ValueError, match=r"it must be \(batch, cached \+ new tokens\), here \(3, 10\), or wider"):
            logits(ours, narrow)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
@torch.no_grad()
def test_layerwise_casting_of_tied_embeddings(name):
    """The head's weight is stored in bfloat16, and therefore the embedding's output too."""
    config, pair = CONFIGS[name]
    ours = shaken(ScratchGPTForCausalLM(config))
    theirs = pair(ours)
    ids = torch.randint(3, config.vocab_size, (2, 9))
    expected = ours(ids).logits
    for model in (ours, theirs):
        attach_layerwise_casting_hooks(model, torch.bfloat16, torch.float32)
        assert model(ids).logits.dtype == torch.float32
        torch.testing.assert_close(model(ids).logits, expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_same_greedy_text(name):
    config, pair = CONFIGS[name]
    ours = shaken(ScratchGPTForCausalLM(config))
    theirs = pair(ours)
    ids = torch.randint(3, config.vocab_size, (2, 8))
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    mask = torch.ones_like(ids)
    torch.testing.assert_close(
        ours.generate(ids, attention_mask=mask, **options), theirs.generate(ids, attention_mask=mask, **options)
    )
