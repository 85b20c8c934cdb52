import copy
import json
import math

import psutil
import pytest
import torch
from accelerate import Accelerator

from modeling_scratchgpt import ScratchGPTForCausalLM
from modeling_scratchgpt.cross_entropy import IGNORE_INDEX
from training import plan
from training.engine import launch, machine
from training.engine.arguments import EngineArguments, check_engine
from training.engine.launch import start_accelerator
from training.engine.loop import training_steps
from training.engine.machine import available_cores, available_memory
from training.engine.metrics import LMMetrics, evaluate
from training.engine.optimizers import build_optimizers
from training.engine.run_folder import RunFolder
from training.errors import UserError


def batches(count: int, rows: int = 2, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Random batches in which rows have different numbers of labels."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(count):
        ids = torch.randint(3, 300, (rows, length + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[0, : int(torch.randint(0, length, (), generator=generator))] = IGNORE_INDEX
        result.append({"input_ids": ids[:, :-1], "shift_labels": labels})
    return result


def train(model: ScratchGPTForCausalLM, dataloader, first_step: int = 1, **options):
    arguments = EngineArguments(**{"learning_rate": 1e-2, "max_steps": 10, "warmup_ratio": 0.2, **options})
    optimizers = build_optimizers(arguments, model)
    return list(training_steps(Accelerator(), model, optimizers, dataloader, arguments, first_step))


def joined(group: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([batch[name] for batch in group]) for name in group[0]}


def test_accumulation_is_one_large_batch(tiny_model):
    other = copy.deepcopy(tiny_model)
    small = batches(12)
    large = [joined(small[index : index + 3]) for index in range(0, 12, 3)]
    accumulated, at_once = train(tiny_model, small, gradient_accumulation_steps=3), train(other, large)
    assert len(accumulated) == len(at_once) == 4
    for one, two in zip(accumulated, at_once, strict=True):
        assert one.loss == pytest.approx(two.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-4)
        assert one.tokens == two.tokens
    for (name, one), two in zip(tiny_model.named_parameters(), other.parameters(), strict=True):
        if name.endswith("k_proj.bias"):
            continue  # softmax does not see it: its gradient is rounding noise, which Adam blows up to full steps
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


def test_the_fields_of_a_step(tiny_model):
    (batch,) = batches(1)
    with torch.no_grad():
        expected = tiny_model(**batch).loss.item()
    (step,) = train(tiny_model, [batch])
    assert step.number == 1
    assert step.loss == pytest.approx(expected, rel=1e-5)
    assert step.tokens == (batch["shift_labels"] != IGNORE_INDEX).sum()
    assert (step.learning_rate, step.muon_learning_rate) == (0.005, None)  # the first of two warmup steps
    assert step.grad_norm > 0
    assert step.seconds > 0


def test_the_learning_rates_of_both_optimizers(tiny_model, tmp_path):
    (step,) = train(tiny_model, batches(1), optimizer="muon", muon_learning_rate=0.04)
    assert (step.learning_rate, step.muon_learning_rate) == (0.005, 0.02)
    tiny_model.requires_grad_(False).model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    run_folder = RunFolder(tmp_path, Accelerator())
    run_folder.open()
    run_folder.log_step(*train(tiny_model, batches(1), optimizer="muon", muon_learning_rate=0.04))
    names = {"step", "loss", "grad_norm", "tokens", "seconds", "muon_learning_rate"}
    assert json.loads((tmp_path / "metrics.jsonl").read_text()).keys() == names


def test_the_gradient_is_clipped(tiny_model):
    other = copy.deepcopy(tiny_model)
    (free,), (clipped,) = train(tiny_model, batches(1), max_grad_norm=1e9), train(other, batches(1), max_grad_norm=1e-3)
    assert free.grad_norm == pytest.approx(clipped.grad_norm, rel=1e-5)  # before clipping
    assert clipped.grad_norm > 1e-3


def test_a_loss_that_is_not_finite_stops_the_run(tiny_model):
    with torch.no_grad():
        tiny_model.model.norm.weight.fill_(math.nan)
    with pytest.raises(
        UserError, match=r"the loss of step 1 is nan: the run has diverged. Lower --learning_rate.*\. To resume it"
    ):
        train(tiny_model, batches(2))


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(tiny_model):
    tiny_model.lm_head.weight.register_hook(lambda gradient: gradient.fill_(math.nan))
    before = copy.deepcopy(tiny_model.state_dict())
    with pytest.raises(UserError, match="the gradient norm of step 1 is nan: the run has diverged"):
        train(tiny_model, batches(2))
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())


def test_the_dropout_of_a_step_does_not_depend_on_the_steps_before(tiny_config):
    tiny_config.hidden_dropout = tiny_config.embedding_dropout = 0.5
    start = ScratchGPTForCausalLM(tiny_config)
    losses = []
    for before, first_step in ((0, 3), (5, 3), (5, 4)):
        torch.rand(before)
        model = copy.deepcopy(start)
        (step,) = train(model, batches(1), first_step, seed=7)
        assert step.number == first_step
        losses.append(step.loss)
    assert losses[0] == losses[1] != losses[2]


def test_evaluation_by_hand(tiny_model):
    data = batches(3)
    result = evaluate(Accelerator(), tiny_model, data, num_bytes=100)
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for batch in data:
            scored = batch["shift_labels"] != IGNORE_INDEX
            logits = tiny_model(batch["input_ids"]).logits[scored].double()
            nats -= logits.log_softmax(-1).gather(1, batch["shift_labels"][scored][:, None]).sum().item()
            tokens += int(scored.sum())
    assert result.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 100, rel=1e-5)


def test_compiled_training_and_evaluation_are_two_graphs_without_logits(tiny_model):
    torch.compiler.reset()  # the limit of recompilations counts those of all models
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.graph)
        return graph.forward

    compiled, data = torch.compile(tiny_model, backend=backend), batches(3)
    train(compiled, data)
    result = evaluate(Accelerator(), compiled, data, num_bytes=100)
    assert result == evaluate(Accelerator(), tiny_model, data, num_bytes=100)
    assert len(graphs) == 2
    for count in (5, 7, 9, 11):  # numbers of items that are no tensor are compiled once
        compiled(**data[0], num_items_in_batch=count, skip_logits=True, use_cache=False)
    assert len(graphs) == 3
    shapes = [getattr(node.meta.get("example_value"), "shape", ()) for graph in graphs for node in graph.nodes]
    assert (2, 12, 32) in shapes
    assert (2, 12, 300) not in shapes


def test_the_perplexity_of_a_model_that_has_diverged_is_short():
    assert str(LMMetrics(800.0, math.exp(700), None)) == "loss 800.000, perplexity 1.0e+304"


def test_an_evaluation_that_is_not_finite_stops_the_run(tiny_model):
    with torch.no_grad():
        tiny_model.model.norm.weight.fill_(math.nan)
    with pytest.raises(UserError, match="the held-out loss is nan"):
        evaluate(Accelerator(), tiny_model, batches(2), num_bytes=1)


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 8),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 8),  # set by the launcher, not by the user
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 4),
        ({"OMP_NUM_THREADS": "1"}, 3),
        ({"OMP_NUM_THREADS": "5", "LOCAL_WORLD_SIZE": "2"}, 3),
    ],
)
def test_threads(monkeypatch, variables, threads):
    chosen = []
    for name in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "stop_with_launcher", lambda: None)  # this process has no launcher
    monkeypatch.setattr(launch, "available_cores", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    start_accelerator()
    assert (chosen or [3]) == [threads]


def test_cores_and_memory_of_a_container(tmp_path, monkeypatch):
    """Its control group, and those above it, as SLURM and systemd set limits."""
    job = tmp_path / "slurm" / "job_7"
    job.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/slurm/job_7\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(6))
    monkeypatch.delenv("OMP_THREAD_LIMIT", raising=False)
    assert available_cores() == 6
    (job / "cpu.max").write_text("max 100000\n")
    (job / "memory.max").write_text("max\n")
    assert (available_cores(), available_memory()) == (6, psutil.virtual_memory().total)
    for folder, cores, memory in ((tmp_path, 5, 2**21), (job.parent, 3, 2**20), (job, 4, 2**22)):
        (folder / "cpu.max").write_text(f"{cores * 100000 - 50000} 100000\n")
        (folder / "memory.max").write_text(f"{memory}\n")
    assert (available_cores(), available_memory()) == (3, 2**20)
    assert plan.device_memory(torch.device("cpu"))[0] == 2**20
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    assert available_cores() == 1


def test_a_number_of_accumulated_batches_in_the_accelerate_config(monkeypatch):
    """Accelerate would divide each loss by it."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    assert start_accelerator().gradient_accumulation_steps == 1
    check_engine(EngineArguments(gradient_accumulation_steps=8), 1)
    with pytest.raises(UserError, match="is 8 in the Accelerate config.*: pass --gradient_accumulation_steps 8"):
        check_engine(EngineArguments(), 1)
