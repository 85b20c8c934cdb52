"""The features of `generate` that need no network, on both architectures."""

import logging
import time
from functools import partial, partialmethod

import pytest
import torch
from transformers import CompileConfig, GPT2Config, GPT2LMHeadModel, StaticCache, TextIteratorStreamer, pipeline
from transformers.generation import BaseStreamer
from transformers.integrations.executorch import convert_and_export_with_cache

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTModel, ScratchGPTTokenizer, packed_linear
from modeling_scratchgpt.packed_linear import packed_linears
from tests.conftest import TINY, shaken


def prompts(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


def generate(model: ScratchGPTForCausalLM, ids: torch.Tensor, **options) -> torch.Tensor:
    defaults = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    torch.manual_seed(0)
    return model.generate(ids, **{**defaults, **options})


@torch.no_grad()
def greedy_by_hand(model: ScratchGPTForCausalLM, ids: torch.Tensor, new_tokens: int = 16) -> torch.Tensor:
    for _ in range(new_tokens):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids


def test_greedy_search_with_every_cache(tiny_model):
    expected = greedy_by_hand(tiny_model, prompts())
    of_the_caller = StaticCache(config=tiny_model.config, max_cache_len=40)
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}, {"past_key_values": of_the_caller}):
        assert torch.equal(generate(tiny_model, prompts(), **options), expected), options


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloaded caches move tensors off a GPU: there is none")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_a_cache_off_the_gpu(tiny_model, cache):
    model, ids = tiny_model.cuda(), prompts().cuda()
    assert torch.equal(generate(model, ids, cache_implementation=cache), generate(model, ids))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"typical_p": 0.9},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2},
        {"num_beams": 3},
    ],
    ids=str,
)
def test_sampling_is_repeatable_and_within_the_vocabulary(tiny_model, options, rows):
    first, second = (generate(tiny_model, prompts(rows), do_sample=True, **options) for _ in range(2))
    assert first.shape == (rows, 7 + 16)
    assert torch.equal(first, second)
    assert torch.equal(first[:, :7], prompts(rows))


def test_top_k_holds_for_each_row(tiny_model):
    ids = prompts(4)
    best = tiny_model(ids).logits[:, -1].topk(2).indices
    for seed in range(10):
        torch.manual_seed(seed)
        output = tiny_model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=2, max_new_tokens=1, eos_token_id=None
        )
        assert all(output[row, -1] in best[row] for row in range(4))


@torch.no_grad()
def test_beam_search_finds_what_greedy_misses(tiny_model):
    def score(output: torch.Tensor) -> float:
        log_probabilities = tiny_model(output).logits.log_softmax(-1)
        return log_probabilities[:, 6:-1].gather(2, output[:, 7:, None]).sum().item()

    ids = prompts(1)
    assert score(generate(tiny_model, ids, num_beams=8)) >= score(generate(tiny_model, ids)) - 1e-4


def test_prompt_lookup_and_assistant_change_only_the_speed(tiny_model):
    ids = prompts(1).repeat(1, 2)  # something to look up
    plain = generate(tiny_model, ids)
    assert torch.equal(generate(tiny_model, ids, prompt_lookup_num_tokens=3), plain)
    torch.manual_seed(1)
    assistant = ScratchGPTForCausalLM(tiny_model.config).eval()
    assert torch.equal(generate(tiny_model, ids, assistant_model=assistant), plain)
    assert torch.equal(generate(tiny_model, ids, assistant_early_exit=1), plain)  # its own first layer is the assistant
    assert tiny_model.config.num_hidden_layers == 2


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_padded_batch_generates_the_same_as_each_row_alone(tiny_model, use_cache):
    rows = [prompts(1, length) for length in (3, 9, 6)]
    width = max(row.shape[1] for row in rows)
    padded = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=2) for row in rows])
    mask = (padded != 2).long()
    together = generate(tiny_model, padded, attention_mask=mask, use_cache=use_cache)
    for row, output in zip(rows, together, strict=True):
        assert torch.equal(output[width:], generate(tiny_model, row)[0, row.shape[1] :])


def test_each_row_stops_at_its_own_eos(tiny_model):
    plain = generate(tiny_model, prompts(3))
    end = plain[0, 9].item()  # what the first row says third
    output = generate(tiny_model, prompts(3), eos_token_id=end, pad_token_id=2)
    for row, whole in zip(output[:, 7:].tolist(), plain[:, 7:].tolist(), strict=True):
        said = row[: row.index(end) + 1] if end in row else row
        assert said == whole[: len(said)]
        assert set(row[len(said) :]) <= {2}


def test_continuing_from_a_cache(tiny_model):
    ids = prompts()
    first = generate(tiny_model, ids, max_new_tokens=8, return_dict_in_generate=True)
    rest = generate(tiny_model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=8)
    assert torch.equal(rest, generate(tiny_model, ids))


def test_from_embeddings(tiny_model):
    ids = prompts()
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    output = tiny_model.generate(inputs_embeds=tiny_model.get_input_embeddings()(ids), **options)
    assert torch.equal(output, generate(tiny_model, ids)[:, 7:])


def test_without_a_prompt(tiny_model):
    output = tiny_model.generate(max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert output.shape == (1, 6)
    assert output[0, 0] == TINY["bos_token_id"]


def test_scores_are_the_logits(tiny_model):
    output = generate(tiny_model, prompts(), max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        logits = tiny_model(output.sequences).logits[:, 6:-1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), logits, atol=1e-5, rtol=1e-4)


def test_streaming_tokens(tiny_model):
    class Listener(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    listener = Listener()
    output = generate(tiny_model, prompts(1), streamer=listener)
    assert listener.ended
    assert listener.tokens == output[0].tolist()


@pytest.fixture(scope="module")
def tokenizer() -> ScratchGPTTokenizer:
    return ScratchGPTTokenizer.train(["to be or not to be that is the question"] * 9, vocab_size=300)


def test_streaming_text(tiny_model, tokenizer):
    inputs = tokenizer("to be", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    output = generate(tiny_model, inputs["input_ids"], streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_stop_strings(tiny_model, tokenizer):
    inputs = tokenizer("to be", return_tensors="pt")
    prompt_length = inputs["input_ids"].shape[1]
    sampled = {"do_sample": True, "top_k": 0}
    new = [tokenizer.decode([token]) for token in generate(tiny_model, inputs["input_ids"], **sampled)[0, prompt_length:]]
    stop = next(text for text in new[3:] if text and text.isascii())
    output = generate(tiny_model, inputs["input_ids"], stop_strings=[stop], tokenizer=tokenizer, **sampled)
    told = [tokenizer.decode([token]) for token in output[0, prompt_length:]]
    assert told == new[: len(told)]
    assert stop in told[-1]
    assert stop not in "".join(told[:-1])


def test_lengths_beyond_the_learned_positions_are_refused_before_the_first_token(monkeypatch):
    model = ScratchGPTForCausalLM(ScratchGPTConfig(**TINY)).eval()
    monkeypatch.setattr(ScratchGPTModel, "forward", None)  # not to be called
    with pytest.raises(ValueError, match=r"7 tokens and 59 new ones exceed the 64 learned positions .* max_new_tokens=58"):
        generate(model, prompts(), max_new_tokens=59)


def test_up_to_the_last_learned_position():
    """The last token needs no position, so there is one token more than positions, as in transformers' GPT-2."""
    model = ScratchGPTForCausalLM(ScratchGPTConfig(**TINY)).eval()
    longest = generate(model, prompts(), max_new_tokens=58)
    assert longest.shape == (2, 65)
    shape = {"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    reference = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    assert generate(reference, prompts(), max_new_tokens=58).shape == (2, 65)


def test_padding_uses_no_learned_positions():
    model = shaken(ScratchGPTForCausalLM(ScratchGPTConfig(**TINY)))
    ids = prompts(1, 30)
    padded = torch.nn.functional.pad(ids, (34, 0), value=2)
    options = {"attention_mask": (padded != 2).long()}
    output = generate(model, padded, max_new_tokens=35, **options)
    assert torch.equal(output[:, 64:], generate(model, ids, max_new_tokens=35)[:, 30:])
    with pytest.raises(ValueError, match=r"30 tokens and 36 new ones exceed the 64 learned positions .* max_new_tokens=35"):
        generate(model, padded, max_new_tokens=36, **options)
    embeddings = model.get_input_embeddings()(padded)
    assert model.generate(inputs_embeds=embeddings, max_new_tokens=35, eos_token_id=None, **options).shape == (1, 35)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="31 tokens and 35 new ones exceed"):  # cached and new tokens
        generate(model, prompts(1, 31), max_new_tokens=35, past_key_values=cache)


def test_default_lengths_end_at_the_last_learned_position(tokenizer, caplog, monkeypatch):
    """Of a pipeline, and of `transformers serve`, which asks for 1,024 tokens."""
    model = shaken(ScratchGPTForCausalLM(ScratchGPTConfig(**{**TINY, "eos_token_id": None})))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (output,) = pipe("to be", return_tensors=True)
    assert len(output["generated_token_ids"]) == 65
    assert "generation stops after 63 new tokens, at the model's last learned position" in caplog.text
    assert generate(model, prompts(1, 2), max_new_tokens=1024).shape == (1, 65)
    with pytest.raises(ValueError, match="2 tokens and 100 new ones exceed the 64 learned positions"):
        pipe("to be", max_new_tokens=100)


def test_generation_with_a_compiled_forward(tiny_model, monkeypatch):
    """One graph for the prompt, one for each next token, none more after plain generation: packed layers are in none."""
    torch.compiler.reset()  # the limit of recompilations counts those of all models
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = generate(tiny_model, prompts())
    compiled = torch.compile(tiny_model.forward, fullgraph=True, backend=backend)
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(tiny_model, "forward", compiled)
            assert torch.equal(generate(tiny_model, prompts(), cache_implementation="static"), expected)
            assert len(graphs) == 2
        assert torch.equal(generate(tiny_model, prompts()), expected)
    config = CompileConfig(fullgraph=True, mode=None, backend=backend)
    config._compile_all_devices = True  # a CPU too
    for _ in range(2):
        output = generate(tiny_model, prompts(), cache_implementation="static", compile_config=config)
        assert torch.equal(output, expected)
        assert torch.equal(generate(tiny_model, prompts()), expected)
    assert len(graphs) == 2


@torch.no_grad()
def test_export_with_a_static_cache(tiny_model):
    """As for ExecuTorch: the cache is a buffer of the program."""
    expected = generate(tiny_model, prompts(1))
    tiny_model.generation_config.update(cache_implementation="static", cache_config={"batch_size": 1, "max_cache_len": 30})
    module = convert_and_export_with_cache(tiny_model).module()
    for position in range(expected.shape[1] - 1):
        logits = module(input_ids=expected[:, [position]], cache_position=torch.tensor([position]))
        assert position < 6 or logits.argmax() == expected[0, position + 1]


def wrapped(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that are currently packed."""
    return [module for module in model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("packing_is", ["faster", "slower", "whatever it is"])
@torch.no_grad()
def test_packed_layers_compute_the_same_and_are_removed(packing_is, tiny_model, monkeypatch):
    """Before, during and after the trial, whose result is forced or left open."""
    monkeypatch.setattr(packed_linear, "FASTER_PACKED", {})

    def slowly(*arguments, compute):
        time.sleep(0.001)
        return compute(*arguments)

    if packing_is == "faster":
        monkeypatch.setattr(torch.nn.functional, "linear", partial(slowly, compute=torch.nn.functional.linear))
    if packing_is == "slower":
        compute = packed_linear._PackedLinears._packed_product
        monkeypatch.setattr(packed_linear._PackedLinears, "_packed_product", partialmethod(slowly, compute=compute))
    ids = prompts(3)
    plain = tiny_model(ids).logits
    one = tiny_model(ids[:, :1]).logits
    linears = [module for module in tiny_model.modules() if type(module) is torch.nn.Linear]
    with packed_linears(tiny_model):
        assert wrapped(tiny_model) == linears
        torch.testing.assert_close(tiny_model(ids).logits, plain, atol=1e-5, rtol=1e-5)
        for _ in range(2 * packed_linear.TRIES + 4):
            torch.testing.assert_close(tiny_model(ids[:, :1]).logits, one, atol=1e-5, rtol=1e-5)
        said = set(packed_linear.FASTER_PACKED.values())
        assert said == {True} if packing_is == "faster" else said == {False} if packing_is == "slower" else said
        if packing_is == "faster":
            assert wrapped(tiny_model) == linears
            with torch.profiler.profile() as profile:
                tiny_model(ids[:, :1])
            products = {event.key: event.count for event in profile.key_averages()}
            assert products["mkldnn::_linear_pointwise"] == 2 * 4 + 1  # qkv, o, gate and up, down of two blocks; the head
        assert packing_is != "slower" or not wrapped(tiny_model)
        torch.testing.assert_close(tiny_model(ids[:1, :1]).logits, one[:1], atol=1e-5, rtol=1e-5)  # other rows
        with packed_linears(tiny_model):  # another thread
            torch.testing.assert_close(tiny_model(ids[:, :1]).logits, one, atol=1e-5, rtol=1e-5)
        with torch.enable_grad():
            assert tiny_model(ids[:, :1]).logits.requires_grad
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert tiny_model.lm_head(torch.randn(1, 32)).dtype == torch.bfloat16
    assert not wrapped(tiny_model)
    with packed_linears(tiny_model):  # what was said holds for the process
        for _ in range(2):
            torch.testing.assert_close(tiny_model(ids[:, :1]).logits, one, atol=1e-5, rtol=1e-5)
        assert packing_is != "slower" or not wrapped(tiny_model)
    with torch.no_grad():
        tiny_model.lm_head.weight.mul_(2)
    torch.testing.assert_close(generate(tiny_model, ids), greedy_by_hand(tiny_model, ids))


@torch.no_grad()
def test_only_plain_float32_layers_are_packed(tiny_model):
    """None if results must be repeatable, since a clock chooses."""
    torch.use_deterministic_algorithms(True)
    try:
        with packed_linears(tiny_model):
            assert not wrapped(tiny_model)
    finally:
        torch.use_deterministic_algorithms(False)
    tiny_model.bfloat16()
    with packed_linears(tiny_model):
        assert not wrapped(tiny_model)
