import copy
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from modeling_scratchgpt import ScratchGPTForCausalLM
from tests.conftest import on_two_processes
from training.engine import optimizers
from training.engine.arguments import EngineArguments
from training.engine.optimizers import (
    SCHEDULES,
    Muon,
    build_optimizers,
    lr_factor,
    muon_initialization,
    orthogonalize,
    set_learning_rates,
)

SHAPES = [(32, 32), (16, 48), (48, 16), (1, 8), (8, 1)]


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch):
    """Makes results independent of the processor; bfloat16 has a test of its own."""
    monkeypatch.setattr(optimizers, "matmul_dtype", lambda device: torch.float32)


def random_matrices(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def build(model: torch.nn.Module, optimizer: str, learning_rate: float = 1e-2) -> list[torch.optim.Optimizer]:
    arguments = EngineArguments(
        optimizer=optimizer,
        learning_rate=learning_rate,
        muon_learning_rate=2 * learning_rate,
        weight_decay=0.1,
        warmup_ratio=0.0,
    )
    return build_optimizers(arguments, model)


def backward(model: ScratchGPTForCausalLM, seed: int = 0) -> None:
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(seed))
    model.train()
    model(ids, labels=ids).loss.backward()


def one_step(model: ScratchGPTForCausalLM, optimizers: list[torch.optim.Optimizer], seed: int = 0) -> None:
    backward(model, seed)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_keeps_singular_vectors_and_sets_singular_values_to_about_1(shape):
    matrix = random_matrices(*shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    matrices = torch.stack([random_matrices(*shape).flip(0), matrix])
    result = orthogonalize(matrices)[1]
    torch.testing.assert_close(result, orthogonalize(matrix[None])[0], atol=1e-5, rtol=1e-4)  # a batch equals its matrices
    new_values = left.T @ result @ right.T  # diagonal if the singular vectors are the same
    torch.testing.assert_close(new_values, new_values.diagonal().diag(), atol=1e-4, rtol=0)
    is_large = values / values.norm() > 0.01  # smaller ones need more steps
    assert new_values.diagonal()[is_large].min() > 0.65
    assert new_values.diagonal().max() < 1.25


def test_orthogonalize_ignores_the_scale_and_keeps_zero():
    matrices = random_matrices(2, 8, 12)
    torch.testing.assert_close(orthogonalize(1e-3 * matrices), orthogonalize(1e3 * matrices), atol=1e-2, rtol=1e-2)
    assert orthogonalize(torch.zeros(1, 8, 12)).count_nonzero() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_in_bfloat16_is_close_to_float32(shape, monkeypatch):
    matrices = random_matrices(3, *shape)
    exact = orthogonalize(matrices)
    monkeypatch.setattr(optimizers, "matmul_dtype", lambda device: torch.bfloat16)
    rounded = orthogonalize(matrices)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_matmul_dtype_is_bfloat16_only_if_the_processor_supports_it(monkeypatch):
    monkeypatch.undo()
    for capabilities, dtype in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities)
        assert optimizers.matmul_dtype(torch.device("cpu")) == dtype
    assert optimizers.matmul_dtype(torch.device("meta")) == torch.float32


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_muon_equals_torch_optim_muon(shape):
    start = random_matrices(*shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = [Muon([ours], lr=0.1, weight_decay=0.5), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.5)]
    for seed in range(3):
        ours.grad = theirs.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for optimizer in optimizers:
            optimizer.step()
    # The size of the steps is about 0.1; torch's products are in bfloat16.
    assert (ours - start).abs().max() > 0.05
    torch.testing.assert_close(ours, theirs, atol=0.01, rtol=0.01)


def test_muon_step_equals_arithmetic_by_hand():
    parameter = torch.nn.Parameter(torch.eye(4, 2))
    optimizer = Muon([parameter], lr=0.5, weight_decay=0.2)
    gradients = [random_matrices(4, 2), random_matrices(2, 4).T]
    expected, momentum = torch.eye(4, 2), torch.zeros(4, 2)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
        momentum = 0.95 * momentum + gradient
        expected = 0.9 * expected - 0.5 * math.sqrt(2) * orthogonalize((gradient + 0.95 * momentum)[None])[0]
    torch.testing.assert_close(parameter.detach(), expected)


def test_muon_step_runs_the_closure_and_skips_parameters_without_gradient():
    used, unused = torch.nn.Parameter(torch.eye(3)), torch.nn.Parameter(torch.eye(3))

    def closure():
        loss = (used**2).sum()
        loss.backward()
        return loss

    assert Muon([used, unused], lr=0.1).step(closure) == 3
    assert not torch.equal(used, torch.eye(3))
    assert torch.equal(unused, torch.eye(3))


@pytest.mark.parametrize("tied", [True, False])
def test_muon_is_for_matrices_of_blocks_and_adamw_for_all_others(tiny_config, tied):
    tiny_config.tie_word_embeddings = tied
    model = ScratchGPTForCausalLM(tiny_config)
    muon, adamw = build(model, "muon")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden, rest = ([names[id(p)] for group in o.param_groups for p in group["params"]] for o in (muon, adamw))
    matrices = 7 if tiny_config.mlp_type == "gated" else 6
    assert len(hidden) == 2 * matrices
    assert all(name.endswith("_proj.weight") for name in hidden)
    assert set(hidden) | set(rest) == set(names.values())
    assert len(hidden) + len(rest) == len(names)
    assert "model.embed_tokens.weight" in rest
    assert ("lm_head.weight" in rest) != tied
    assert [(g["lr"], g["weight_decay"]) for o in (muon, adamw) for g in o.param_groups] == [(2e-2, 0.1), (1e-2, 0.0)]


def test_adamw_decays_only_matrices(tiny_model):
    (optimizer,) = build(tiny_model, "adamw", 1e-3)
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"], free["lr"]) == (0.1, 0.0, 1e-3)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(tiny_model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_are_excluded(tiny_model, name):
    tiny_model.model.layers[0].requires_grad_(False)
    frozen = {id(parameter) for parameter in tiny_model.model.layers[0].parameters()}
    for optimizer in build(tiny_model, name):
        assert not frozen & {id(p) for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("tied", [True, False])
def test_muon_initialization(tiny_config, tied):
    tiny_config.tie_word_embeddings = tied
    model = ScratchGPTForCausalLM(tiny_config)
    before = model.model.embed_tokens.weight.clone()
    muon_initialization(model)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        output = model(ids, labels=ids, output_hidden_states=True)
    assert torch.equal(output.hidden_states[0], output.hidden_states[1])  # the first block adds nothing
    assert torch.equal(model.model.embed_tokens.weight, before) == tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    if not tied:
        assert output.loss.item() == pytest.approx(math.log(300), abs=0.01)
        assert model.model.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.05)
    reading = model.model.layers[0].mlp.up_proj.weight
    assert reading.std().item() == pytest.approx(tiny_config.initializer_range if tied else 32**-0.5, rel=0.1)


def test_schedules_equal_arithmetic_by_hand(tiny_model):
    def rates(kind: str) -> list[float]:
        arguments = EngineArguments(
            optimizer="muon", learning_rate=1.0, muon_learning_rate=10.0, lr_scheduler_type=kind, max_steps=12,
            warmup_ratio=4 / 12, min_lr_ratio=0.2, decay_ratio=0.5,
        )  # fmt: skip
        optimizers = build_optimizers(arguments, tiny_model)
        result = []
        for step in range(14):
            muon, adamw = set_learning_rates(optimizers, lr_factor(step, arguments)).values()
            assert [muon, adamw] == [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
            assert muon == pytest.approx(10 * adamw)
            result.append(adamw)
        return result

    up = [0.25, 0.5, 0.75, 1]
    assert rates("linear") == pytest.approx([*up, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2])
    assert rates("wsd") == pytest.approx([*up, 1, 1, 1, 1 - 0.4 / 3, 1 - 0.8 / 3, 0.6, 1 - 1.6 / 3, 1 - 2 / 3, 0.2, 0.2])
    cosine = rates("cosine")
    assert cosine[:5] == pytest.approx([*up, 1])
    assert cosine[8] == pytest.approx(0.6)  # halfway down
    assert cosine[12:] == pytest.approx([0.2, 0.2])


@given(kind=st.sampled_from(sorted(SCHEDULES)), max_steps=st.integers(1, 200), ratios=st.tuples(*[st.floats(0, 1)] * 3))
def test_lr_factor_rises_then_falls(kind, max_steps, ratios):
    warmup_ratio, min_lr_ratio, decay_ratio = ratios
    arguments = EngineArguments(lr_scheduler_type=kind, max_steps=max_steps, warmup_ratio=warmup_ratio)
    arguments.min_lr_ratio, arguments.decay_ratio = min_lr_ratio, decay_ratio
    warmup_steps = math.ceil(warmup_ratio * max_steps)
    factors = [lr_factor(step, arguments) for step in range(max_steps + 3)]
    up, down = factors[:warmup_steps], factors[warmup_steps:]
    assert all(0 < factor <= 1 for factor in factors[:max_steps])
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    assert min(down) >= min_lr_ratio - 1e-9
    assert down[-1] == pytest.approx(min_lr_ratio)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_state_dict_round_trip(tiny_config, name, tied, flat):
    """Saved and loaded as in checkpoints, training continues bit for bit."""
    tiny_config.tie_word_embeddings = tied
    model = ScratchGPTForCausalLM(tiny_config)
    # torch 2.13 writes a state that is both flat and full, but cannot read it.
    options = StateDictOptions(full_state_dict=not flat, flatten_optimizer_state_dict=flat)
    optimizers = build(model, name)
    one_step(model, optimizers, seed=0)
    other = copy.deepcopy(model)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizers, options=options))

    others = build(other, name, 1e-3)
    set_optimizer_state_dict(other, others, state, options=options)
    for optimizer, loaded in zip(optimizers, others, strict=True):
        assert [group["lr"] for group in loaded.param_groups] == [group["lr"] for group in optimizer.param_groups]
    one_step(model, optimizers, seed=1)
    one_step(other, others, seed=1)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def train_in_parallel(kind: str, folder: str) -> None:
    optimizers.matmul_dtype = lambda device: torch.float32
    one, two = (ScratchGPTForCausalLM.from_pretrained(folder).train() for _ in range(2))
    if kind == "fsdp2":
        for module in (*two.model.layers, two):
            fully_shard(module)
    parallel = two if kind == "fsdp2" else DistributedDataParallel(two)
    both = [build(model, "muon") for model in (one, two)]
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for step in range(3):
        ids = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(step))
        one(ids, labels=ids).loss.backward()
        rows = ids.chunk(2)[dist.get_rank()]
        (2 * parallel(input_ids=rows, labels=rows, num_items_in_batch=44).loss).backward()  # gradients are averaged
        for optimizer in (*both[0], *both[1]):
            optimizer.step()
            optimizer.zero_grad()
        state = get_optimizer_state_dict(two, both[1], options=options)
        both[1] = build(two, "muon")  # new optimizers, into which the state is loaded
        set_optimizer_state_dict(two, both[1], state, options=options)
    for (name, parameter), sharded in zip(one.named_parameters(), two.parameters(), strict=True):
        if name.endswith("k_proj.bias"):
            continue  # softmax ignores it: its gradient is rounding noise, which Adam scales up to full steps
        whole = sharded.full_tensor() if kind == "fsdp2" else sharded
        torch.testing.assert_close(whole, parameter, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: name + text)
    momentum = both[1][0].state[two.get_parameter("model.layers.0.self_attn.q_proj.weight")]["momentum"]
    assert kind == "ddp" or momentum.to_local().numel() * 2 == momentum.numel()


def orthogonalize_in_parallel() -> None:
    optimizers.matmul_dtype = lambda device: torch.float32
    matrices, sizes = random_matrices(5, 12, 8), []

    def counted(part):
        sizes.append(len(part))
        return orthogonalize(part)

    optimizers.orthogonalize = counted
    torch.testing.assert_close(optimizers.orthogonalize_together(matrices), orthogonalize(matrices), atol=1e-5, rtol=1e-4)
    assert sizes == [3]


def test_two_processes_share_the_matrices(tmp_path):
    on_two_processes(orthogonalize_in_parallel, tmp_path, ())


def test_two_processes_equal_one(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    on_two_processes(train_in_parallel, tmp_path, ("ddp", tmp_path / "model"), ("fsdp2", tmp_path / "model"))
