"""The layer: a frozen linear layer, and what adapters add to it.

    y = W x + b + scaling * B A x          A: (r, in), B: (out, r), scaling = lora_alpha / r

B starts at zero, so that at first nothing changes. Only A and B are trained. Afterwards W + scaling * B A is one matrix again.

Notable:
- B A, as large as W, is never made while training: x goes through the two thin matrices.
- Merging computes in float32 and keeps the weight it replaces: unmerging restores every bit.
- DoRA (`use_dora`) also trains the length of each row of the sum, apart from its direction.
"""

import math
from typing import Any

import torch
from torch import nn

from .config import LoraConfig


class LoraLinear(nn.Module):
    """A linear layer, and what adapters add to it.

    Args:
        base_layer: an `nn.Linear`, or what a quantizer has made of one.
    """

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()  # by adapter
        self.lora_magnitude_vector = nn.ParameterDict()  # of those with DoRA
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.active_adapters: list[str] = []
        self.unmerged_weight: nn.Parameter | None = None  # while merged: the weight as it was before
        self.train(base_layer.training)

    def update_layer(self, adapter_name: str, rank: int, scaling: float, config: LoraConfig) -> None:
        """A new adapter, not yet active."""
        weight = self.base_layer.weight
        # Small steps would be lost in half precision: the adapter of such a layer has float32.
        options: Any = {"device": weight.device, "dtype": weight.dtype if weight.dtype == torch.float64 else torch.float32}
        a = nn.Parameter(torch.empty(rank, self.in_features, **options))
        b = nn.Parameter(torch.zeros(self.out_features, rank, **options))
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if config.init_lora_weights is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        self.lora_A[adapter_name], self.lora_B[adapter_name] = a, b
        self.scaling[adapter_name], self.dropout[adapter_name] = scaling, config.lora_dropout
        if config.use_dora:
            self.lora_magnitude_vector[adapter_name] = nn.Parameter(self._row_lengths(adapter_name).to(options["dtype"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        output = self.base_layer(x)
        if self.unmerged_weight is None:
            for name in self.active_adapters:
                output = self._adapted(name, x, output)
        return output

    def _adapted(self, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        a, b, scaling = self.lora_A[name], self.lora_B[name], self.scaling[name]
        dropout = self.dropout[name] if self.training else 0.0
        x = nn.functional.dropout(x.to(a.dtype), dropout)
        low = nn.functional.linear(x, a)  # (..., r); B A itself, as large as W, is never made
        if name not in self.lora_magnitude_vector:
            rows = output.reshape(-1, self.out_features).to(low.dtype)
            # One product that adds to what is there, instead of a product, a scaling and a sum.
            return torch.addmm(rows, low.reshape(-1, len(a)), b.t(), alpha=scaling).view_as(output).to(output.dtype)
        # DoRA: m (W + scaling B A) / |W + scaling B A|, row by row. The lengths are taken for constants, as in the paper (4.3).
        factor = self.lora_magnitude_vector[name] / self._row_lengths(name)  # (out,)
        bias = self.base_layer.bias
        if dropout:
            base = nn.functional.linear(x, self.base_layer.weight.to(x.dtype))
        else:
            base = output if bias is None else output - bias
        added = (factor - 1) * base + factor * scaling * nn.functional.linear(low, b)
        return (output + added).to(output.dtype)

    def get_delta_weight(self, name: str) -> torch.Tensor:
        """What an adapter adds to the weight: (out, in), float32 or, where that is, float64."""
        return self.scaling[name] * (_precise(self.lora_B[name]) @ _precise(self.lora_A[name]))

    @torch.no_grad()
    def _row_lengths(self, name: str) -> torch.Tensor:
        return torch.linalg.vector_norm(_precise(self.base_layer.weight) + self.get_delta_weight(name), dim=1)  # (out,)

    @torch.no_grad()
    def merge(self) -> None:
        """Make what the active adapters add part of the weight."""
        weight: Any = self.base_layer.weight
        if self.unmerged_weight is None and self.active_adapters:
            merged = _precise(weight) + sum(self.get_delta_weight(name) for name in self.active_adapters)
            for name in self.active_adapters:
                if name in self.lora_magnitude_vector:
                    merged *= (self.lora_magnitude_vector[name] / self._row_lengths(name))[:, None]
            # Another parameter, not other numbers in this one: the embeddings may hold it as well.
            self.unmerged_weight = weight
            self.base_layer.weight = nn.Parameter(merged.to(weight.dtype), requires_grad=False)

    def unmerge(self) -> None:
        """Put the weight back."""
        if self.unmerged_weight is not None:
            replace_parameter(self.base_layer, "weight", self.unmerged_weight)
            self.unmerged_weight = None


def is_plain(layer: nn.Module) -> bool:
    """Whether a linear layer holds its weight as numbers, not as what a quantizer or a sharding has made of them."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and layer.weight.is_floating_point()


def replace_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter where another is, on its device and in its precision: the model may have moved meanwhile."""
    parameter.data = parameter.data.to(getattr(module, name).data)
    setattr(module, name, parameter)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


__all__ = ["LoraLinear", "is_plain", "replace_parameter"]
