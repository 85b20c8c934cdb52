"""Precision, compiler and batches of a run, chosen for the device that is there."""

import copy
import math
import re
import shutil
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention
from transformers.integrations import flex_attention as integration

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM
from modeling_scratchgpt.interchange import ARCHITECTURE
from tests.training.conftest import SMALL, rows, write_rows
from training import classify, pretrain, recipe
from training.engine import launch, machine
from training.engine.arguments import EngineArguments
from training.engine.launch import choose_attention, choose_compiler, choose_precision, sdpa_attention, start_accelerator
from training.engine.loop import training_steps
from training.engine.machine import has_fast_bfloat16
from training.engine.optimizers import build_optimizers
from training.errors import UserError


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize(
    ("asked", "launched", "device", "is_fast", "expected"),
    [
        ("auto", None, "cpu", False, "no"),
        ("auto", "no", "cpu", True, "bf16"),  # the launcher exports it if nobody chose
        ("auto", "no", "cuda", True, "bf16"),
        ("auto", "fp16", "cuda", True, "fp16"),
        ("auto", "fp8", "cuda", True, "fp8"),
        ("float32", "no", "cpu", True, "no"),
        ("bfloat16", "no", "cpu", False, "bf16"),
        ("bfloat16", "bf16", "cuda", True, "bf16"),
        ("float16", None, "cuda", True, "fp16"),
        ("float32", "bf16", "cuda", True, "--precision float32: Accelerate's config or command line has chosen bf16"),
        ("bfloat16", "fp8", "cuda", True, "--precision bfloat16: .* has chosen fp8: change it, or pass auto"),
        ("float16", None, "cpu", True, "float16 needs a GPU.*: pass --precision auto, float32 or bfloat16"),
        ("auto", "fp16", "cpu", True, "float16 needs a GPU"),
    ],
)
def test_precision(monkeypatch, asked, launched, device, is_fast, expected):
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr(launch, "has_fast_bfloat16", lambda device: is_fast)
    if " " in expected:
        with pytest.raises(UserError, match=expected):
            choose_precision(asked, device)
    else:
        assert choose_precision(asked, device) == expected


@pytest.mark.parametrize("is_fast", [True, False])
def test_a_resumed_run_chooses_as_before_on_the_same_device(monkeypatch, is_fast):
    """What it measures varies. On another device it chooses anew, and other options and configs count."""
    monkeypatch.setattr(launch, "has_fast_bfloat16", lambda device: is_fast)
    monkeypatch.setattr(launch, "compiling_pays", lambda accelerator, flops: not is_fast)
    monkeypatch.setattr(launch, "missing_compiler", lambda device: "")
    earlier = {**launch.chosen_settings(start_accelerator()), "precision": "bf16", "backend": "INDUCTOR"}
    accelerator = start_accelerator(earlier=earlier)
    choose_compiler(accelerator, "auto", 1, earlier)
    assert launch.chosen_settings(accelerator) == earlier
    assert start_accelerator(precision="float32", earlier=earlier).mixed_precision == "no"
    other = {**earlier, "device": "another"}
    accelerator = start_accelerator(earlier=other)
    choose_compiler(accelerator, "auto", 1, other)
    expected = {"precision": "bf16" if is_fast else "no", "backend": "NO" if is_fast else "INDUCTOR"}
    assert launch.chosen_settings(accelerator) == {**earlier, **expected}


def test_runs_of_one_process_may_differ_in_precision():
    """A notebook; Accelerate keeps the state of its first run."""
    matrix = torch.ones(2, 2)
    for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        with start_accelerator(precision=precision).autocast():
            assert (matrix @ matrix).dtype == dtype


def test_bfloat16_is_measured_on_a_cpu(monkeypatch):
    """The measurement agrees with a longer one, unless the result is close; GPUs are asked, without emulation."""
    has_fast_bfloat16.cache_clear()
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(256, 256, dtype=dtype)
        timer = torch.utils.benchmark.Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=torch.get_num_threads())
        seconds[dtype] = min(timer.timeit(1).mean for _ in range(4))
    speedup = seconds[torch.float32] / seconds[torch.bfloat16]
    if not machine.FAST / 2 < speedup < 2 * machine.FAST:
        assert has_fast_bfloat16("cpu") == (speedup >= machine.FAST)
    for is_native in (True, False):
        has_fast_bfloat16.cache_clear()
        supported = partial(lambda native, including_emulation: native or including_emulation, is_native)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert has_fast_bfloat16("cuda") is is_native
    has_fast_bfloat16.cache_clear()
    assert not has_fast_bfloat16("mps")


def test_tf32_on_a_gpu_only(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    start_accelerator()
    assert chosen == []
    monkeypatch.setattr(launch.Accelerator, "device", torch.device("cuda"))
    start_accelerator(precision="float32")
    assert chosen == ["high"]


PACKED, PADDED = {"input_ids", "position_ids"}, {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("names", "device", "precision", "backend", "fields", "expected"),
    [
        (PACKED, "cuda", "float32", "NO", {}, "flex_attention"),
        (PADDED, "cuda", "float32", "NO", {}, "sdpa"),
        (PACKED, "cuda", "float32", "NO", {"attention_dropout": 0.1}, "sdpa"),
        (PACKED, "cuda", "float32", "NO", {"head_dim": 8}, "sdpa"),
        (PACKED, "cuda", "bfloat16", "NO", {"head_dim": 128}, "flex_attention"),
        (PACKED, "cuda", "bfloat16", "NO", {"head_dim": 160}, "sdpa"),  # too much shared memory for most GPUs
        (PACKED, "cpu", "float32", "NO", {}, "sdpa"),  # flex attention has no backward pass there
        (PADDED, "cpu", "bfloat16", "INDUCTOR", {}, "eager"),
        (PADDED, "cpu", "bfloat16", "NO", {}, "sdpa"),
        (PADDED, "cpu", "float32", "INDUCTOR", {}, "sdpa"),
        (PADDED, "cpu", "bfloat16", "INDUCTOR", {"max_position_embeddings": 512}, "sdpa"),
    ],
)
def test_attention(monkeypatch, names, device, precision, backend, fields, expected):
    monkeypatch.setattr(launch.Accelerator, "device", torch.device(device))
    monkeypatch.setattr(launch, "missing_compiler", lambda device: "")
    fields = {"max_position_embeddings": 256, **fields}
    model = ScratchGPTForCausalLM(
        ScratchGPTConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **fields)
    )
    accelerator = start_accelerator(precision=precision)
    accelerator.state.dynamo_plugin.backend = DynamoBackend[backend]
    choose_attention(accelerator, model, dict.fromkeys(names))
    assert model.config._attn_implementation == expected
    with sdpa_attention(model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == expected
    if device == "cuda":
        monkeypatch.setattr(launch, "missing_compiler", lambda device: "triton")
        model.set_attn_implementation("sdpa")
        choose_attention(accelerator, model, dict.fromkeys(names))
        assert model.config._attn_implementation == "sdpa"


@pytest.fixture
def flex_without_compilation(monkeypatch):
    """Torch has no kernels for its backward pass on a CPU, and refuses it, but can calculate it."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.usefixtures("flex_without_compilation")
def test_compiled_flex_attention():
    """Graphs before the mask, after it, and of the loss: the same three for all documents."""
    fields = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ScratchGPTForCausalLM(ScratchGPTConfig(**fields, **ARCHITECTURE["qwen3"]))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch._dynamo.optimize(counter)(model)
    for length in (20, 30, 11):
        batch = {name: torch.randint(300, (2, 32)) for name in ("input_ids", "shift_labels")}
        batch["position_ids"] = torch.cat([torch.arange(length), torch.arange(32 - length)]).repeat(2, 1)
        gradients = {}
        for implementation, function in (("sdpa", model), ("flex_attention", compiled)):
            model.set_attn_implementation(implementation)
            function(**batch, skip_logits=True, use_cache=False).loss.backward()
            gradients[implementation] = [parameter.grad for parameter in model.parameters()]
            model.zero_grad()
        torch.testing.assert_close(gradients["sdpa"], gradients["flex_attention"], atol=1e-6, rtol=1e-4)
    assert counter.frame_count == 3


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("flex_without_compilation")
def test_a_packed_run_with_flex_attention(tmp_path, monkeypatch):
    """It trains as with a mask. On a CPU torch has no kernels for the backward pass: here flex attention is not compiled."""
    used = set()

    def flex_without_kernels(query, key, value, training, **options):
        used.add((training, query.shape[2]))
        return flex_attention.flex_attention(query, key, value, **options)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", flex_without_kernels)
    data = write_rows(tmp_path / "names.jsonl", [{"text": f"{number} is {number:b}"} for number in range(300)])
    options = ["--dataset", data, *SMALL, "--windows", "packed", "--max_steps", "4", "--eval_steps", "4"]
    options += ["--precision", "float32"]
    losses = []
    for implementation in ("sdpa", "flex_attention"):
        assert not used
        monkeypatch.setattr(
            recipe, "choose_attention", lambda _, model, batch, it=implementation: model.set_attn_implementation(it)
        )
        pretrain.main([*options, "--output_dir", str(tmp_path / implementation)])
        losses.append([row.get("loss", row.get("eval_loss")) for row in rows(tmp_path / implementation)])
    assert used == {(True, 32), (False, 32)}  # the samples are generated without it
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    ("asked", "backend", "precision", "flops", "expected"),
    [
        ("auto", "no", "bfloat16", 1e18, "INDUCTOR"),
        ("auto", "no", "bfloat16", 1e10, "NO"),  # too short
        ("auto", "no", "float32", 1e18, "NO"),  # does not pay on a CPU
        ("true", "no", "float32", 0, "INDUCTOR"),
        ("false", "no", "bfloat16", 1e18, "NO"),
        ("auto", "aot_eager", "float32", 0, "AOT_EAGER"),  # of an Accelerate config
        ("true", "eager", "float32", 0, "EAGER"),
    ],
)
def test_compiler(monkeypatch, capsys, asked, backend, precision, flops, expected):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    monkeypatch.setattr(launch, "measured_peak", lambda accelerator: 1e12)
    accelerator = start_accelerator(precision=precision)
    monkeypatch.setattr(launch, "missing_compiler", lambda device: "")
    choose_compiler(accelerator, asked, flops)
    assert accelerator.state.dynamo_plugin.backend == expected
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "missing-compiler")
    choose_compiler(accelerator, "auto", 0)
    is_missing = capsys.readouterr().out == "The model is not compiled, since the C++ compiler missing-compiler is missing\n"
    assert is_missing == (expected == "INDUCTOR")
    assert (accelerator.state.dynamo_plugin.backend == "NO") == (expected in ("NO", "INDUCTOR"))


@pytest.mark.parametrize(("device", "expected"), [("cuda", True), ("mps", False)])
def test_long_runs_are_compiled_on_gpus_but_not_on_macs(device, expected, monkeypatch):
    """Where torch's compiler is a prototype."""
    monkeypatch.setattr(launch, "measured_peak", lambda accelerator: 1e12)
    start_accelerator()
    accelerator: Any = SimpleNamespace(device=torch.device(device), distributed_type="NO", mixed_precision="bf16")
    assert launch.compiling_pays(accelerator, 1e18) == expected


def test_no_compilation_against_the_config(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(UserError, match="--torch_compile false: Accelerate's config .* dynamo_backend INDUCTOR: change it"):
        choose_compiler(start_accelerator(), "false", math.inf)


def test_what_compiling_needs(monkeypatch):
    monkeypatch.setattr(machine, "has_triton", lambda: False)
    assert machine.missing_compiler("cuda") == "triton"
    monkeypatch.setattr(machine, "has_triton", lambda: True)
    with monkeypatch.context() as patch:
        found = list[str]()
        patch.setattr(machine.shutil, "which", lambda name: name if name in found else None)
        patch.setattr(machine.sys, "platform", "win32")
        for name in ("CC", "CXX"):
            patch.delenv(name, raising=False)
        assert machine.missing_compiler("cuda") == ""  # Triton brings its own
        assert machine.missing_compiler("cpu") == "the C++ compiler cl"
        patch.setattr(machine.sys, "platform", "linux")
        for name, missing in {"g++": "the C compiler gcc", "clang": ""}.items():  # which Triton looks for, after gcc
            found.append(name)
            assert machine.missing_compiler("cuda") == missing
        patch.setenv("CC", "missing-cc")
        assert machine.missing_compiler("cuda") == "the C compiler missing-cc"
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: "/missing")
    monkeypatch.setenv("CXX", shutil.which("python3"))
    assert machine.missing_compiler("cpu") == "Python.h, of the package python3-dev"


def test_the_loss_scale_of_float16_with_two_optimizers(tiny_model):
    """It changes nothing. Accelerate uses it on GPUs only; here, on a CPU, the model stays in float32."""
    weights = []
    for precision in ("no", "fp16"):
        AcceleratorState._reset_state()
        accelerator, model = Accelerator(mixed_precision=precision), copy.deepcopy(tiny_model)
        if precision == "fp16":
            accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True
        arguments = EngineArguments(optimizer="muon", max_steps=3)
        optimizers = accelerator.prepare(*build_optimizers(arguments, model))
        ids = torch.arange(3, 35).view(2, 16)
        batches = [{"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}] * 3
        losses = [step.loss for step in training_steps(accelerator, model, optimizers, batches, arguments)]
        weights.append([*model.parameters()])
    for one, two in zip(*weights, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert losses[-1] < losses[0]


def test_a_compiled_run_is_the_same_run(book, tmp_path, monkeypatch, capsys):
    """With one graph for training and one for evaluation. The card names the compiler."""
    words = ["--dataset", book, *SMALL, "--model", "num_hidden_layers=1", "--max_steps", "2", "--eval_steps", "1"]
    words += ["--precision", "float32", "--output_dir"]
    pretrain.main([*words, str(tmp_path / "eager")])
    torch.compiler.reset()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    counters.clear()
    pretrain.main([*words, str(tmp_path / "compiled")])
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    for expected, row in zip(rows(tmp_path / "eager"), rows(tmp_path / "compiled"), strict=True):
        assert row.pop("seconds", None) is None or expected.pop("seconds")
        assert row == pytest.approx(expected, rel=1e-4)
    assert re.search(r"on \S+ CPU, .*, float32, compiled by aot_eager\n", capsys.readouterr().out)
    assert "float32, compiled by aot_eager |" in (tmp_path / "compiled" / "README.md").read_text()


def test_batches_of_many_lengths_settle_at_three_graphs(run, tune, tmp_path, monkeypatch):
    """One for the first length, one for all others, one for evaluation; none is broken."""
    shutil.copytree(run, tmp_path / "base", ignore=shutil.ignore_patterns("checkpoints"))
    ScratchGPTForCausalLM.from_pretrained(run, num_hidden_layers=1).save_pretrained(tmp_path / "base")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    torch.compiler.reset()
    counters.clear()
    texts = [f"{'ab'[number % 2]}{' night' * (number * 7 % 24)} {number}" for number in range(60)]
    dataset = write_rows(tmp_path / "texts.jsonl", [{"text": text, "label": text[0]} for text in texts])
    options = ["--max_steps", "8", "--eval_steps", "4", "--batch_size", "4", "--context_length", "32"]
    tune(classify, "--dataset", dataset, *options, base=tmp_path / "base")
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


@pytest.mark.parametrize("device", [None, "mps"])
def test_processes_of_torchrun_use_the_cpu_without_a_gpu_that_they_can_share(device, monkeypatch):
    """Accelerate sees a single process on a Mac's GPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    found = device and torch.device(device)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    asked = []
    monkeypatch.setattr(launch, "PartialState", lambda cpu, **options: asked.append(cpu) or exit())
    with pytest.raises(SystemExit):
        start_accelerator()
    assert asked == [True]
