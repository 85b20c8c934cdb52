import copy
import dataclasses
import math

import pytest
import torch
import transformers
from transformers import Qwen3Config, StaticCache
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

import modeling_scratchgpt
from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, attention
from modeling_scratchgpt.attention import eager_attention_forward
from modeling_scratchgpt.interchange import HEADS
from tests.conftest import TINY


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_eager_and_sdpa_agree(tiny_model):
    ids, mask = random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    for attention_mask in (None, mask):
        logits = []
        for implementation in ("eager", "sdpa"):
            tiny_model.set_attn_implementation(implementation)
            logits.append(tiny_model(ids, attention_mask=attention_mask).logits)
        real = slice(None) if attention_mask is None else mask.bool()
        torch.testing.assert_close(logits[0][real], logits[1][real], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decoding_with_a_cache_gives_the_same_logits(tiny_model):
    ids = random_ids(2, 20)
    whole = tiny_model(ids, use_cache=False).logits
    first = tiny_model(ids[:, :13], use_cache=True)
    rest = [first.logits]
    cache = first.past_key_values
    for position in range(13, 20):
        step = tiny_model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        rest.append(step.logits)
    torch.testing.assert_close(torch.cat(rest, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("error")
def test_attention_under_autocast_is_in_half_precision(tiny_model, monkeypatch):
    """With qk_norm and rotation, too, which are computed in float32; so is what the cache keeps."""
    dtypes = set()

    def recorded(module, query, key, value, *arguments, **options):
        dtypes.update({query.dtype, key.dtype, value.dtype})
        return eager_attention_forward(module, query, key, value, *arguments, **options)

    monkeypatch.setattr(attention, "eager_attention_forward", recorded)
    tiny_model.set_attn_implementation("eager")
    with torch.autocast("cpu", torch.bfloat16):
        cache = tiny_model(random_ids(1, 5), use_cache=True).past_key_values
    assert {cache.layers[0].keys.dtype, cache.layers[0].values.dtype} | dtypes == {torch.bfloat16}


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_does_not_change_the_logits(tiny_model, side):
    ids = random_ids(1, 11)
    padding = torch.full((1, 5), TINY["pad_token_id"])
    parts = (padding, ids) if side == "left" else (ids, padding)
    padded = torch.cat(parts, dim=1)
    real = slice(5, None) if side == "left" else slice(None, 11)
    mask = torch.zeros_like(padded)
    mask[:, real] = 1
    torch.testing.assert_close(
        tiny_model(padded, attention_mask=mask).logits[:, real], tiny_model(ids).logits, atol=1e-5, rtol=1e-5
    )


def test_loss_by_hand(tiny_model):
    ids = random_ids(2, 10)
    labels = ids.clone()
    labels[0, :4] = -100
    output = tiny_model(ids, labels=labels)
    log_probabilities = output.logits.log_softmax(-1)
    terms = [
        -log_probabilities[row, position, labels[row, position + 1]]
        for row in range(2)
        for position in range(9)
        if labels[row, position + 1] != -100
    ]
    torch.testing.assert_close(output.loss, sum(terms) / len(terms))

    shifted = torch.cat((labels[:, 1:], torch.full((2, 1), -100)), dim=1)
    torch.testing.assert_close(tiny_model(ids, shift_labels=shifted).loss, output.loss)
    torch.testing.assert_close(tiny_model(ids, labels=labels, num_items_in_batch=7).loss, sum(terms) / 7)


def test_loss_and_gradients_do_not_depend_on_the_split_of_a_batch(tiny_model):
    """Gradient accumulation: the pieces of a batch add up to its loss and its gradient."""
    ids = random_ids(4, 12)
    labels = ids.clone()
    labels[0, :10] = -100
    tiny_model(ids, labels=labels).loss.backward()
    whole = [parameter.grad.clone() for parameter in tiny_model.parameters()]
    tiny_model.zero_grad()
    count = (labels[:, 1:] != -100).sum()
    for row in range(4):
        tiny_model(ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=count).loss.backward()
    for parameter, gradient in zip(tiny_model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_more_tokens_than_learned_positions_are_refused():
    model = ScratchGPTForCausalLM(ScratchGPTConfig(**TINY))
    with pytest.raises(ValueError, match=r"65 tokens exceed the 64 learned positions of this model .* rotary"):
        model(random_ids(1, 65))


@torch.no_grad()
def test_padding_does_not_use_up_positions():
    model = ScratchGPTForCausalLM(ScratchGPTConfig(**TINY)).eval()
    ids = random_ids(1, 64)
    padded = torch.cat((torch.full((1, 6), 2), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 6, dtype=torch.long), torch.ones(1, 64, dtype=torch.long)), dim=1)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 6:], model(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_static_cache_does_not_hide_missing_positions():
    model = ScratchGPTForCausalLM(ScratchGPTConfig(**TINY)).eval()
    cache = StaticCache(config=model.config, max_cache_len=80)
    model(random_ids(1, 60), past_key_values=cache)
    with pytest.raises(ValueError, match="65 tokens exceed the 64 learned positions"):
        model(random_ids(1, 5), past_key_values=cache)


@torch.no_grad()
def test_pipeline_parallel_stages_add_positions_once(tiny_model):
    """As transformers splits a model: a later stage gets the hidden states of the one before as `inputs_embeds`."""
    ids = random_ids(2, 7)
    expected = tiny_model(ids).logits
    assert tiny_model.pp_plan == {f"model.{name}": how for name, how in Qwen3Config.base_model_pp_plan.items()} | {
        "lm_head": (["hidden_states"], ["logits"])
    }
    stages = [copy.deepcopy(tiny_model) for _ in range(2)]
    stages[0].model.layers[1] = stages[0].model.norm = stages[1].model.layers[0] = PipelineIdentityLayer()
    hidden_states = stages[0].model(ids).last_hidden_state
    torch.testing.assert_close(stages[1](inputs_embeds=hidden_states).logits, expected)


def test_inputs_are_ids_or_embeddings(tiny_model):
    ids = random_ids(1, 5)
    embeddings = tiny_model.get_input_embeddings()(ids)
    torch.testing.assert_close(tiny_model(inputs_embeds=embeddings).logits, tiny_model(ids).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            tiny_model(**wrong)


def test_initial_weights_have_gpt2s_standard_deviations():
    config = ScratchGPTConfig(**{**TINY, "hidden_size": 128, "num_hidden_layers": 4})
    model = ScratchGPTForCausalLM(config)
    layer = model.model.layers[1]
    scaled = 0.02 / math.sqrt(2 * 4)
    for weight, std in (
        (model.lm_head.weight, 0.02),
        (model.model.embed_positions.weight, 0.02),
        (layer.self_attn.q_proj.weight, 0.02),
        (layer.mlp.up_proj.weight, 0.02),
        (layer.self_attn.o_proj.weight, scaled),
        (layer.mlp.down_proj.weight, scaled),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not layer.mlp.up_proj.bias.any()


@pytest.mark.parametrize("head", ["", *HEADS])
def test_auto_classes_create_save_and_load_every_model(head, tiny_config, tmp_path):
    auto_class, name = getattr(transformers, f"AutoModel{head}"), f"ScratchGPT{head or 'Model'}"
    model = auto_class.from_config(tiny_config)
    assert type(model) is getattr(modeling_scratchgpt, name)
    model.save_pretrained(tmp_path)
    assert model.config.auto_map[f"AutoModel{head}"] == f"modeling_scratchgpt.{name}"
    assert (tmp_path / "modeling_scratchgpt.py").is_file()
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_hidden_states_and_attentions(tiny_model):
    tiny_model.set_attn_implementation("eager")
    output = tiny_model(random_ids(2, 7), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 7, 32)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 7, 7)] * 2
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))
        assert not weights.triu(1).any()


def test_configs_are_dataclasses(tiny_config):
    """Although learned positions have no `rope_parameters`."""
    same, other = dataclasses.replace(tiny_config), dataclasses.replace(tiny_config, vocab_size=301)
    assert tiny_config == same
    assert tiny_config != other
    assert tiny_config in [other, same]
    assert tiny_config not in [other, None]
    fields = dataclasses.asdict(tiny_config)
    assert [field.name for field in dataclasses.fields(tiny_config)] == list(fields)
    assert type(tiny_config)(**fields) == tiny_config
    assert hasattr(tiny_config, "rope_parameters") == ("rope_parameters" in fields) == (fields["qk_norm"])
    if fields["qk_norm"]:
        linear = dataclasses.replace(tiny_config, rope_parameters={"rope_type": "linear", "factor": 2.0})
        assert linear != tiny_config
        assert dataclasses.replace(linear).rope_parameters["factor"] == 2.0


def test_gradient_checkpointing_changes_no_gradient(tiny_model):
    ids = random_ids(2, 10)
    tiny_model.train()
    tiny_model(ids, labels=ids).loss.backward()
    plain = [parameter.grad.clone() for parameter in tiny_model.parameters()]
    tiny_model.zero_grad()
    tiny_model.gradient_checkpointing_enable()
    tiny_model(ids, labels=ids).loss.backward()
    for parameter, gradient in zip(tiny_model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
