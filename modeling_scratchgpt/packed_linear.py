"""Faster decoding on a CPU: linear layers that read their weights in the order the processor likes.

One token at a time, a model is as fast as it reads its weights, and torch's product of a few rows with a plain matrix reads
them at half the speed of memory, or less. oneDNN, which comes with torch, reads a matrix that it has rearranged beforehand at
full speed.

Notable:
- Only while `packed_linears` is entered, and only for a few rows: longer inputs and training take the usual way.
- Layers that a module names in `same_input` (queries, keys and values) become one product, computed when the first is called.
- A layer is packed when it is first called with few rows, so a prompt alone costs nothing. Its weight is in memory twice until
  the end; nothing is kept longer, because weights may change where nobody sees it (merging an adapter writes to `.data`).
- It packs plain `nn.Linear` layers in float32. What an adapter, a quantizer or a compiler has made of a layer stays as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

MAX_ROWS = 32  # above, plain products are as fast


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Within this context, linear layers of the model on a CPU multiply few rows faster. Weights must not change meanwhile."""
    layers: list[nn.Linear] = []
    if torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        for module in model.modules():
            children: dict[str, Any] = dict(module.named_children())
            together = [children.pop(name) for name in getattr(module, "same_input", ())]
            groups = [together] if all(map(_can_be_packed, together)) else [[layer] for layer in together]
            for group in (*groups, *([layer] for layer in children.values())):
                if group and all(map(_can_be_packed, group)):
                    packed = _PackedLinears(group)
                    for index, layer in enumerate(group):
                        layer.forward = partial(packed.forward, index)
                    layers += group
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # another thread may have been faster


def _can_be_packed(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):  # the latter: another thread is decoding as well
        return False
    return type(module.weight) is nn.Parameter and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


class _PackedLinears:
    """Layers that read the same input. `forward` computes what one of them computes, and for few rows all at once."""

    def __init__(self, layers: list[nn.Linear]):
        self.layers = layers
        self.weight: torch.Tensor | None = None  # packed when first used
        self.bias: torch.Tensor | None = None
        self.last: tuple = (None, ())  # an input and its outputs, as one value: another thread cannot come between them

    def forward(self, index: int, inputs: torch.Tensor) -> torch.Tensor:
        layer = self.layers[index]
        rows = inputs.numel() // layer.in_features
        if rows > MAX_ROWS or inputs.dtype != torch.float32 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return nn.functional.linear(inputs, layer.weight, layer.bias)
        last_inputs, outputs = self.last
        if index == 0 or last_inputs is not inputs:
            outputs = self._compute(inputs, rows)
            if len(self.layers) > 1:
                self.last = inputs, outputs
        return outputs[index]

    def _compute(self, inputs: torch.Tensor, rows: int) -> tuple[torch.Tensor, ...]:
        if self.weight is None:
            if self.layers[0].bias is not None:
                self.bias = torch.cat([layer.bias for layer in self.layers])
            weight = torch.cat([layer.weight.detach() for layer in self.layers])
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        output = torch.ops.mkldnn._linear_pointwise.default(inputs, self.weight, self.bias, "none", [], "")
        return output.split([layer.out_features for layer in self.layers], dim=-1)


__all__ = ["packed_linears"]
