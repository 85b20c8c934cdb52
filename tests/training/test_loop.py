import copy
import math

import pytest
import torch
from accelerate import Accelerator

from modeling_scratchgpt import ScratchGPTForCausalLM
from training.arguments import UserError
from training.loop import start_accelerator, training_steps
from training.metrics import MetricsFile, evaluate
from training.optimizers import make_optimizer, make_schedule
from training.windows import IGNORED


def batches(count: int, rows: int = 2, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Random batches in which rows have different numbers of labels."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(count):
        ids = torch.randint(3, 300, (rows, length + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[0, : int(torch.randint(0, length, (), generator=generator))] = IGNORED
        result.append({"input_ids": ids[:, :-1], "shift_labels": labels})
    return result


def train(model: ScratchGPTForCausalLM, loader, accumulation: int = 1, clip: float = 1.0, learning_rate: float = 1e-2):
    optimizer = make_optimizer(model, learning_rate, weight_decay=0.1)
    schedule = make_schedule(optimizer, warmup_fraction=0.2, max_steps=10)
    return list(training_steps(Accelerator(), model, optimizer, schedule, loader, accumulation, clip))


def joined(group: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([batch[name] for batch in group]) for name in group[0]}


def test_accumulation_is_one_large_batch(tiny_model):
    other = copy.deepcopy(tiny_model)
    small = batches(12)
    large = [joined(small[index : index + 3]) for index in range(0, 12, 3)]
    accumulated, at_once = train(tiny_model, small, accumulation=3), train(other, large)
    assert len(accumulated) == len(at_once) == 4
    for one, two in zip(accumulated, at_once, strict=True):
        assert one.loss == pytest.approx(two.loss, rel=1e-5)
        assert one.gradient_norm == pytest.approx(two.gradient_norm, rel=1e-4)
        assert one.tokens == two.tokens
    for (name, one), two in zip(tiny_model.named_parameters(), other.parameters(), strict=True):
        if name.endswith("k_proj.bias"):
            continue  # softmax does not see it: its gradient is rounding noise, which Adam blows up to full steps
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


def test_what_a_step_says_is_true(tiny_model):
    (batch,) = batches(1)
    with torch.no_grad():
        expected = tiny_model(**batch).loss.item()
    (step,) = train(tiny_model, [batch])
    assert step.number == 1
    assert step.loss == pytest.approx(expected, rel=1e-5)
    assert step.tokens == (batch["shift_labels"] != IGNORED).sum()
    assert step.learning_rate == 0.005  # the first of two steps of warm-up
    assert step.gradient_norm > 0
    assert step.seconds > 0


def test_loss_falls(tiny_model):
    steps = train(tiny_model, batches(1) * 10)
    assert steps[-1].loss < steps[0].loss - 0.5


def test_the_gradient_is_clipped(tiny_model):
    other = copy.deepcopy(tiny_model)
    (free,), (clipped,) = train(tiny_model, batches(1), clip=1e9), train(other, batches(1), clip=1e-3)
    assert free.gradient_norm == pytest.approx(clipped.gradient_norm, rel=1e-5)  # told as it was before clipping
    assert clipped.gradient_norm > 1e-3


def test_a_loss_that_is_no_number_stops_the_run(tiny_model):
    with torch.no_grad():
        tiny_model.model.norm.weight.fill_(math.nan)
    with pytest.raises(UserError, match="the loss of step 1 is nan: .* Lower --learning_rate"):
        train(tiny_model, batches(2))


def test_decay_on_matrices_only(tiny_model):
    decayed, free = make_optimizer(tiny_model, 1e-3, weight_decay=0.1).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in free["params"])
    assert sum(map(len, (decayed["params"], free["params"]))) == len(list(tiny_model.parameters()))


def test_schedule_by_hand():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = make_schedule(optimizer, warmup_fraction=1 / 3, max_steps=12)
    rates = []
    for _ in range(13):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.5, 1, 1.5, 2, 2])
    assert rates[8] == pytest.approx(2 * (0.1 + 0.9 * 0.5))  # half of the way down
    assert rates[12] == pytest.approx(0.2)


def test_evaluation_by_hand(tiny_model):
    data = batches(3)
    result = evaluate(Accelerator(), tiny_model, data, num_bytes=100)
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for batch in data:
            scored = batch["shift_labels"] != IGNORED
            logits = tiny_model(batch["input_ids"]).logits[scored].double()
            nats -= logits.log_softmax(-1).gather(1, batch["shift_labels"][scored][:, None]).sum().item()
            tokens += int(scored.sum())
    assert result.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 100, rel=1e-5)


def test_an_evaluation_that_is_no_number_stops_the_run(tiny_model):
    with torch.no_grad():
        tiny_model.model.norm.weight.fill_(math.nan)
    with pytest.raises(UserError, match="the loss on the held-out text is nan"):
        evaluate(Accelerator(), tiny_model, batches(2), num_bytes=1)


def test_two_runs_cannot_share_a_folder(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl", Accelerator())
    with pytest.raises(UserError, match="another run has taken it meanwhile"):
        MetricsFile(tmp_path / "metrics.jsonl", Accelerator())


def test_a_uniform_model_has_the_loss_of_chance(tiny_model):
    with torch.no_grad():
        tiny_model.lm_head.weight.zero_()
    result = evaluate(Accelerator(), tiny_model, batches(2), num_bytes=1)
    assert result.loss == pytest.approx(math.log(300), rel=1e-5)


def test_all_cores_are_used_when_the_launcher_asked_for_one(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    start_accelerator()
    assert torch.get_num_threads() == before
