"""Fixtures of all tests: the directory of real inputs, tiny models, two processes, a server, a small disk.

Functions import the libraries and this project: the process that only distributes the tests needs neither.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: each, and each process it starts, gets one
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the recipes use all cores: threads that wait must not keep them busy
# No test uses the network: inputs are made by the test, or are in the directory of real inputs.
os.environ["HF_HUB_OFFLINE"] = "1"

import fcntl
import functools
import json
import multiprocessing
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import pytest
from packaging.version import Version

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a script's background; the tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
IS_CURRENT = Version(version("transformers")) >= Version("5.23")  # older versions lack what some tests need
NPM = ["@huggingface/transformers@4.3.2", "playwright-core@1.65.1"]
NPM_CACHE = Path.home() / ".cache" / "scratchgpt-web"
Model = TypeVar("Model")
MODERN: dict[str, Any] = {
    "position_embedding_type": "rotary", "norm_type": "rmsnorm", "qk_norm": True, "mlp_type": "gated",
    "attention_bias": False, "mlp_bias": False, "num_key_value_heads": 2,
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 300, "max_position_embeddings": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


# The beginning of a program that runs in its own process, where the packages of this project cannot be imported.
WITHOUT_THE_PACKAGE = """
import json, sys
assert "modeling_scratchgpt" not in sys.modules
sys.modules["modeling_scratchgpt"] = sys.modules["training"] = None  # importing them raises ModuleNotFoundError
"""
# `Processes` are forked from one that has imported the libraries, but nothing of this project: they start within a second.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload([
    "accelerate", "datasets", "matplotlib.pyplot", "peft", "sacrebleu", "sklearn.metrics", "transformers.pipelines",
    "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.distributed.tensor.parallel",
])  # fmt: skip


@pytest.hookimpl(trylast=True)  # when the slow tests have been deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, so that no process works on one of them alone at the end."""
    # Two processes get one half of the list each, and the first to finish takes tests from the end of the other half.
    long = (
        ("test_surviving", "test_accelerate_configs", "test_launch"),
        ("test_exports", "test_page", "test_hub_upload", "test_walkthrough"),
    )
    first, second = ([item for item in items if item.path.stem in stems] for stems in long)
    others = [item for item in items if item.path.stem not in (*long[0], *long[1])]
    middle = max(0, len(items) // 2 - len(first))
    items[:] = [*first, *others[:middle], *second, *others[middle:]]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """A new cache for this test run, and for the processes that it starts."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)


@pytest.fixture(autouse=True)
def _reproducible():
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory of real inputs."""
    folder = os.environ.get("SCRATCHGPT_TEST_DATA")
    if not folder:
        pytest.skip("SCRATCHGPT_TEST_DATA is not set: no real inputs to test with")
    return Path(folder)


def shaken(model: Model, amount: float = 0.1) -> Model:
    """Perturb all parameters, as training would: biases and norms too, and far enough for every part to matter."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return model.eval()


class Processes:
    """New processes that call a function with the arguments of each case; several form a group (gloo), as under torchrun."""

    def __init__(self, function: Callable, log: Path, *cases: Sequence[object], count: int = 1, **environment: str):
        self.log, self.processes = log, []
        for rank in range(count):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count} if count > 1 else {}
            variables = environment | {name: str(value) for name, value in group.items()}
            self.processes.append(FORKSERVER.Process(target=call, args=(function, log, cases, variables), daemon=True))
            self.processes[-1].start()

    def wait(self, code: int = 0) -> str:
        """Wait for the end of all processes, which must have this exit code, and return what they have printed."""
        for process in self.processes:
            process.join(200)
        printed = self.log.read_text()
        assert [process.exitcode for process in self.processes] == [code] * len(self.processes), printed
        return printed

    def signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)


def call(function: Callable, log: Path, cases: Sequence[Sequence[object]], variables: dict[str, str]) -> None:
    """What a new process does."""
    import torch
    import torch.distributed as dist

    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(variables)
    torch.set_num_threads(1)
    if "RANK" in variables:
        rank, count = int(variables["RANK"]), int(variables["WORLD_SIZE"])
        dist.init_process_group("gloo", init_method=f"file://{log}.store", rank=rank, world_size=count)
    for case in cases:
        print(*case, file=sys.stderr, flush=True)
        function(*case)
        if dist.is_initialized():
            dist.barrier()


def on_two_processes(function: Callable, folder: Path, *cases: Sequence[object], **environment: str) -> str:
    """Call a function in two CPU processes of one group that must both succeed, and return what they have printed."""
    assert cases
    return Processes(function, folder / "log", *cases, count=2, **environment).wait()


@pytest.fixture
def mount(tmp_path):
    """Mounts a small disk, or remounts it with other options; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def again(options: str) -> Path:
        words = (
            [f"remount,{options}", str(folder)] if os.path.ismount(folder) else [options, "-t", "tmpfs", "tmpfs", str(folder)]
        )
        if subprocess.run(["mount", "-o", *words], capture_output=True).returncode:
            pytest.skip("mounting a disk needs root")
        return folder

    yield again
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """The packages of `NPM`, in a cache outside the tree."""
    for program in ("node", "npm"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    NPM_CACHE.mkdir(parents=True, exist_ok=True)
    modules = NPM_CACHE / "node_modules"
    with open(NPM_CACHE / ".lock", "w") as lock:  # of several test processes, one installs
        fcntl.flock(lock, fcntl.LOCK_EX)
        files = {modules / name / "package.json": version for name, _, version in (package.rpartition("@") for package in NPM)}
        if not all(path.exists() and json.loads(path.read_text())["version"] == version for path, version in files.items()):
            command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(NPM_CACHE), *NPM]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                pytest.skip(f"npm cannot install {' '.join(NPM)}: {result.stderr:.300}")
    return modules


@pytest.fixture(params=["gpt2", "modern"])
def tiny_config(request):
    """Both architectures, tiny."""
    from modeling_scratchgpt import ScratchGPTConfig

    return ScratchGPTConfig(**TINY, **(MODERN if request.param == "modern" else {}))


@pytest.fixture
def tiny_model(tiny_config):
    """A model whose weights are far enough from zero for every part to matter."""
    from modeling_scratchgpt import ScratchGPTForCausalLM

    return shaken(ScratchGPTForCausalLM(tiny_config), 0.2)


def made_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """A directory that one of several test processes makes for all."""
    common = tmp_path_factory.getbasetemp()
    common = common.parent if "PYTEST_XDIST_WORKER" in os.environ else common
    with open(common / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (common / name).exists():
            make(temporary := tmp_path_factory.mktemp("made"))
            temporary.rename(common / name)
    return common / name


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Callable[[str], Path]:
    """The directory with a model of `exported.py` and its export."""
    from tests.exported import make_export

    return lambda kind: made_once(tmp_path_factory, kind, functools.partial(make_export, kind))


def server_program() -> str:
    """The program that starts `transformers serve`, from the README."""
    (program,) = re.findall(r'python -c "([^"]*)" serve\n', (ROOT / "training" / "README.md").read_text())
    return program


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The address of a `transformers serve` that runs as long as the tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", server_program(), "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 100
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(address + "/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield address
    finally:
        process.kill()
        process.wait()
