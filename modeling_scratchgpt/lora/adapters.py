"""Add, activate, combine, merge and delete the adapters of a model.

Notable:
- It works on the `nn.Linear` layers of any model.
- Parameters trained in full replace those of the base while their adapter is active, so base and tied weights stay.
"""

import re
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .config import LoraConfig, parameters_in_full, targets_of
from .layer import LoraLinear, is_plain, replace_parameter


@dataclass
class Adapters:
    """State of a model's adapters outside its LoRA layers."""

    configs: dict[str, LoraConfig] = field(default_factory=dict)
    full: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)  # by adapter: replacements by name
    base: dict[str, nn.Parameter] = field(default_factory=dict)  # the replaced parameters
    frozen: list[nn.Parameter] = field(default_factory=list)  # frozen before the first adapter was added
    active_adapters: tuple[str, ...] = ()


def adapters_of(model: nn.Module, *names: str) -> Adapters:
    """Return the state of a model's adapters, after checking that it has those named.

    Raises:
        ValueError: there is no such adapter, or the model is a wrapper or a part of the one that has the adapters.
    """
    # A wrapper would hide the state below, and DistributedDataParallel does not synchronize parameters that are added later.
    is_wrapper = isinstance(model, DistributedDataParallel | nn.DataParallel) or hasattr(model, "_orig_mod")  # torch.compile
    if is_wrapper or ("_lora" not in vars(model) and lora_layers(model)):
        problem = f"adapters belong to the whole model, not to this {type(model).__name__}"
        example = "`extract_model_from_parallel(model, keep_torch_compile=False)` (accelerate.utils)"
        raise ValueError(f"{problem}: pass the model that they are added to, such as {example}.")
    adapters: Adapters = vars(model).get("_lora") or Adapters()
    for name in names:
        if name not in adapters.configs:
            raise ValueError(f"the model has no adapter {name!r}: its adapters are: {', '.join(adapters.configs) or 'none'}.")
    return adapters


def lora_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, LoraLinear]:
    """Layers with an adapter, or with this adapter, by name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    return {name: layer for name, layer in layers.items() if adapter_name is None or adapter_name in layer.lora_A}


def tensors_of(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """All parameters of an adapter, under PEFT's names."""
    layers = lora_layers(model, adapter_name)
    result: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        result[f"{name}.lora_A.weight"] = layer.lora_A[adapter_name]
        result[f"{name}.lora_B.weight"] = layer.lora_B[adapter_name]
        if adapter_name in layer.lora_magnitude_vector:
            result[f"{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector[adapter_name]
    full = adapters_of(model).full[adapter_name]
    return result | {peft_name(name, layers): parameter for name, parameter in full.items()}


def peft_name(name: str, adapted: Container[str]) -> str:
    """PEFT's name of a parameter of the base: there, only the layers that this adapter adapts are wrapped."""
    name = name.replace(".base_layer.", ".")
    layer, _, child = name.rpartition(".")
    return f"{layer}.base_layer.{child}" if layer in adapted else name


def add_adapter(model: nn.Module, config: LoraConfig, adapter_name: str = "default", limit_rank: bool = True) -> None:
    """Add a new adapter, activate it, and freeze all other parameters.

    Args:
        limit_rank: refuse a rank above that of a matrix. Published adapters may have one, where a matrix is narrow.

    Raises:
        ValueError: the name is taken, or the config does not fit the model; the message names the module.
    """
    adapters = adapters_of(model)
    is_word = isinstance(adapter_name, str) and re.fullmatch(r"\w+", adapter_name)
    is_attribute = any(hasattr(container(), str(adapter_name)) for container in (nn.ParameterDict, nn.ModuleDict))
    if not is_word or is_attribute or adapter_name in adapters.configs:
        own = ", ".join(adapters.configs) or "none"
        raise ValueError(f"adapter_name {adapter_name!r} is taken, reserved or not a word of letters and digits; taken: {own}.")
    _refuse_merged(model)
    targets = targets_of(model, config)
    for name, layer in targets.items():
        base = layer.base_layer if isinstance(layer, LoraLinear) else layer
        rank, limit = config.rank(name), min(layer.in_features, layer.out_features)
        if limit_rank and rank > limit:
            size = f"{layer.out_features} x {layer.in_features}"
            raise ValueError(f"r is {rank}, but {name} is {size}: its rank is at most {limit}.")
        if config.use_dora and not is_plain(base):
            raise ValueError(f"use_dora needs the plain weight of {name}, but {_form(base)}: leave it out.")
        if base.weight.is_meta and hasattr(base, "_hf_hook"):
            raise ValueError(f"{name} is offloaded: load the model onto one device, then add the adapter.")
    in_full = parameters_in_full(model, config, targets)  # raises its errors before anything is changed
    if not adapters.configs:
        adapters.frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    adapters.full[adapter_name] = {}
    copies: dict[Any, nn.Parameter] = {}
    for name, parameter in in_full.items():
        parameter = adapters.base.setdefault(name, parameter)
        same = id(parameter) if config.ensure_weight_tying else name  # one copy for tied parameters
        copies.setdefault(same, nn.Parameter(parameter.detach().clone()))
        adapters.full[adapter_name][name] = copies[same]
    for name, layer in targets.items():
        if not isinstance(layer, LoraLinear):
            targets[name] = LoraLinear(layer)
            model.set_submodule(name, targets[name])
            for known in (adapters.base, *adapters.full.values()):  # parameters of the wrapped layer get a longer name
                for old in [old for old in known if old.rpartition(".")[0] == name]:
                    known[f"{name}.base_layer.{old.rpartition('.')[2]}"] = known.pop(old)
        targets[name].update_layer(adapter_name, config.rank(name), config.scaling(name), config)
    adapters.configs[adapter_name] = config
    model._lora = adapters  # type: ignore[assignment]  # neither a module nor a parameter
    set_adapter(model, adapter_name)


def set_adapter(model: nn.Module, *adapter_names: str, trainable: bool = True) -> None:
    """Activate these adapters, whose updates are summed; without names, deactivate all.

    Args:
        trainable: whether their parameters require gradients. All other parameters are frozen.

    Raises:
        ValueError: an adapter does not exist, or they cannot be active together.
    """
    adapters = adapters_of(model, *adapter_names)
    if not adapters.configs:
        return
    _refuse_merged(model)
    if len(adapter_names) > 1:
        _refuse_dora_and_full(adapters, adapter_names)
    for name, parameter in adapters.base.items():
        own = [adapters.full[adapter][name] for adapter in adapter_names if name in adapters.full[adapter]]
        parent, _, child = name.rpartition(".")
        replace_parameter(model.get_submodule(parent), child, own[0] if own else parameter)
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        layer.active_adapters = [name for name in adapter_names if name in layer.lora_A]
    for adapter in adapter_names:
        for parameter in tensors_of(model, adapter).values():
            parameter.requires_grad_(trainable)
    adapters.active_adapters = adapter_names


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Context manager in which the model computes what its base computes, even if adapters are merged."""
    active, trained = adapters_of(model).active_adapters, trained_parameters(model)
    is_merged = any(layer.unmerged_weight is not None for layer in lora_layers(model).values())
    unmerge_adapter(model)
    set_adapter(model)
    try:
        yield
    finally:
        set_adapter(model, *active, trainable=False)
        for parameter in trained:
            parameter.requires_grad_(True)
        if is_merged:
            merge_adapter(model)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Delete an adapter. Deleting the last one restores the base model."""
    adapters = adapters_of(model, adapter_name)
    _refuse_merged(model)
    trained = trained_parameters(model)
    set_adapter(model, *(name for name in adapters.active_adapters if name != adapter_name), trainable=False)
    for parameter in trained:
        parameter.requires_grad_(True)
    for layer in lora_layers(model, adapter_name).values():
        for values in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, layer.scaling, layer.lora_dropout):
            if adapter_name in values:
                del values[adapter_name]
    del adapters.configs[adapter_name], adapters.full[adapter_name]
    if not adapters.configs:
        _unload(model)


def add_weighted_adapter(model: nn.Module, weights: dict[str, float], adapter_name: str) -> None:
    """Add a new adapter, the weighted sum of others: their matrices are concatenated.

    Raises:
        ValueError: an adapter uses DoRA or trains parameters in full; see also `add_adapter`.
    """
    adapters = adapters_of(model, *weights)
    _refuse_dora_and_full(adapters, weights)
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or not abs(weight) < 1e30:
            raise ValueError(f"the weight of adapter {name!r} must be a number, got {weight!r}.")
    layers = lora_layers(model)
    parts = {name: [adapter for adapter in weights if adapter in layer.lora_A] for name, layer in layers.items()}
    ranks = {name: sum(len(layers[name].lora_A[adapter]) for adapter in own) for name, own in parts.items() if own}
    max_rank = max(ranks.values(), default=1)
    others: dict[str, Any] = {re.escape(name): rank for name, rank in ranks.items() if rank != max_rank}
    config = LoraConfig(r=max_rank, lora_alpha=max_rank, target_modules=[*ranks], rank_pattern=others, alpha_pattern=others)
    add_adapter(model, config, adapter_name, limit_rank=False)
    with torch.no_grad():
        for name in ranks:
            layer, own = layers[name], parts[name]
            layer.lora_A[adapter_name].copy_(torch.cat([layer.lora_A[adapter] for adapter in own]))
            scaled = [weights[adapter] * layer.scaling[adapter] * layer.lora_B[adapter] for adapter in own]
            layer.lora_B[adapter_name].copy_(torch.cat(scaled, dim=1))


def merge_adapter(model: nn.Module) -> None:
    """Merge the active adapters into the weights, which makes the model as fast as its base; undo with `unmerge_adapter`.

    Raises:
        ValueError: a layer is quantized or sharded.
    """
    adapters_of(model)
    for name, layer in lora_layers(model).items():
        if not is_plain(layer.base_layer):
            raise ValueError(f"{name} cannot be merged because {_form(layer.base_layer)}: load base and adapter without that.")
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_adapter(model: nn.Module) -> None:
    """Undo `merge_adapter` exactly."""
    adapters_of(model)
    for layer in lora_layers(model).values():
        layer.unmerge()


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge the active adapters and remove all, which leaves an ordinary model. A tied head with an adapter is untied."""
    merge_adapter(model)
    head, embedding = (getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("output", "input"))
    _unload(model)
    weights = [getattr(getattr(module, "base_layer", module), "weight", None) for module in (head, embedding)]
    if all(weight is not None for weight in weights) and weights[0] is not weights[1]:
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    return model


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trainable_parameters(model: nn.Module) -> str:
    """Describe how many parameters are trained, in one line."""
    total, trained = (sum(map(torch.numel, some)) for some in (model.parameters(), trained_parameters(model)))
    return f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})"


def _form(layer: Any) -> str:
    return f"it is quantized, sharded or of a special class ({type(layer).__name__} with a {type(layer.weight).__name__})"


def _unload(model: nn.Module) -> None:
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.base_layer)
    adapters: Adapters = vars(model).pop("_lora", Adapters())
    frozen = {id(parameter) for parameter in adapters.frozen}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() and id(parameter) not in frozen)


def _refuse_merged(model: nn.Module) -> None:
    for name, layer in lora_layers(model).items():
        if layer.unmerged_weight is not None:
            raise ValueError(f"{name} has an adapter merged into it: call `unmerge_adapter` first.")


def _refuse_dora_and_full(adapters: Adapters, names: Iterable[str]) -> None:
    for name in names:
        if adapters.configs[name].use_dora or adapters.full[name]:
            raise ValueError(f"adapter {name!r} uses DoRA or trains parameters in full: it cannot be combined with another.")
