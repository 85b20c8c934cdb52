"""Faster decoding on a CPU: linear layers that read their weights in the order the processor likes.

One token at a time, a model is as fast as it reads its weights, and torch's product of a few rows with a plain matrix reads
them at half the speed of memory, or less. oneDNN, which comes with torch, reads a matrix that it has rearranged beforehand at
full speed.

Notable:
- Only while `packed_linears` is entered, and only for a few rows: longer inputs and training take the usual way.
- A layer is packed when it is first called with few rows, so a prompt alone costs nothing. Its weight is in memory twice until
  the end; nothing is kept longer, because weights may change where nobody sees it (merging an adapter writes to `.data`).
- It packs plain `nn.Linear` layers in float32. What an adapter, a quantizer or a compiler has made of a layer stays as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

MAX_ROWS = 32  # above, plain products are as fast


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Within this context, linear layers of the model on a CPU multiply few rows faster. Weights must not change meanwhile."""
    layers: list[nn.Linear] = []
    if torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear) and _can_be_packed(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer, [])  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # another thread may have been faster


def _can_be_packed(module: nn.Linear) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):  # the latter: another thread is decoding as well
        return False
    return type(module.weight) is nn.Parameter and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def _forward(layer: nn.Linear, packed: list[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """What `layer` computes; `packed` holds its packed weight after the first time."""
    rows = inputs.numel() // layer.in_features
    if rows > MAX_ROWS or inputs.dtype != torch.float32 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(inputs, layer.weight, layer.bias)
    if not packed:
        packed.append(torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows))
    return torch.ops.mkldnn._linear_pointwise(inputs, packed[0], layer.bias, "none", [], "")


__all__ = ["packed_linears"]
