"""What is counted and predicted from a config, against models that are made, run and watched."""

import re
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTModel
from tests.conftest import MODERN, TINY
from tests.training.conftest import SMALL
from training import plan
from training.engine.flops import flops_per_token, measured_peak, parameters_by_part
from training.engine.optimizers import make_optimizers
from training.errors import UserError
from training.pretrain import PretrainArguments

SHAPES = {
    "gpt2": {},
    "modern": MODERN,
    "untied": {**MODERN, "tie_word_embeddings": False},
    "wide heads": {"head_dim": 24, "num_key_value_heads": 1, "mlp_bias": False},
    "rotary gpt2": {"position_embedding_type": "rotary", "intermediate_size": 72},
    "gated, biased": {"mlp_type": "gated", "norm_type": "rmsnorm", "tie_word_embeddings": False},
    "qk norm": {"qk_norm": True, "attention_bias": False},
}
LARGER = {"vocab_size": 4000, "hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4}


@pytest.fixture(params=SHAPES)
def config(request) -> ScratchGPTConfig:
    return ScratchGPTConfig(**{**TINY, **SHAPES[request.param]})


def kept_bytes(config: ScratchGPTConfig) -> int:
    """What autograd holds after a forward pass of a batch of 2 x 64, the parameters apart."""
    model = ScratchGPTForCausalLM(config).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 300, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        model(ids, shift_labels=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def allocations(function) -> list[int]:
    """Bytes that torch took (positive) and gave back (negative), in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        function()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def made_bytes(config: ScratchGPTConfig) -> int:
    model, ids = ScratchGPTForCausalLM(config).train(), torch.randint(0, 300, (2, 64))
    return sum(size for size in allocations(lambda: model.model(ids, use_cache=False)) if size > 0)


def test_parameters(config):
    model = ScratchGPTForCausalLM(config)
    parts = parameters_by_part(config)
    assert sum(parts.values()) == model.num_parameters()
    assert parts["embeddings"] == model.model.embed_tokens.weight.numel()
    assert parts["head"] == (0 if config.tie_word_embeddings else model.lm_head.weight.numel())
    assert parts["norms"] == sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert parts["attention"] == sum(p.numel() for name, p in model.named_parameters() if re.search("self_attn.*proj", name))


def test_gpt2s_own_count():
    assert sum(parameters_by_part(ScratchGPTConfig.from_preset("124M")).values()) == 124_439_808


def test_flops_are_those_torch_counts(config):
    config._attn_implementation = "eager"  # counts every pair of tokens, as the formula does
    model, ids = ScratchGPTForCausalLM(config).train(), torch.randint(0, 300, (2, 64))
    with FlopCounterMode(display=False) as counter:
        logits = model.lm_head(model.model(ids, use_cache=False).last_hidden_state)
        logits.sum().backward()
    assert flops_per_token(config, 64) * ids.numel() == counter.get_total_flops()


def test_flops_of_a_classifier_whose_last_block_is_trained(config):
    config._attn_implementation = "eager"
    model, ids = ScratchGPTModel(config).train(), torch.randint(0, 300, (2, 64))
    model.requires_grad_(False)
    model.layers[-1].requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).last_hidden_state.sum().backward()
    assert flops_per_token(config, 64, has_head=False, trained_blocks=1) * ids.numel() == counter.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_found_quickly(dtype):
    start = time.perf_counter()
    assert measured_peak("cpu", dtype) > 1e8
    assert time.perf_counter() - start < 5  # half a second on a machine that has nothing else to do


@pytest.mark.parametrize("dropout", [{}, {"hidden_dropout": 0.1}, {"attention_dropout": 0.1}])
def test_what_autograd_keeps_of_a_block(config, dropout):
    two, three = (replaced(config, num_hidden_layers=layers, **dropout) for layers in (2, 3))
    kept, _ = plan.made_by_a_block(two, 64)
    assert kept_bytes(three) - kept_bytes(two) == pytest.approx(4 * 2 * 64 * kept, rel=0.01)


def test_what_a_block_makes_in_all(config):
    two, three = (replaced(config, num_hidden_layers=layers) for layers in (2, 3))
    made = sum(plan.made_by_a_block(two, 64))
    assert made_bytes(three) - made_bytes(two) == pytest.approx(4 * 2 * 64 * made, rel=0.1)  # attention has some scratch space


def replaced(config: ScratchGPTConfig, **values) -> ScratchGPTConfig:
    return ScratchGPTConfig(**{**{name: getattr(config, name, None) for name in ScratchGPTConfig.__annotations__}, **values})


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_the_optimizer_remembers(config, name):
    model = ScratchGPTForCausalLM(config)
    optimizers = make_optimizers(model, name, 1e-3, 0.02, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    remembered = sum(tensor.numel() for state in states for tensor in state.values() if tensor.ndim)
    assert plan.optimizer_floats(config, name)[0] == remembered


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("shape", ["gpt2", "modern", "untied"])
def test_the_memory_that_torch_takes(shape, optimizer, checkpointing, accumulation):
    """From step to step, above weights and optimizer: the highest sum of what was taken and not given back."""
    arguments = PretrainArguments(
        context_length=64,
        optimizer=optimizer,
        gradient_checkpointing=checkpointing,
        gradient_accumulation_steps=accumulation,
    )
    config = ScratchGPTConfig(**{**TINY, **SHAPES[shape], **LARGER})
    model = ScratchGPTForCausalLM(config).train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    optimizers = make_optimizers(model, optimizer, 1e-3, 0.02, 0.1)
    ids = torch.randint(0, config.vocab_size, (8, 64))

    def step() -> None:
        for _ in range(accumulation):
            model(ids, shift_labels=ids, use_cache=False).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    step()
    level = highest = 0
    for size in allocations(step):
        level += size
        highest = max(highest, level)
    memory = plan.peak_memory(config, arguments, rows=8)
    predicted = memory["gradients"] + memory["activations"] + memory["temporary"]
    assert predicted == pytest.approx(highest, rel=0.15)
    assert sum(plan.peak_memory(config, arguments, rows=8, reuses=False).values()) > sum(memory.values())


def test_libraries_are_added():
    config = ScratchGPTConfig(**TINY)
    bare, with_libraries = (plan.peak_memory(config, PretrainArguments(context_length=64), 2, size) for size in (0, 10**9))
    assert sum(with_libraries.values()) == sum(bare.values()) + 10**9


def run_main(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", *words])
    monkeypatch.setattr(plan, "PROBE_SECONDS", 0.2)
    plan.main()


@pytest.mark.parametrize("more", [[], ["--optimizer", "muon", "--gradient_accumulation_steps", "2"]])
def test_what_it_prints(monkeypatch, capsys, tmp_path, more):
    monkeypatch.chdir(tmp_path)
    run_main(monkeypatch, *SMALL, "--dataset", "there is none", "--max_steps", "1000", *more)
    printed = capsys.readouterr().out
    steps = 2 if more else 1
    for pattern in (
        r"^Parameters: [\d,]+ \(with a vocabulary of 300\)$",
        r"^    embeddings +9,600$",
        rf"^Arithmetic: [\d.]+ MFLOP a token, [\d.]+ GFLOP a step of {4 * 32 * steps} tokens$",
        r"^Memory at the peak, predicted for float32: [\d.]+ GB of this cpu's [\d.]+ GB$",
        r"^    libraries +[\d,]+ MB$",
        r"^Speed: [\d,]+ tokens/s, \d+% of the [\d,]+ GFLOP/s of a large matrix product$",
        rf"^The run: 1,000 steps of [\d.e-]+ s, .* in all, besides evaluations; {4 * 32 * steps * 1000:,} tokens$",
        r"^Tokens a parameter: [\d.]+\. Compute-optimal would be about 20 \(Chinchilla\), after ",
    ):
        assert re.search(pattern, printed, re.MULTILINE), (pattern, printed)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_not_tried(monkeypatch, capsys):
    monkeypatch.setattr(plan, "probe", None)
    with pytest.raises(UserError, match="it does not fit: lower --batch_size or pass --gradient_checkpointing"):
        run_main(monkeypatch, "--model", "preset=1.5B", "--context_length", "1024", "--batch_size", "4096")
    assert "GB of this cpu's" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["context_length", "batch_size", "max_steps"])
def test_mistakes(monkeypatch, name):
    with pytest.raises(UserError, match=f"--{name} must be at least 1, got 0"):
        run_main(monkeypatch, f"--{name}", "0")
    with pytest.raises(UserError, match="--batch_size 3 must be a multiple of the number of processes, 2"):
        plan.check(replace(PretrainArguments(), batch_size=3), 2)


def test_times_for_people():
    assert [plan.duration(seconds) for seconds in (3, 150, 9000, 200000)] == [
        "3.0 seconds",
        "2.5 minutes",
        "2.5 hours",
        "2.3 days",
    ]
