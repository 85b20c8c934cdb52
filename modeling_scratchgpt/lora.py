"""LoRA, written out: a frozen linear layer learns by what two thin matrices add to it.

    y = W x + b + scale * B A x          A: (r, in), B: (out, r), scale = lora_alpha / r

B starts at zero, so that at first nothing changes. Only A and B are trained: with r = 16 on all linear layers of GPT-2 124M
that is 2,654,208 numbers instead of 124 million. Afterwards W + scale * B A is one matrix again.

    add_adapter(model, LoraConfig(r=16))                           # then train as ever
    merge_and_unload(model).save_pretrained("outputs/merged")

Notable:
- It works on the `nn.Linear` layers of any model. How an adapter lies on disk is in adapter_files.py.
- What is trained in full (a new head, biases) takes the place of the base's parameters while its adapter is active. So the
  base stays bit for bit what it was, and tied weights stay tied.
- Merging computes in float32 and keeps the weight it replaces: unmerging restores every bit.

LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685. rsLoRA: Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732.
DoRA: Liu et al., 2024, https://arxiv.org/abs/2402.09353. The names are those of PEFT, https://github.com/huggingface/peft.
"""

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class LoraConfig:
    """What an adapter adds, and where. The names are PEFT's.

    Args:
        r: rank of what is added; `rank_pattern` may give other ranks to modules whose names end in a pattern.
        lora_alpha: what is added is scaled by `lora_alpha / r`; `alpha_pattern` likewise.
        lora_dropout: share of the layers' inputs that A does not see, while training.
        target_modules: `"all-linear"`: all linear layers but the heads; or the last parts of modules' names; or a regular
            expression for whole names.
        exclude_modules: which of them are left alone, in the same way.
        layers_to_transform: numbers of the blocks to adapt; all if not given. `layers_pattern` is the name of their list.
        use_rslora: scale by `lora_alpha / sqrt(r)`, which keeps high ranks learning.
        use_dora: also train the length of each row of W, apart from its direction.
        init_lora_weights: of A: True for uniform numbers, as in `nn.Linear`, `"gaussian"` for normal ones; False leaves B at
            such numbers too, so that the adapter changes the model from the start.
        bias: which biases are trained: `"none"`, `"all"`, or `"lora_only"`: those of the adapted layers.
        modules_to_save: last parts of the names of modules that are trained in full, such as a new head.
        ensure_weight_tying: whether what is tied in the base stays so where it is trained in full.

    Raises:
        ValueError: a value is not one of those, named.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    bias: str = "none"
    modules_to_save: list[str] | None = None
    ensure_weight_tying: bool = True
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for rank in (self.r, *self.rank_pattern.values()):
            if not isinstance(rank, int) or rank < 1:
                raise ValueError(f"r must be a positive integer, got {rank!r}.")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not 0 < alpha < math.inf:
                raise ValueError(f"lora_alpha must be a positive number, got {alpha!r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout!r}.")
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            texts = [value] if isinstance(value, str) else value or []
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name} must be a text or a list of texts, got {value!r}.")
        for name in ("target_modules", "exclude_modules"):
            try:
                re.compile(value if isinstance(value := getattr(self, name), str) else "")
            except re.error as error:
                raise ValueError(f"{name} {value!r} is no regular expression: {error}.") from error
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'lora_only', got {self.bias!r}.")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(f"init_lora_weights must be True, False or 'gaussian', got {self.init_lora_weights!r}.")

    def rank(self, module_name: str) -> int:
        """The rank of what is added to this module."""
        return _by_pattern(self.rank_pattern, module_name, self.r)

    def scale(self, module_name: str) -> float:
        """What it is scaled by."""
        rank = self.rank(module_name)
        return _by_pattern(self.alpha_pattern, module_name, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(patterns: dict[str, Any], module_name: str, otherwise: Any) -> Any:
    matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module_name))
    return next(matching, otherwise)


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
        self.scale: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.active: list[str] = []
        self.unmerged_weight: torch.Tensor | None = None  # while merged: the weight as it was before
        self.train(base_layer.training)

    def add(self, adapter_name: str, rank: int, scale: float, config: LoraConfig) -> None:
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
        self.scale[adapter_name], self.dropout[adapter_name] = scale, config.lora_dropout
        if config.use_dora:
            self.lora_magnitude_vector[adapter_name] = nn.Parameter(self._row_lengths(adapter_name).to(options["dtype"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        output = self.base_layer(x)
        if self.unmerged_weight is None:
            for name in self.active:
                output = self._adapted(name, x, output)
        return output

    def _adapted(self, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        a, b, scale = self.lora_A[name], self.lora_B[name], self.scale[name]
        dropout = self.dropout[name] if self.training else 0.0
        x = nn.functional.dropout(x.to(a.dtype), dropout)
        low = nn.functional.linear(x, a)  # (..., r); B A itself, as large as W, is never made
        if name not in self.lora_magnitude_vector:
            rows = output.reshape(-1, self.out_features).to(low.dtype)
            # One product that adds to what is there, instead of a product, a scaling and a sum.
            return torch.addmm(rows, low.reshape(-1, len(a)), b.t(), alpha=scale).view_as(output).to(output.dtype)
        # DoRA: m (W + scale B A) / |W + scale B A|, row by row. The lengths are taken for constants, as in the paper (4.3).
        factor = self.lora_magnitude_vector[name] / self._row_lengths(name)  # (out,)
        bias = self.base_layer.bias
        if dropout:
            base = nn.functional.linear(x, self.base_layer.weight.to(x.dtype))
        else:
            base = output if bias is None else output - bias
        added = (factor - 1) * base + factor * scale * nn.functional.linear(low, b)
        return (output + added).to(output.dtype)

    def delta(self, name: str) -> torch.Tensor:
        """What an adapter adds to the weight: (out, in), float32."""
        return self.scale[name] * (self.lora_B[name].float() @ self.lora_A[name].float())

    @torch.no_grad()
    def _row_lengths(self, name: str) -> torch.Tensor:
        return torch.linalg.vector_norm(self.base_layer.weight.float() + self.delta(name), dim=1)  # (out,)

    @torch.no_grad()
    def merge(self) -> None:
        """Make what the active adapters add part of the weight."""
        weight = self.base_layer.weight
        if self.unmerged_weight is None and self.active:
            merged = weight.float() + sum(self.delta(name) for name in self.active)
            for name in self.active:
                if name in self.lora_magnitude_vector:
                    merged *= (self.lora_magnitude_vector[name] / self._row_lengths(name))[:, None]
            self.unmerged_weight, weight.data = weight.data, merged.to(weight.dtype)

    def unmerge(self) -> None:
        """Put the weight back."""
        if self.unmerged_weight is not None:
            self.base_layer.weight.data, self.unmerged_weight = self.unmerged_weight, None


# The adapters of a model --------------------------------------------------------------------------------------------------


@dataclass
class Adapters:
    """What a model knows of its adapters, besides its layers."""

    configs: dict[str, LoraConfig] = field(default_factory=dict)
    full: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)  # by adapter: what replaces which parameter
    base: dict[str, nn.Parameter] = field(default_factory=dict)  # what is replaced
    active: tuple[str, ...] = ()


def adapters_of(model: nn.Module, *names: str) -> Adapters:
    """What is known of a model's adapters.

    Raises:
        ValueError: one of these names is none of them.
    """
    adapters: Adapters = vars(model).get("_lora") or Adapters()
    for name in names:
        if name not in adapters.configs:
            raise ValueError(f"the model has no adapter {name!r}: it has {', '.join(adapters.configs) or 'none'}.")
    return adapters


def lora_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, LoraLinear]:
    """The layers that adapters have been added to, or only those of one adapter, by name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    return {name: layer for name, layer in layers.items() if adapter_name is None or adapter_name in layer.lora_A}


def add_adapter(model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> None:
    """Give the model a new adapter and make it the active one. All other parameters are frozen.

    Raises:
        ValueError: the model has one of that name, or cannot have what the config asks for; the message names the module.
    """
    adapters = adapters_of(model)
    if adapter_name in adapters.configs or not re.fullmatch(r"\w+", adapter_name):
        taken = ", ".join(adapters.configs) or "none"
        raise ValueError(f"adapter_name {adapter_name!r} is taken, or no word of letters and digits; taken are: {taken}.")
    _refuse_merged(model)
    targets = _targets(model, config)
    for name, layer in targets.items():
        base = layer.base_layer if isinstance(layer, LoraLinear) else layer
        rank, limit = config.rank(name), min(base.in_features, base.out_features)
        if rank > limit:
            raise ValueError(
                f"r is {rank}, and {name} is {base.out_features} x {base.in_features}: at most {limit} makes sense."
            )
        if config.use_dora and not is_plain(base):
            raise ValueError(f"use_dora needs the numbers of {name}, and it is quantized: leave it out.")
    _trained_in_full(model, config, targets)  # says what is not there, while nothing has changed
    for name, layer in targets.items():
        if not isinstance(layer, LoraLinear):
            targets[name] = LoraLinear(layer)
            _set(model, name, targets[name])
        targets[name].add(adapter_name, config.rank(name), config.scale(name), config)
    copies: dict[Any, nn.Parameter] = {}
    adapters.full[adapter_name] = {}
    for name, parameter in _trained_in_full(model, config, targets).items():
        parameter = adapters.base.setdefault(name, parameter)
        same = id(parameter) if config.ensure_weight_tying else name  # one copy for all places that hold the same
        copies.setdefault(same, nn.Parameter(parameter.detach().clone()))
        adapters.full[adapter_name][name] = copies[same]
    adapters.configs[adapter_name] = config
    model._lora = adapters  # type: ignore[assignment]  # neither a module nor a parameter
    set_adapter(model, adapter_name)


def set_adapter(model: nn.Module, *adapter_names: str, trainable: bool = True) -> None:
    """Make these adapters the active ones: what they add is summed up. With none, the model is its base.

    Args:
        trainable: whether their parameters require gradients; nothing else does.

    Raises:
        ValueError: there is none of that name; or they cannot be active together.
    """
    adapters = adapters_of(model, *adapter_names)
    _refuse_merged(model)
    if len(adapter_names) > 1:
        _refuse_more_than_matrices(adapters, adapter_names)
    for name, parameter in adapters.base.items():
        own = [adapters.full[adapter][name] for adapter in adapter_names if name in adapters.full[adapter]]
        _set(model, name, own[0] if own else parameter)
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        layer.active = [name for name in adapter_names if name in layer.lora_A]
        for name in layer.active:
            for parameters in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                if name in parameters:
                    parameters[name].requires_grad_(trainable)
    for adapter in adapter_names:
        for parameter in adapters.full[adapter].values():
            parameter.requires_grad_(trainable)
    adapters.active = adapter_names


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model is its base, whether or not adapters are merged."""
    active, trainable = adapters_of(model).active, any(parameter.requires_grad for parameter in model.parameters())
    is_merged = any(layer.unmerged_weight is not None for layer in lora_layers(model).values())
    unmerge(model)
    set_adapter(model)
    try:
        yield
    finally:
        set_adapter(model, *active, trainable=trainable)
        if is_merged:
            merge(model)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter away; after the last one the model is what it was before the first."""
    adapters = adapters_of(model, adapter_name)
    set_adapter(model, *(name for name in adapters.active if name != adapter_name))
    for layer in lora_layers(model, adapter_name).values():
        for values in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, layer.scale, layer.dropout):
            if adapter_name in values:
                del values[adapter_name]
    del adapters.configs[adapter_name], adapters.full[adapter_name]
    if not adapters.configs:
        _unload(model)


def combine_adapters(model: nn.Module, weights: dict[str, float], adapter_name: str) -> None:
    """A new adapter that adds the weighted sum of what others add: their matrices, side by side.

    Raises:
        ValueError: one of them has more than matrices; or see `add_adapter`.
    """
    adapters = adapters_of(model, *weights)
    _refuse_more_than_matrices(adapters, weights)
    parts = {name: [adapter for adapter in weights if adapter in layer.lora_A] for name, layer in lora_layers(model).items()}
    parts = {name: own for name, own in parts.items() if own}
    layers = lora_layers(model)
    ranks = {name: sum(len(layers[name].lora_A[adapter]) for adapter in own) for name, own in parts.items()}
    most = max(ranks.values(), default=1)
    others: dict[str, Any] = {re.escape(name): rank for name, rank in ranks.items() if rank != most}
    config = LoraConfig(r=most, lora_alpha=most, target_modules=[*ranks], rank_pattern=others, alpha_pattern=others)
    add_adapter(model, config, adapter_name)
    with torch.no_grad():
        for name, own in parts.items():
            layer = layers[name]
            layer.lora_A[adapter_name].copy_(torch.cat([layer.lora_A[adapter] for adapter in own]))
            scaled = [weights[adapter] * layer.scale[adapter] * layer.lora_B[adapter] for adapter in own]
            layer.lora_B[adapter_name].copy_(torch.cat(scaled, dim=1))


def merge(model: nn.Module) -> None:
    """Make what the active adapters add part of the weights: the model is as fast as its base, until `unmerge`.

    Raises:
        ValueError: a layer is quantized.
    """
    for name, layer in lora_layers(model).items():
        if not is_plain(layer.base_layer):
            raise ValueError(f"{name} is quantized: load its base as it was before, and the adapter onto that, to merge them.")
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, bit for bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def merge_and_unload(model: nn.Module) -> nn.Module:
    """The same model without adapters, what the active ones add made part of its weights; saved and trained as ever."""
    merge(model)
    _unload(model)
    return model


def trainable_parameters(model: nn.Module) -> str:
    """A line on how many parameters are trained."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = sum(count for count, _ in counts), sum(count for count, is_trained in counts if is_trained)
    return f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})"


def is_plain(layer: nn.Module) -> bool:
    """Whether a linear layer holds its weight as numbers, not as what a quantizer has made of them."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and layer.weight.is_floating_point()


def _set(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    """Put a module or a parameter where another is."""
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(value, nn.Parameter):
        value.data = value.data.to(getattr(module, child).device)  # the model may have moved meanwhile
    setattr(module, child, value)


def _unload(model: nn.Module) -> None:
    for name, layer in lora_layers(model).items():
        _set(model, name, layer.base_layer)
    vars(model).pop("_lora", None)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def _refuse_merged(model: nn.Module) -> None:
    for name, layer in lora_layers(model).items():
        if layer.unmerged_weight is not None:
            raise ValueError(f"{name} has an adapter merged into it: call `unmerge` first.")


def _refuse_more_than_matrices(adapters: Adapters, names: Iterable[str]) -> None:
    for name in names:
        if adapters.configs[name].use_dora or adapters.full[name]:
            raise ValueError(f"adapter {name!r} has DoRA, or parameters trained in full: it cannot be added to another.")


# What a config means ------------------------------------------------------------------------------------------------------


def _targets(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """The layers that the config means, by name."""
    inside = tuple(f"{name}." for name in lora_layers(model))
    modules = {name: module for name, module in model.named_modules() if name and not name.startswith(inside)}
    linear = {name for name, module in modules.items() if isinstance(module, (nn.Linear, LoraLinear))}
    if config.target_modules == "all-linear":
        backbone = getattr(model, "base_model_prefix", "")  # of a model of transformers; what is beside it are heads
        found = {name for name in linear if name.startswith(f"{backbone}.")} if hasattr(model, backbone) else linear
    else:
        found = {name for name in modules if _matches(name, config.target_modules)}
    found = {
        name
        for name in found
        if _in_layers(name, config)
        and not _matches(name, config.exclude_modules or [])
        and not any(f".{end}." in f".{name}." for end in config.modules_to_save or [])
    }
    for name in sorted(found - linear):
        raise ValueError(f"target_modules means {name}, a {type(modules[name]).__name__}: LoRA goes into nn.Linear here.")
    if not found:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
        raise ValueError(f"target_modules {config.target_modules!r} means no layer; linear layers of this model are {there}.")
    return {name: module for name, module in modules.items() if name in found}


def _matches(name: str, wanted: str | list[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def _in_layers(name: str, config: LoraConfig) -> bool:
    if config.layers_to_transform is None:
        return True
    wanted = config.layers_to_transform if isinstance(config.layers_to_transform, list) else [config.layers_to_transform]
    lists = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or ["[^.]*"]
    numbers = [match[1] for pattern in lists if (match := re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", name))]
    return bool(numbers) and int(numbers[0]) in wanted


def _trained_in_full(model: nn.Module, config: LoraConfig, targets: dict[str, Any]) -> dict[str, nn.Parameter]:
    """The parameters that the config has trained as they are, by every name they have."""
    parameters = {name: value for name, value in model.named_parameters(remove_duplicate=False) if ".lora_" not in name}
    wanted: set[str] = set()
    for end in config.modules_to_save or []:
        of_module = {name for name in parameters if f".{end}." in f".{name}"}
        if not of_module:
            raise ValueError(f"modules_to_save has {end!r}, and the model has no module of that name with parameters.")
        wanted |= of_module
    if config.bias == "all":
        wanted |= {name for name in parameters if name.endswith(".bias")}
    if config.bias == "lora_only":
        wanted |= {
            name
            for name in parameters
            if name.endswith(".bias") and name.rpartition(".")[0].removesuffix(".base_layer") in targets
        }
    if config.ensure_weight_tying:
        same = {id(parameters[name]) for name in wanted}
        wanted |= {name for name, parameter in parameters.items() if id(parameter) in same}
    return {name: parameter for name, parameter in parameters.items() if name in wanted}


__all__ = [
    "LoraConfig",
    "LoraLinear",
    "add_adapter",
    "combine_adapters",
    "delete_adapter",
    "disabled",
    "merge",
    "merge_and_unload",
    "set_adapter",
    "trainable_parameters",
    "unmerge",
]
