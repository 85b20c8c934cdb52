"""Fixtures of all tests: the directory of real inputs, tiny models, two processes, a server, a small disk."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: each, and each process it starts, gets one
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the recipes use all cores: threads that wait must not keep them busy
# No test uses the network: inputs are made by the test, or are in the directory of real inputs.
os.environ["HF_HUB_OFFLINE"] = "1"

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM

IS_CURRENT = Version(transformers.__version__) >= Version("5.23")  # older versions lack what some tests need
MODERN: dict[str, Any] = {
    "position_embedding_type": "rotary",
    "norm_type": "rmsnorm",
    "qk_norm": True,
    "mlp_type": "gated",
    "attention_bias": False,
    "mlp_bias": False,
    "num_key_value_heads": 2,
}
TINY: dict[str, Any] = {
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


# The beginning of a program that runs in its own process, where the packages of this project cannot be imported.
WITHOUT_THE_PACKAGE = """
import importlib.abc, json, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_scratchgpt", "training"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
try:
    import modeling_scratchgpt
    sys.exit("the package can be imported")
except ModuleNotFoundError:
    pass
"""


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """A new cache for this test run."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory of real inputs."""
    folder = os.environ.get("SCRATCHGPT_TEST_DATA")
    if not folder:
        pytest.skip("SCRATCHGPT_TEST_DATA is not set: no real inputs to test with")
    return Path(folder)


# The processes end by os._exit: in Python's own teardown, a gloo thread that holds Python objects sometimes aborts.
EACH_CASE = """
import json, os, runpy, sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
torch.set_num_threads(1)
program, cases = sys.argv[1:]
for words in json.loads(cases):
    print(*words, file=sys.stderr, flush=True)
    sys.argv[1:] = words
    runpy.run_path(program)
    dist.barrier()
print("DONE", flush=True)
os._exit(0)
"""


def on_two_processes(program: str, folder: Path, *cases: Sequence[object], **environment: str) -> None:
    """Run a program with the arguments of each case under torchrun, in two CPU processes that must both succeed."""
    assert cases
    (folder / "program.py").write_text(f"import sys\nimport torch\nimport torch.distributed as dist\n{program}")
    (folder / "each_case.py").write_text(EACH_CASE)
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    words = [str(folder / "program.py"), json.dumps([[str(word) for word in case] for case in cases])]
    process = subprocess.run(
        [sys.executable, *torchrun, str(folder / "each_case.py"), *words],
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("DONE") == 2


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


@pytest.fixture(params=["gpt2", "modern"])
def tiny_config(request) -> ScratchGPTConfig:
    """Both architectures, tiny."""
    return ScratchGPTConfig(**TINY, **(MODERN if request.param == "modern" else {}))


@pytest.fixture
def tiny_model(tiny_config) -> ScratchGPTForCausalLM:
    """A model whose weights are far enough from zero for every part to matter."""
    torch.manual_seed(0)
    model = ScratchGPTForCausalLM(tiny_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def server_program() -> str:
    """The program that starts `transformers serve`, from the README."""
    (program,) = re.findall(r'python -c "([^"]*)" serve &', (Path(__file__).parents[1] / "training" / "README.md").read_text())
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
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
