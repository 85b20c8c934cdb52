"""The LoRA layer, compared with computations by hand."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modeling_scratchgpt.lora import LoraConfig, add_adapter, merge_adapter


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.floats(0.5, 8), st.booleans(), st.integers(0, 3))
def test_the_layer_computes_its_formula(rank, inputs, outputs, alpha, use_rslora, dimensions):
    rank = min(rank, inputs, outputs)
    layer = nn.Linear(inputs, outputs).double()
    model = nn.Sequential(layer)
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=use_rslora, init_lora_weights=False)
    add_adapter(model, config)
    x = torch.randn(*[2] * dimensions, inputs, dtype=torch.float64)
    a, b = model[0].lora_A["default"], model[0].lora_B["default"]
    expected = layer(x) + alpha / (rank**0.5 if use_rslora else rank) * (x @ a.T @ b.T)
    torch.testing.assert_close(model(x), expected)
    merge_adapter(model)
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=1e-12)


def test_dora_by_hand():
    layer = nn.Linear(2, 2, bias=True)
    model = nn.Sequential(layer)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        layer.bias.copy_(torch.tensor([1.0, -1.0]))
    add_adapter(model, LoraConfig(r=1, lora_alpha=2, use_dora=True))
    assert model[0].lora_magnitude_vector["default"].tolist() == [5, 2]  # the norms of the rows
    with torch.no_grad():
        model[0].lora_A["default"].copy_(torch.tensor([[1.0, 0.0]]))
        model[0].lora_B["default"].copy_(torch.tensor([[1.5], [0.0]]))
    # W + 2 B A = [[6, 4], [0, 2]]; the first row has the norm 7.2111, which becomes 5.
    expected = torch.tensor([[6.0, 4.0]]) * 5 / 52**0.5
    output = model(torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(output, torch.tensor([[expected.sum() + 1, 1.0]]))


def test_merging_rounds_once_from_float32():
    layer = nn.Linear(8, 8, bias=False).bfloat16()
    model = nn.Sequential(layer)
    weight = layer.weight.detach().float()
    add_adapter(model, LoraConfig(r=4, init_lora_weights=False))
    delta = model[0].scaling["default"] * (model[0].lora_B["default"] @ model[0].lora_A["default"])
    merge_adapter(model)
    assert torch.equal(layer.weight, (weight + delta).bfloat16())
