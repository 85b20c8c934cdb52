"""The files for `accelerate launch --config_file`, as read by Accelerate itself."""

import argparse
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule, StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
from tests.conftest import MODERN, TINY, Processes, on_two_processes, shaken
from tests.training.conftest import PRETRAIN, ROOT, SMALL, run_module
from training.data.prompts import CHAT_TEMPLATES, set_up_chat_template
from training.engine.checkpoints import WEIGHTS, find_checkpoint, load_checkpoint, save_checkpoint
from training.engine.launch import start_accelerator
from training.results.responses import respond, respond_distributed

QUESTIONS = ("to be", "that is the question")
FOLDER = ROOT / "training" / "configs" / "accelerate"
# name: distributed type, total number of processes, machines, mixed precision
EXPECTED = {
    "cpu": (DistributedType.NO, 1, 1, "no"),
    "one_gpu": (DistributedType.NO, 1, 1, "bf16"),
    "ddp": (DistributedType.MULTI_GPU, 8, 1, "bf16"),
    "fsdp2": (DistributedType.FSDP, 8, 1, "bf16"),
    "two_nodes": (DistributedType.MULTI_GPU, 16, 2, "bf16"),
}


def launch_arguments(name: str, *words: str) -> argparse.Namespace:
    """The arguments of `accelerate launch` with a file."""
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), *words, "training/pretrain.py"]
    return _validate_launch_command(launch_command_parser().parse_args(command))[0]


def test_all_files_are_tested():
    assert {path.stem for path in FOLDER.iterdir()} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_the_values_and_that_the_launcher_accepts_them(name):
    kind, processes, machines, precision = EXPECTED[name]
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert (config.num_processes, config.num_machines, config.mixed_precision) == (processes, machines, precision)
    assert config.use_cpu == (name == "cpu")
    first_line = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    assert first_line.startswith("# ")
    assert len(first_line) <= 128
    arguments = launch_arguments(name)
    assert arguments.use_fsdp == (kind == DistributedType.FSDP)
    assert arguments.multi_gpu == (kind == DistributedType.MULTI_GPU)
    if kind == DistributedType.NO:
        command, environment = prepare_simple_launcher_cmd_env(arguments)
        assert command == [sys.executable, "training/pretrain.py"]
        assert environment["ACCELERATE_USE_CPU"] == str(name == "cpu")
    else:
        environment = prepare_multi_gpu_env(arguments)
        assert int(arguments.nproc_per_node) == processes // machines
    assert environment["ACCELERATE_MIXED_PRECISION"] == precision
    assert environment["ACCELERATE_DYNAMO_BACKEND"] == ("INDUCTOR" if name == "fsdp2" else "NO")


def test_two_nodes_find_each_other(tmp_path):
    """Two launchers of one process each, both on the CPU of this machine, form one run of two processes."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch; from training.engine.launch import start_accelerator\n"
        "accelerator = start_accelerator()\n"
        "print(accelerator.num_processes, accelerator.process_index, flush=True)\n"
        "assert torch.distributed.group.WORLD._get_backend(torch.device('cpu')).options._timeout.days == 1\n"
        "accelerator.wait_for_everyone()\n"
        "import os; os._exit(0)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["accelerate.commands.launch", "--config_file", str(FOLDER / "two_nodes.yaml"), "--num_processes", "2"]
    words += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--mixed_precision", "no", "--machine_rank"]
    on_cpu = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    nodes = [Processes(run_module, tmp_path / rank, [*words, rank, str(script)], **on_cpu) for rank in "01"]
    assert [re.findall(r"^\d \d$", node.wait(), re.M) for node in nodes] == [["2 0"], ["2 1"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_processes_for_gpus_that_do_not_exist(book, tmp_path):
    """Each would train the whole model, all of them into one directory. Through the real launcher."""
    words = [PRETRAIN, "--dataset", book, "--output_dir", str(tmp_path / "out"), *SMALL, "--precision", "auto"]
    launcher = ["accelerate.commands.launch", "--config_file", str(FOLDER / "ddp.yaml"), "--num_processes", "2"]
    process = Processes(run_module, tmp_path / "log", [*launcher, *words])
    line = "pretrain.py: error: 2 processes were started for GPUs that this machine does not have: start one, or several"
    assert process.wait(1).count(line) == 1  # the code of the launcher
    assert not (tmp_path / "out").exists()


def fsdp_environment() -> dict[str, str]:
    """What the launcher passes to its processes."""
    return {name: value for name, value in prepare_multi_gpu_env(launch_arguments("fsdp2")).items() if name.startswith("FSDP_")}


def test_fsdp2_plugin(monkeypatch):
    for name, value in fsdp_environment().items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap == ["ScratchGPTDecoderLayer"]
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert not plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing


def shard(model: ScratchGPTForCausalLM, precision: str) -> ScratchGPTForCausalLM:
    """Accelerate does not use FSDP on a CPU, but its function that shards a model runs everywhere."""
    plugin = FullyShardedDataParallelPlugin()  # from the environment, as under the launcher
    if precision == "bf16":
        plugin.set_mixed_precision(precision)
    AcceleratorState.fsdp_plugin = plugin
    start_accelerator()
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(
        state=state,
        mixed_precision=precision,
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
        parallelism_config=None,
    )
    model = fsdp2_prepare_model(accelerator, model)
    assert all(isinstance(layer, FSDPModule) for layer in model.model.layers)
    return model


def train_with_fsdp2(folder: str, precision: str, is_compiled: bool = False) -> None:
    one, two = (ScratchGPTForCausalLM.from_pretrained(folder) for _ in range(2))
    if is_compiled:  # before it is sharded, as Accelerate does
        two = torch.compile(two, backend="aot_eager")
    two = shard(two, precision)
    ids = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(1))
    rows = ids.chunk(2)[dist.get_rank()]
    optimizers = [torch.optim.AdamW(model.train().parameters(), lr=1e-2) for model in (one, two)]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision == "no" else {"rtol": 1e-2, "atol": 0}
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):  # as Accelerate calls it
            whole = one(ids, labels=ids).loss
            loss = two(rows, labels=rows, num_items_in_batch=ids[:, 1:].numel()).loss
        whole.backward()
        assert loss.item() != loss.bfloat16().item()  # not rounded
        (loss * 2).backward()  # gradients are averaged over the two
        dist.all_reduce(loss.detach_())
        torch.testing.assert_close(loss, whole.detach(), **tolerance)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_the_fsdp2_wrapping_trains_like_one_process(tmp_path):
    cases = [({**TINY, **more}, tied) for more in ({}, MODERN) for tied in (True, False)]
    for number, (shape, tied) in enumerate(cases):
        torch.manual_seed(0)
        ScratchGPTForCausalLM(ScratchGPTConfig(**shape, tie_word_embeddings=tied)).save_pretrained(tmp_path / str(number))
    cases = [(tmp_path / str(number), "no") for number in range(4)]
    cases += [(tmp_path / str(number), "bf16", is_compiled) for number, is_compiled in ((0, False), (2, False), (2, True))]
    on_two_processes(train_with_fsdp2, tmp_path, *cases, **fsdp_environment())


def resume_with_fsdp2(folder: str, checkpoints: Path) -> None:
    """A resumed run evaluates the initial model before it loads the checkpoint, which leaves its last unit gathered."""
    ids = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(1))

    def start() -> tuple:
        model = shard(ScratchGPTForCausalLM.from_pretrained(folder), "no")
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(model: ScratchGPTForCausalLM, optimizer: torch.optim.Optimizer) -> float:
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    model, optimizer = start()
    accelerator = start_accelerator()
    step(model, optimizer)
    state = {"step": 1, "eval_loss": 1.0}
    save_checkpoint(
        checkpoints, accelerator, model, [optimizer], state, 2, lambda path, weights: save_file(weights, path / WEIGHTS)
    )
    expected = [step(model, optimizer) for _ in range(2)]
    model, optimizer = start()
    with torch.no_grad():
        model.eval()(ids)
    path, state = find_checkpoint(checkpoints, print)
    load_checkpoint(path, state, model, [optimizer])
    assert [step(model, optimizer) for _ in range(2)] == expected


def test_an_fsdp2_run_is_resumed(tmp_path):
    torch.manual_seed(0)
    ScratchGPTForCausalLM(ScratchGPTConfig(**TINY, **MODERN, tie_word_embeddings=False)).save_pretrained(tmp_path / "model")
    on_two_processes(resume_with_fsdp2, tmp_path, (tmp_path / "model", tmp_path / "checkpoints"), **fsdp_environment())


def respond_with_fsdp2(folder: Path) -> None:
    """Divided over the processes, the answers would need different numbers of steps: one process would wait forever."""
    model, tokenizer = ScratchGPTForCausalLM.from_pretrained(folder), ScratchGPTTokenizer.from_pretrained(folder)
    prompts = [[{"role": "user", "content": text}] for text in QUESTIONS]
    expected = respond(model, tokenizer, prompts, 1, 40)
    assert [answer.finished for answer in expected] == [True, False]
    found = respond_distributed(
        start_accelerator(), shard(model, "no"), tokenizer, prompts, "", batch_size=1, max_new_tokens=40
    )
    assert found == expected


def test_the_processes_of_an_fsdp2_run_answer_together(tmp_path):
    tokenizer = ScratchGPTTokenizer.train(["to be or not to be, that is the question"] * 9, 290)
    set_up_chat_template(tokenizer, CHAT_TEMPLATES["chat"], 64)
    torch.manual_seed(0)
    model = shaken(ScratchGPTForCausalLM(ScratchGPTConfig(**{**TINY, **MODERN, "vocab_size": len(tokenizer)})), 0.3)
    messages = [[{"role": "user", "content": text}] for text in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(each, add_generation_prompt=True, return_tensors="pt") for each in messages]
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 2}
    first, second = (model.generate(**prompt, **options)[0, -40:].tolist() for prompt in prompts)
    model.generation_config.update(eos_token_id=next(it for it in first if it not in second), pad_token_id=2, do_sample=False)
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "model")
    on_two_processes(respond_with_fsdp2, tmp_path, (tmp_path / "model",), **fsdp_environment())
