"""Faster decoding on a CPU: linear layers with packed weights.

Decoding is bound by reading the weights. On some processors, torch's product of a few rows with a plain matrix reads them at
half the memory bandwidth or less, while oneDNN, which comes with torch, reads a packed (reordered) matrix at full bandwidth. On
others the plain product of one row is faster. So both are timed in use, and the faster one is kept.

Notable:
- Only inside `packed_linears`, and only for a few rows: long inputs and training use plain products.
- Layers that a module lists in `fused_inputs` (such as query, key and value, in the order of their calls) become one product.
- The trial takes place once per process for each layer size and number of rows. The two products differ by rounding, so that
  nothing is packed with `torch.use_deterministic_algorithms(True)`.
- A packed weight is a second copy in memory. It is not kept after the context, since changes of a weight cannot be detected.
- Only plain float32 `nn.Linear` layers are packed, and none if anything is compiled: a compiler cannot trace a clock.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from time import perf_counter
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.utils import logging

logger = logging.get_logger(__name__)
MAX_ROWS = 32  # plain products are as fast for more
TRIES = 3  # timed calls of each kind
# `max_new_tokens` of transformers' text-generation pipeline and of `transformers serve` if neither call nor model set it.
UNCHOSEN_TOKENS = (256, 1024)
FASTER_PACKED: dict[tuple[int, ...], bool] = {}  # results of the trials, by rows and layer sizes


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Context manager for faster products of few rows on a CPU. The weights must not change inside."""
    layers: list[nn.Linear] = []
    is_available = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if is_available and not torch.are_deterministic_algorithms_enabled() and not _is_compiled(model):
        for module in model.modules():
            children: dict[str, Any] = {name: child for name, child in module.named_children() if _can_be_packed(child)}
            fused = getattr(module, "fused_inputs", ())
            groups = [[children.pop(name) for name in fused]] if fused and children.keys() >= {*fused} else []
            for group in (*groups, *([layer] for layer in children.values())):
                packed = _PackedLinears(group)
                for index, layer in enumerate(group):
                    layer.forward = _PackedForward(packed.forward, index)
                layers += group
    try:
        yield
    finally:
        _unpack(layers)


class PackedGenerationMixin(GenerationMixin):
    """`generate` with packed linear layers, limited to the learned positions."""

    config: Any

    @wraps(GenerationMixin.generate)  # type: ignore[arg-type]
    def generate(self, *args, **kwargs) -> Any:  # type: ignore[override]
        with packed_linears(self):  # type: ignore[arg-type]
            return super().generate(*args, **kwargs)

    def _valid_auto_compile_criteria(self, *args, **kwargs) -> bool:
        """Also remove the packed layers if `generate` compiles the forward pass."""
        if compiles := super()._valid_auto_compile_criteria(*args, **kwargs):
            _unpack(self.modules())  # type: ignore[attr-defined]
        return compiles

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_cache_length) -> None:
        """Also refuse lengths beyond the learned positions; a default, which no user has chosen, is reduced."""
        positions, limit = model_kwargs.get("position_ids"), self.config.max_position_embeddings
        if self.config.position_embedding_type == "learned" and positions is not None:
            length = int(positions.max()) + 1
            new = generation_config.max_new_tokens or max_cache_length + 1 - positions.shape[1]
            room = max(limit + 1 - length, 0)  # padding uses no positions, nor does the last token, since it is not read
            if new > room and (new not in UNCHOSEN_TOKENS or not room):
                problem = f"a prompt of {length} tokens and {new} new ones exceed the {limit} learned positions of this model"
                raise ValueError(f"{problem}: pass max_new_tokens={room} or less, or shorten the prompt.")
            if new > room:
                logger.warning(f"generation stops after {room} new tokens, at the model's last learned position.")
                generation_config.max_length -= new - room
                max_cache_length -= new - room
        super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, max_cache_length)


def _can_be_packed(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):  # the latter: packed by another thread
        return False
    return type(module.weight) is nn.Parameter and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def _is_compiled(model: nn.Module) -> bool:
    """Detect a module, or the `forward` of one, to which torch.compile was applied."""
    compiled = "_torchdynamo_orig_callable"  # torch's mark
    return any(module._compiled_call_impl or hasattr(vars(module).get("forward"), compiled) for module in model.modules())


class _PackedForward(partial):
    """The `forward` of a packed layer."""


def _unpack(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if isinstance(vars(module).get("forward"), _PackedForward):
            vars(module).pop("forward", None)  # another thread may have removed it


class _PackedLinears:
    """Layers with the same input. `forward` computes the output of one: from its weight, or from the packed weights of all."""

    def __init__(self, layers: list[nn.Linear]):
        self.layers = layers
        self.weight: torch.Tensor | None = None  # packed
        self.bias: torch.Tensor | None = None
        self.last: tuple = (None, ())  # an input and its outputs, in one attribute for thread safety
        self.rows = 0
        self.seconds = [0.0]  # duration of each call during the trial
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
        """Time TRIES calls with plain weights and TRIES with packed ones, each after one untimed call; then decide."""
        if rows != self.rows:
            self.rows, self.seconds, self.weight = rows, [0.0], None
            return
        calls, shape = len(self.seconds), (rows, self.layers[0].in_features, *(layer.out_features for layer in self.layers))
        if calls == 2 * (1 + TRIES):  # packing must pay off clearly
            FASTER_PACKED.setdefault(shape, 1.2 * min(self.seconds[-TRIES:]) < min(self.seconds[1 : 1 + TRIES]))
        self.is_settled = shape in FASTER_PACKED
        if FASTER_PACKED.get(shape, calls > TRIES):
            if self.weight is None:
                self._pack(rows)
        elif self.is_settled:
            self.weight = None
            _unpack(self.layers)
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
            # The cache appends contiguous keys and values faster.
            outputs = tuple(part.contiguous() for part in output.split([layer.out_features for layer in self.layers], dim=-1))
            self.last = inputs, outputs
        return outputs[index]
