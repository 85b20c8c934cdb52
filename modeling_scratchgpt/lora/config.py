"""Settings of a LoRA adapter, and the layers and parameters of a model that they select. Names and meaning are PEFT's."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


@dataclass
class LoraConfig:
    """Settings of a LoRA adapter, under PEFT's names.

    Args:
        r: rank of the update; `rank_pattern` maps regular expressions for the ends of module names to other ranks.
        lora_alpha: the update is scaled by `lora_alpha / r`; `alpha_pattern` likewise.
        lora_dropout: dropout probability of the input of A.
        target_modules: `"all-linear"` (without the heads), suffixes of module names, or a regular expression for whole names.
        exclude_modules: modules to leave out, in the same form.
        layers_to_transform: indices of the blocks to adapt (default: all); `layers_pattern` is the name of their list.
        use_rslora: scale by `lora_alpha / sqrt(r)`, which keeps high ranks learning.
        use_dora: also train the magnitude of each row of W, separately from its direction.
        init_lora_weights: True: A uniform as in `nn.Linear`, B zero; `"gaussian"`: A normal, B zero; False: both uniform.
        bias: biases to train: `"none"`, `"all"`, or `"lora_only"` (those of the adapted layers).
        modules_to_save: suffixes of the names of modules that are trained in full, such as a new head.
        ensure_weight_tying: keep tied weights tied where they are trained in full.

    Raises:
        ValueError: an invalid value; the message names the field.
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
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(patterns := getattr(self, name), dict):
                raise ValueError(f"{name} must map name patterns to numbers, got {patterns!r}.")
            _check_expressions(name, patterns)
        for rank in (self.r, *self.rank_pattern.values()):
            if type(rank) is not int or rank < 1:
                raise ValueError(f"r must be a positive integer, got {rank!r}.")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, int | float) or not 0 < alpha < 1e30:
                raise ValueError(f"lora_alpha must be a positive number, got {alpha!r}.")
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout!r}.")
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            is_list = isinstance(value, list) and all(isinstance(text, str) for text in value)
            is_text = isinstance(value, str) and name != "modules_to_save"
            if not is_list and not is_text and (value is not None or name == "target_modules"):
                expected = "a list of strings" if name == "modules_to_save" else "a string or a list of strings"
                raise ValueError(f"{name} must be {expected}, got {value!r}.")
            if is_text or name == "layers_pattern":
                _check_expressions(name, _as_list(value))
        if not all(type(number) is int for number in _as_list(self.layers_to_transform)):
            raise ValueError(f"layers_to_transform must be a number or a list of numbers, got {self.layers_to_transform!r}.")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'lora_only', got {self.bias!r}.")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(f"init_lora_weights must be True, False or 'gaussian', got {self.init_lora_weights!r}.")

    def rank(self, module_name: str) -> int:
        """Rank of the update of a module."""
        return _by_pattern(self.rank_pattern, module_name, self.r)

    def scaling(self, module_name: str) -> float:
        """Scale of the update of a module."""
        rank = self.rank(module_name)
        return _by_pattern(self.alpha_pattern, module_name, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(patterns: dict[str, Any], module_name: str, otherwise: Any) -> Any:
    matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module_name))
    return next(matching, otherwise)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _check_expressions(name: str, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"{name} {pattern!r} is not a regular expression: {error}.") from error


def targets_of(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """Select the layers to adapt, by name, including those that already have an adapter."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "lora_A"))
    modules = {name: module for name, module in model.named_modules() if name and not name.startswith(inside)}
    linear = {name for name, module in modules.items() if _can_be_adapted(module)}
    if config.target_modules == "all-linear":
        backbone = getattr(model, "base_model_prefix", "")  # in transformers, modules outside the backbone are heads
        found = {name for name in linear if name.startswith(f"{backbone}.")} if hasattr(model, backbone) else linear
    else:
        found = {name for name in modules if matches(name, config.target_modules)}
    in_full = tuple(f"{name}." for name in modules_in_full(model, config))
    found = {name for name in found if _in_layers(name, config) and not f"{name}.".startswith(in_full)}
    found -= {name for name in found if matches(name, config.exclude_modules or [])}
    for name in sorted(found - linear):
        raise ValueError(f"target_modules selects {name}, a {type(modules[name]).__name__}: only nn.Linear is supported.")
    if not found:
        available = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
        raise ValueError(f"target_modules {config.target_modules!r} selects no layer; the linear layers here are {available}.")
    ids = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    for name in sorted(found):
        if ids.count(id(modules[name])) > 1:
            raise ValueError(f"{name} is used in several places of the model: LoRA cannot adapt only one of them.")
    return {name: module for name, module in modules.items() if name in found}


def modules_in_full(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the modules that are trained in full (`modules_to_save`)."""
    names = [name for name, _ in model.named_modules() if name and ".lora_" not in name]
    result: set[str] = set()
    for end in config.modules_to_save or []:
        found = {name for name in names if name.removesuffix(".base_layer").endswith(end)}  # as in PEFT
        if not any(list(model.get_submodule(name).parameters()) for name in found):
            raise ValueError(f"modules_to_save contains {end!r}, but the model has no such module with parameters.")
        result |= found
    for name in result:
        if list(model.get_submodule(name).buffers()):
            raise ValueError(f"modules_to_save selects {name}, which has buffers: only parameters are supported.")
    return sorted(result)


def parameters_in_full(model: nn.Module, config: LoraConfig, targets: Iterable[str]) -> dict[str, nn.Parameter]:
    """Parameters that are trained in full, under all of their names."""
    parameters = {name: value for name, value in model.named_parameters(remove_duplicate=False) if ".lora_" not in name}
    modules = tuple(f"{name}." for name in modules_in_full(model, config))
    wanted = {name for name in parameters if name.startswith(modules)}
    if config.bias != "none":
        adapted = {f"{name}{inner}.bias" for name in targets for inner in ("", ".base_layer")}
        wanted |= {name for name in parameters if name.endswith(".bias") and (config.bias == "all" or name in adapted)}
    if config.ensure_weight_tying:
        same = {id(parameters[name]) for name in wanted}
        wanted |= {name for name, parameter in parameters.items() if id(parameter) in same}
    return {name: parameter for name, parameter in parameters.items() if name in wanted}


def matches(name: str, wanted: str | list[str]) -> bool:
    """Match the name of a module with a regular expression (a string) or with suffixes (a list)."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def _can_be_adapted(module: nn.Module) -> bool:
    # nn.MultiheadAttention reads the weight of its output layer without calling the layer.
    return hasattr(module, "lora_A") or (isinstance(module, nn.Linear) and type(module) is not NonDynamicallyQuantizableLinear)


def _in_layers(name: str, config: LoraConfig) -> bool:
    wanted, lists = _as_list(config.layers_to_transform), _as_list(config.layers_pattern) or [""]
    found = [re.match(rf"(?:.*?\.)?{pattern or '[^.]*'}\.(\d+)\.", name) for pattern in lists]
    numbers = [int(match[1]) for match in found if match]
    return not wanted or (bool(numbers) and numbers[0] in wanted)
