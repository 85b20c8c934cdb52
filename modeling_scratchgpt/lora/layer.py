"""The LoRA layer: a frozen linear layer with low-rank updates.

    y = W x + b + scaling * B A x          A: (r, in), B: (out, r), scaling = lora_alpha / r

B starts at zero, so the model is unchanged at first. Only A and B are trained. Merging computes W + scaling * B A.

Notable:
- Training never materializes B A, which is as large as W: x is multiplied by the two thin matrices.
- Merging computes in float32 and keeps the original weight, so unmerging is exact.
- DoRA (`use_dora`) also trains the magnitude of each row of W + scaling * B A, separately from its direction.
"""

import math
from typing import Any

import torch
from torch import nn

from .config import LoraConfig


class LoraLinear(nn.Module):
    """A linear layer, possibly quantized, with adapters."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()  # by adapter name
        self.lora_magnitude_vector = nn.ParameterDict()  # only with DoRA
        self.scaling: dict[str, float] = {}
        self.lora_dropout = nn.ModuleDict()
        self.active_adapters: list[str] = []
        self.unmerged_weight: nn.Parameter | None = None  # the original weight, while merged
        self.train(base_layer.training)

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the base layer, as in PEFT: some models read its dtype or device in their forward."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def update_layer(self, adapter_name: str, rank: int, scaling: float, config: LoraConfig) -> None:
        """Add an adapter, which is not active yet."""
        weight = self.base_layer.weight
        # At least float32: in half precision, small optimizer steps would be rounded away.
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        a = nn.Parameter(torch.empty(rank, self.in_features, device=weight.device, dtype=dtype))
        b = nn.Parameter(torch.zeros(self.out_features, rank, device=weight.device, dtype=dtype))
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if config.init_lora_weights is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        self.lora_A[adapter_name], self.lora_B[adapter_name] = a, b
        self.scaling[adapter_name] = scaling
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout).train(self.training)
        if config.use_dora:
            self.lora_magnitude_vector[adapter_name] = nn.Parameter(self._row_norms(adapter_name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        output = self.base_layer(x)
        if self.unmerged_weight is None:
            for name in self.active_adapters:
                output = self._adapted(name, x, output)
        return output

    def _adapted(self, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        a, b, scaling = self.lora_A[name], self.lora_B[name], self.scaling[name]
        dropout: Any = self.lora_dropout[name]
        x = dropout(x.to(a.dtype))
        low = nn.functional.linear(x, a)  # (..., r)
        if name not in self.lora_magnitude_vector:
            rows = output.reshape(-1, self.out_features).to(low.dtype)
            # One fused operation instead of a product, a scaling and a sum.
            return torch.addmm(rows, low.reshape(-1, len(a)), b.t(), alpha=scaling).view_as(output).to(output.dtype)
        # DoRA: m (W + scaling B A) / |W + scaling B A|, by rows. The norm is treated as a constant, as in the paper (4.3).
        factor = self.lora_magnitude_vector[name] / self._row_norms(name)  # (out,)
        bias = self.base_layer.bias
        if dropout.p and dropout.training:
            base = nn.functional.linear(x, self.base_layer.weight.to(x.dtype))
        else:
            base = output if bias is None else output - bias
        update = (factor - 1) * base + factor * scaling * nn.functional.linear(low, b)
        return (output + update).to(output.dtype)

    def get_delta_weight(self, name: str) -> torch.Tensor:
        """Update of the weight by an adapter, scaling * B A: (out, in), in float32 or float64."""
        return self.scaling[name] * (_precise(self.lora_B[name]) @ _precise(self.lora_A[name]))

    @torch.no_grad()
    def _row_norms(self, name: str) -> torch.Tensor:
        return torch.linalg.vector_norm(_precise(self.base_layer.weight) + self.get_delta_weight(name), dim=1)  # (out,)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the updates of the active adapters to the weight."""
        weight: Any = self.base_layer.weight
        if self.unmerged_weight is None and self.active_adapters:
            merged = _precise(weight) + sum(self.get_delta_weight(name) for name in self.active_adapters)
            for name in self.active_adapters:
                if name in self.lora_magnitude_vector:
                    merged *= (self.lora_magnitude_vector[name] / self._row_norms(name))[:, None]
            # A new parameter instead of an in-place update: the old one may be tied to the embeddings.
            self.unmerged_weight = weight
            self.base_layer.weight = nn.Parameter(merged.to(weight.dtype), requires_grad=False)

    def unmerge(self) -> None:
        """Restore the original weight."""
        if self.unmerged_weight is not None:
            replace_parameter(self.base_layer, "weight", self.unmerged_weight)
            self.unmerged_weight = None


def is_plain(layer: nn.Module) -> bool:
    """Check for an `nn.Linear` with an ordinary floating-point weight, neither quantized nor sharded."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and layer.weight.is_floating_point()


def replace_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace a parameter by another, moved to its device and dtype: the model may have been moved in the meantime."""
    parameter.data = parameter.data.to(getattr(module, name).data)
    setattr(module, name, parameter)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
