"""Predictions from a config, compared with models that are built and trained."""

import itertools
import re
import time
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM
from tests.conftest import MODERN, TINY
from tests.training.conftest import SMALL
from training import plan
from training.engine.arguments import check_engine
from training.engine.flops import flops_per_token, measured_peak, parameters_by_part
from training.engine.optimizers import build_optimizers
from training.engine.train import enable_gradient_checkpointing
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
    "dropout": {"hidden_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1},
}
LARGER = {"vocab_size": 2000, "hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.fixture(params=SHAPES)
def config(request) -> ScratchGPTConfig:
    return ScratchGPTConfig(**{**TINY, **SHAPES[request.param]})


def allocations(function) -> list[int]:
    """Bytes that torch allocated (positive) and freed (negative), in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def test_parameters_by_part(config):
    model = ScratchGPTForCausalLM(config)
    parts = parameters_by_part(config)
    assert sum(parts.values()) == model.num_parameters()
    assert parts["embeddings"] == model.model.embed_tokens.weight.numel()
    assert parts["head"] == (0 if config.tie_word_embeddings else model.lm_head.weight.numel())
    assert parts["norms"] == sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert parts["attention"] == sum(p.numel() for name, p in model.named_parameters() if re.search("self_attn.*proj", name))


@pytest.mark.parametrize(
    ("case", "flops"),
    [
        # A block has 2 x 32 x (32 + 16) weights in attention and 3 x 32 x 128 in the MLP: two blocks 30,720; the head 9,600.
        # Scores and weighted sum of values of 64 tokens: 4 x 32 x 64 = 8,192 forward per block, and twice that backward.
        ({}, 6 * (30_720 + 9_600) + 3 * 2 * 8_192),
        ({"frozen": True}, 4 * (30_720 + 9_600) + 3 * 2 * 8_192),  # LoRA: forward 2, backward 2 (to the inputs) per weight
        ({"has_head": False}, 6 * 30_720 + 3 * 2 * 8_192),
        ({"has_head": False, "trained_blocks": 1}, 2 * 30_720 + 2 * 8_192 + 4 * 15_360 + 2 * 8_192),
    ],
)
def test_flops_by_hand(case, flops):
    assert flops_per_token(ScratchGPTConfig(**{**TINY, **MODERN, "intermediate_size": 128}), 64, **case) == flops


@pytest.mark.parametrize("case", [{}, {"frozen": True}, {"has_head": False}, {"has_head": False, "trained_blocks": 1}])
def test_flops_equal_those_counted_by_torch(config, case):
    config._attn_implementation = "eager"  # computes every pair of tokens, as the formula assumes
    model = ScratchGPTForCausalLM(config).train().requires_grad_(not case.get("frozen") and "trained_blocks" not in case)
    model.model.layers[-1].requires_grad_(not case.get("frozen"))
    inputs = torch.randn(2, 64, config.hidden_size, requires_grad=bool(case.get("frozen")))
    with FlopCounterMode(display=False) as counter:
        outputs = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        (model.lm_head(outputs) if case.get("has_head", True) else outputs).sum().backward()
    assert flops_per_token(config, 64, **case) * 2 * 64 == counter.get_total_flops()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_measured_peak_takes_little_time(mixed_precision):
    start = time.perf_counter()
    accelerator = SimpleNamespace(device="cpu", mixed_precision=mixed_precision, num_processes=1)
    assert measured_peak(accelerator) > 1e8
    assert time.perf_counter() - start < 10  # a quarter of a second on an idle machine


@pytest.mark.parametrize(("checkpointing", "accumulation"), [(False, 1), (True, 1), (False, 2)])
@pytest.mark.parametrize(
    ("shape", "optimizer"), [("gpt2", "adamw"), ("gpt2", "muon"), ("untied", "adamw"), ("modern", "muon"), ("dropout", "muon")]
)
def test_predicted_memory_equals_what_torch_allocates(shape, checkpointing, accumulation, optimizer):
    arguments = PretrainArguments(
        context_length=64, optimizer=optimizer, gradient_checkpointing=checkpointing, gradient_accumulation_steps=accumulation
    )
    config = ScratchGPTConfig(**{**TINY, **SHAPES[shape], **LARGER})
    model = ScratchGPTForCausalLM(config).train()
    if checkpointing:
        enable_gradient_checkpointing(model)
    optimizers = build_optimizers(arguments, model)
    ids = torch.randint(0, config.vocab_size, (8, 64))

    def step() -> None:
        for _ in range(accumulation):
            model(ids, shift_labels=ids, skip_logits=True, use_cache=False).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    step()
    peak = max(itertools.accumulate(allocations(step)))  # above weights and optimizer state
    memory = plan.peak_memory(config, arguments, rows=8)
    assert memory["gradients"] + memory["activations"] + memory["temporary"] == pytest.approx(peak, rel=0.1)
    assert memory["weights"] == pytest.approx(4 * model.num_parameters(), rel=0.01)  # and buffers
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    assert memory["optimizer"] == sum(tensor.nbytes for state in states for tensor in state.values())


def test_predicted_memory_in_bfloat16():
    """Weights, gradients and optimizer state stay in float32; activations take less, but more than half."""
    config, arguments = ScratchGPTConfig(**TINY), PretrainArguments(context_length=64)
    single, half = (plan.peak_memory(config, arguments, rows=64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert all(half[kind] == single[kind] for kind in ("weights", "optimizer"))
    assert 0.5 * single["activations"] < half["activations"] < 0.9 * single["activations"]


def test_predicted_memory_is_larger_if_freed_blocks_are_not_reused():
    config, arguments = ScratchGPTConfig(**{**TINY, **MODERN}), PretrainArguments(context_length=64)
    reused, not_reused = (plan.peak_memory(config, arguments, rows=8, reuses=reuses) for reuses in (True, False))
    assert sum(not_reused.values()) > sum(reused.values())


def run_main(monkeypatch, *argv: str) -> None:
    monkeypatch.setattr(plan, "PROBE_SECONDS", 0.2)
    plan.main(argv)


@pytest.mark.parametrize("more", [[], ["--optimizer", "muon", "--gradient_accumulation_steps", "2"]])
def test_printed_prediction(monkeypatch, capsys, tmp_path, more):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "flops_per_token", lambda *arguments: 3e6)
    monkeypatch.setattr(plan, "measured_peak", lambda *arguments: 2e9)
    run_main(monkeypatch, *SMALL, "--dataset", "missing", "--max_steps", "1000", *more)
    printed = capsys.readouterr().out
    steps = 2 if more else 1
    for pattern in (
        r"^Parameters: [\d,]+ \(with a vocabulary of 300\)$",
        r"^    embeddings +9,600$",
        rf"^FLOPs: 3.0 MFLOP per token, {0.384 * steps:.1f} GFLOP per step of {4 * 32 * steps} tokens$",
        r"^Peak memory, predicted for float32: [\d.]+ of [\d.]+ GB \(cpu\)$",
        r"^    libraries +[\d,]+ MB$",
        r"^Speed: [\d,]+ tokens/s, \d+% of the 2 GFLOP/s of a large matrix product$",
        rf"^Run: 1,000 steps of [\d.e-]+ s, .* in total \(excluding evaluation\); {4 * 32 * steps * 1000:,} tokens$",
        r"^Tokens per parameter: [\d.]+\. Compute-optimal would be about 20 \(Chinchilla\), after ",
    ):
        assert re.search(pattern, printed, re.MULTILINE), (pattern, printed)
    speed, share, seconds = (
        float(re.search(pattern, printed)[1].replace(",", ""))
        for pattern in (r"([\d,]+) tokens/s", r"(\d+)% of the 2 GFLOP/s", r"steps of ([\d.e-]+) s")
    )
    assert speed == pytest.approx(4 * 32 * steps / seconds, rel=0.01, abs=1)
    assert share == pytest.approx(100 * 3e6 * speed / 2e9, abs=1)
    assert list(tmp_path.iterdir()) == []


def test_model_that_does_not_fit_is_not_trained(monkeypatch, capsys):
    monkeypatch.setattr(plan, "probe", None)
    with pytest.raises(UserError, match="it does not fit: lower --batch_size, pass --gradient_checkpointing"):
        run_main(
            monkeypatch, "--model", "preset=124M", "num_hidden_layers=1", "--context_length", "1024", "--batch_size", "65536"
        )
    assert "GB (cpu)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["context_length", "batch_size", "max_steps"])
def test_invalid_arguments(monkeypatch, name):
    with pytest.raises(UserError, match=f"--{name}.*must be at least [12], got 0"):
        run_main(monkeypatch, f"--{name}", "0")
    check_engine(PretrainArguments(batch_size=3), 2)
    with pytest.raises(UserError, match="--batch_size 3 must be at least the number of processes, 4"):
        check_engine(PretrainArguments(batch_size=3), 4)
