"""On a pretended GPU, whose tensors have a device and a shape, but no data: a mix-up of devices, or a read, is an error."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from modeling_scratchgpt import (
    ScratchGPTForCausalLM,
    ScratchGPTForQuestionAnswering,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
)

from ..conftest import Processes

IDS = (2, 12)
SPANS = {"start_positions": (2,), "end_positions": (2,)}
HEADS = (  # and the shapes of their labels
    (ScratchGPTForCausalLM, {"labels": IDS}),
    (ScratchGPTForSequenceClassification, {"labels": (2,)}),
    (ScratchGPTForTokenClassification, {"labels": IDS}),
    (ScratchGPTForQuestionAnswering, SPANS),
)


def on_device(module, device):
    """The module as a function, and its parameters, on a device."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {name: nn.Parameter(torch.empty(value.shape, device=device)) for name, value in state.items()}
    return lambda **inputs: functional_call(module, state, kwargs=inputs), list(state.values())


def integers(device, **shapes):
    return {name: torch.ones(shape, dtype=torch.long, device=device) for name, shape in shapes.items()}


def without_memory(head, config):
    with torch.device("meta"):
        return head(config)


def run_on_a_pretended_device(config):
    """The CPU build of torch can calculate little on a pretended `cuda`, but much on a device that is registered in Python."""
    _setup_privateuseone_for_python_backend("pretended")
    modules = [(without_memory(head, config), labels) for head, labels in HEADS]
    causal, ids = modules[0][0], {"input_ids": IDS, "labels": IDS}
    steps = [(module, {"input_ids": IDS, "attention_mask": IDS, **labels}, {}) for module, labels in modules]
    steps += [(causal, ids, {"skip_logits": True, "num_items_in_batch": 24}), (causal, ids | {"position_ids": IDS}, {})]
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):  # SDPA has no kernel of its own for this device
        for module, shapes, options in steps:
            model, parameters = on_device(module.train(), "pretended")
            loss = model(**integers("pretended", **shapes), use_cache=False, **options).loss
            with pytest.raises(DataDependentOutputException):  # as any read that the step makes would
                loss.item()
            loss.backward()
            trained = [parameter for parameter in parameters if parameter.grad is not None]
            assert len(trained) == len(list(module.parameters()))
            assert all(parameter.grad.device.type == "pretended" for parameter in trained)
            torch.optim.AdamW(trained, foreach=False).step()
            with torch.no_grad():
                evaluated, _ = on_device(module.eval(), "pretended")
                assert evaluated(**integers("pretended", **shapes), use_cache=False, **options).loss.device.type == "pretended"


def test_training_and_evaluation(tiny_config, tmp_path):
    """Of all heads, with padding and with packed rows. (Caches make tensors with data, which the device does not have.)"""
    Processes(run_on_a_pretended_device, tmp_path / "log", (tiny_config,)).wait()
