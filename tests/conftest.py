"""Shared pieces of the tests: where the real inputs are, and models small enough to run in a blink."""

import os

# Nothing here may reach for the network: what a test needs it makes, or finds in the folder of real inputs.
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM

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


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Caches of the test run are its own, so it finds nothing that an earlier run has left."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real inputs."""
    folder = os.environ.get("SCRATCHGPT_TEST_DATA")
    if not folder:
        pytest.skip("SCRATCHGPT_TEST_DATA is not set: no real inputs to test with")
    return Path(folder)


@pytest.fixture(params=["gpt2", "modern"])
def tiny_config(request) -> ScratchGPTConfig:
    """Both architectures, at a size for tests."""
    return ScratchGPTConfig(**TINY, **(MODERN if request.param == "modern" else {}))


@pytest.fixture
def tiny_model(tiny_config) -> ScratchGPTForCausalLM:
    """A model with weights far enough from zero that every part matters."""
    torch.manual_seed(0)
    model = ScratchGPTForCausalLM(tiny_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
