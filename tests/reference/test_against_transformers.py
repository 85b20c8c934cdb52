"""Logits, losses, gradients and greedy text, compared with transformers' models of the same weights."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM
from tests.conftest import MODERN, TINY


def as_gpt2(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Rename a weight to GPT-2's name, and transpose matrices for Conv1D."""
    renamed = (
        name.replace("model.embed_tokens", "transformer.wte")
        .replace("model.embed_positions", "transformer.wpe")
        .replace("model.layers", "transformer.h")
        .replace("model.norm", "transformer.ln_f")
        .replace("input_layernorm", "ln_1")
        .replace("post_attention_layernorm", "ln_2")
        .replace("self_attn.o_proj", "attn.c_proj")
        .replace("mlp.up_proj", "mlp.c_fc")
        .replace("mlp.down_proj", "mlp.c_proj")
    )
    is_matrix = tensor.ndim == 2 and "_proj" in name
    return [(renamed, tensor.T if is_matrix else tensor)]


def gpt2_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert a state dict to `GPT2LMHeadModel`, with query, key and value in one matrix."""
    result = {}
    for name, tensor in state.items():
        if "q_proj" in name:
            parts = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            joined = torch.cat(parts)
            name = name.replace("q_proj", "c_attn").replace("self_attn", "attn").replace("model.layers", "transformer.h")
            result[name] = joined.T if joined.ndim == 2 else joined
        elif "k_proj" not in name and "v_proj" not in name:
            result.update(as_gpt2(name, tensor))
    return result


def pair_with_gpt2(ours: ScratchGPTForCausalLM) -> GPT2LMHeadModel:
    config = ours.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_position_embeddings,
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    theirs.load_state_dict(gpt2_state_dict(ours.state_dict()))
    return theirs.eval()


def pair_with_qwen3(ours: ScratchGPTForCausalLM) -> Qwen3ForCausalLM:
    config = ours.config
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            rope_parameters=dict(config.rope_parameters),
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    theirs.load_state_dict(ours.state_dict())  # the names are the same
    return theirs.eval()


def shaken(config: ScratchGPTConfig, amount: float = 0.1) -> ScratchGPTForCausalLM:
    """A model with perturbed parameters, including biases and norms."""
    torch.manual_seed(0)
    model = ScratchGPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gpt2_124m_gives_the_same_logits_and_gradients(attention):
    ours = shaken(ScratchGPTConfig.from_preset("124M"), amount=0.01)
    ours.set_attn_implementation(attention)
    theirs = pair_with_gpt2(ours)
    ids = torch.randint(0, 50257, (2, 64))
    results = [model(ids, labels=ids) for model in (ours, theirs)]
    assert (results[0].logits - results[1].logits).abs().max() < 1e-4
    for result in results:
        result.loss.backward()
    our_gradients = gpt2_state_dict({name: parameter.grad for name, parameter in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        assert (our_gradients[name] - parameter.grad).abs().max() < 1e-4, name


CONFIGS = {
    "gpt2": (ScratchGPTConfig(**TINY), pair_with_gpt2),
    "qwen3": (ScratchGPTConfig(**TINY, **MODERN), pair_with_qwen3),
    "qwen3-untied-wide-heads": (
        ScratchGPTConfig(**TINY, **MODERN, tie_word_embeddings=False, head_dim=16, intermediate_size=50),
        pair_with_qwen3,
    ),
    "qwen3-scaled-positions": (
        ScratchGPTConfig(
            **TINY,
            **MODERN,
            rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0, "original_max_position_embeddings": 16},
        ),
        pair_with_qwen3,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_same_logits_loss_and_gradients(name, attention):
    config, pair = CONFIGS[name]
    ours = shaken(config)
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


@pytest.mark.parametrize("name", CONFIGS)
def test_same_greedy_text(name):
    config, pair = CONFIGS[name]
    ours = shaken(config)
    theirs = pair(ours)
    ids = torch.randint(3, config.vocab_size, (2, 8))
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    mask = torch.ones_like(ids)
    torch.testing.assert_close(
        ours.generate(ids, attention_mask=mask, **options), theirs.generate(ids, attention_mask=mask, **options)
    )
