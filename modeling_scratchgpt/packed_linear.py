"""Faster decoding on a CPU: linear layers that read their weights in the order the processor likes.

One token at a time, a model is as fast as it reads its weights. On some processors torch's product of a few rows with a plain
matrix reads them at half the speed of memory, or less; oneDNN, which comes with torch, reads a matrix that it has rearranged
beforehand at full speed. On others the plain product of one row is the faster one. So both are timed while they are used, and
the faster stays.

Notable:
- Only while `packed_linears` is entered, and only for a few rows: longer inputs and training take the usual way.
- Layers that a module names in `fused_inputs` (queries, keys and values), in the order of their calls, become one product.
- The first call may be the prompt, and costs nothing. The next are the trial, once in a process for each size of a layer and
  each number of rows. The two ways differ in the last bits of a number.
- A packed weight is in memory twice until the end; nothing is kept longer, because weights may change where nobody sees it
  (merging an adapter writes to `.data`).
- It packs plain `nn.Linear` layers in float32. What an adapter, a quantizer or a compiler has made of a layer stays as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import nn

MAX_ROWS = 32  # above, plain products are as fast
TRIES = 3  # calls that are timed, each way
FASTER_PACKED: dict[tuple[int, ...], bool] = {}  # by rows and the sizes of the layers: what the trials of this process said


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Within this context, linear layers of the model on a CPU multiply few rows faster. Weights must not change meanwhile."""
    layers: list[nn.Linear] = []
    if torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        for module in model.modules():
            children: dict[str, Any] = dict(module.named_children())
            together = [children.pop(name) for name in getattr(module, "fused_inputs", ())]
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
    """Layers that read the same input. `forward` computes what one of them computes: from its own weight or, for few rows and
    where that is faster, from the packed weights of all, at once."""

    def __init__(self, layers: list[nn.Linear]):
        self.layers = layers
        self.weight: torch.Tensor | None = None  # packed
        self.bias: torch.Tensor | None = None
        self.last: tuple = (None, ())  # an input and its outputs, as one value: another thread cannot come between them
        self.rows = 0
        self.seconds = [0.0]  # of each call with so many rows, until it is settled which way is faster
        self.is_settled = False

    def forward(self, index: int, inputs: torch.Tensor) -> torch.Tensor:
        layer = self.layers[index]
        rows = inputs.numel() // layer.in_features
        if rows > MAX_ROWS or inputs.dtype != torch.float32 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return nn.functional.linear(inputs, layer.weight, layer.bias)
        if index == 0 and not self.is_settled:
            self._begin_call(rows)
        start, weight = perf_counter(), self.weight
        if weight is None:
            output = nn.functional.linear(inputs, layer.weight, layer.bias)
        else:
            output = self._packed_product(index, inputs, weight)
        if not self.is_settled:
            self.seconds[-1] += perf_counter() - start
        return output

    def _begin_call(self, rows: int) -> None:
        """One call that is not timed and some that are with the plain weights, the same with the packed ones; then settle."""
        if rows != self.rows:
            self.rows, self.seconds, self.weight = rows, [0.0], None
            return
        calls, shape = len(self.seconds), (rows, self.layers[0].in_features, *(layer.out_features for layer in self.layers))
        if calls == 2 * (1 + TRIES):  # a little faster is not worth the packing
            FASTER_PACKED.setdefault(shape, 1.2 * min(self.seconds[-TRIES:]) < min(self.seconds[1 : 1 + TRIES]))
        self.is_settled = shape in FASTER_PACKED
        if FASTER_PACKED.get(shape, calls > TRIES):
            if self.weight is None:
                self._pack(rows)
        elif self.is_settled:
            self.weight = None
            for layer in self.layers:
                vars(layer).pop("forward", None)
        self.seconds.append(0.0)

    def _pack(self, rows: int) -> None:
        weights = [layer.weight.detach() for layer in self.layers]
        if self.layers[0].bias is not None:
            self.bias = torch.cat([layer.bias for layer in self.layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights) if weights[1:] else weights[0], rows)

    def _packed_product(self, index: int, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        last_inputs, outputs = self.last
        if index == 0 or last_inputs is not inputs:
            output = torch.ops.mkldnn._linear_pointwise.default(inputs, weight, self.bias, "none", [], "")
            if len(self.layers) == 1:
                return output
            # Contiguous, since a cache of keys is slow to take in what is not.
            outputs = tuple(part.contiguous() for part in output.split([layer.out_features for layer in self.layers], dim=-1))
            self.last = inputs, outputs
        return outputs[index]


__all__ = ["packed_linears"]
