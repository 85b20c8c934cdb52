"""An adapter on disk: what PEFT calls one. Each reads what the other has written.

    save_adapter(model, "outputs/adapter")
    load_adapter(model, "outputs/adapter")        # or PeftModel.from_pretrained(model, "outputs/adapter")

Notable:
- What PEFT can do and LoRA here cannot is refused by the name of its field, never passed over.
- The file remembers the base it was trained on by a few of its numbers, and is not loaded onto another of the same shape.

Format: https://github.com/huggingface/peft
"""

import json
import os
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import cached_file

from ..atomic import atomic_file
from ..hub import is_hub_id
from ..interchange import HEADS
from .adapters import adapters_of, add_adapter_of_any_rank, delete_adapter, lora_layers, set_adapter
from .config import LoraConfig, matches, modules_in_full, targets_of
from .layer import LoraLinear, is_plain

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Fields of PEFT's that say nothing about what is computed, at least while the features they belong to are off.
WITHOUT_EFFECT = {"auto_mapping", "inference_mode", "megatron_core", "peft_type", "peft_version", "qalora_group_size"}


def save_adapter(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, each whole or not at all.

    Raises:
        ValueError: there is no such adapter.
        OSError: the folder cannot be written.
    """
    adapters, base_config = adapters_of(model, adapter_name), getattr(model, "config", None)
    config, full = adapters.configs[adapter_name], adapters.full[adapter_name]
    layers, task = lora_layers(model, adapter_name), (end for end in HEADS if type(model).__name__.endswith(end))
    written = {
        **asdict(config),
        "peft_type": "LORA",
        "inference_mode": True,
        "target_modules": _meaning(model, layers),
        "modules_to_save": [name.removesuffix(".base_layer") for name in modules_in_full(model, config)] or None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "ensure_weight_tying": len({id(parameter) for parameter in full.values()}) < len(full),
        "task_type": config.task_type or HEADS.get(next(task, "")),
        "base_model_name_or_path": config.base_model_name_or_path or getattr(base_config, "_name_or_path", None) or None,
        "revision": config.revision or getattr(base_config, "_commit_hash", None),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{PREFIX}{name}": _whole(tensor).clone() for name, tensor in _tensors(model, adapter_name).items()}
    try:
        with atomic_file(folder / WEIGHTS) as temporary:
            save_file(tensors, temporary, {"format": "pt", "base": json.dumps(_fingerprint(layers))})
        with atomic_file(folder / CONFIG) as temporary:  # keys unsorted: of two patterns that match, the first one wins
            temporary.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    except SafetensorError as error:  # safetensors wraps OSError
        raise OSError(f"{folder / WEIGHTS} cannot be written: {error}") from error


def load_adapter(
    model: nn.Module, source: str | os.PathLike, adapter_name: str = "default", trainable: bool = False, **hub: Any
) -> None:
    """Give the model an adapter that was saved here or by PEFT, and make it the active one. A failure leaves it as it was.

    Args:
        source: a folder, or the id of a repository on the Hub; `hub` takes `revision`, `token` and the like for it.

    Raises:
        ValueError: it is no LoRA, uses what is not done here (by name), is damaged, or belongs to another base.
        OSError: it is not there.
    """
    config = _read_config(_file(source, CONFIG, hub))
    base_config = getattr(model, "config", None)
    own = getattr(base_config, "_commit_hash", None)
    is_same = getattr(base_config, "_name_or_path", None) == config.base_model_name_or_path
    if is_same and config.revision and own and config.revision != own:
        raise ValueError(f"{source} was trained on revision {config.revision} of its base, and this is {own}: load that one.")
    file = _file(source, WEIGHTS, hub)
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name.removeprefix(PREFIX): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            trained_on = {
                name: float(number) for name, (number, _) in json.loads((opened.metadata() or {}).get("base", "{}")).items()
            }
    except (AttributeError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged, or is no file of weights ({error}).") from error
    # PEFT names heads that a model may have; those that this one lacks mean nothing.
    names = [name for name, _ in model.named_modules()]
    there = [end for end in config.modules_to_save or [] if any(name.endswith(end) for name in names)]
    config = replace(config, modules_to_save=there)
    _check_ranks(model, config, tensors, file)
    active, trained = (
        adapters_of(model).active_adapters,
        [parameter for parameter in model.parameters() if parameter.requires_grad],
    )
    add_adapter_of_any_rank(model, config, adapter_name)
    try:
        _check(model, tensors, _tensors(model, adapter_name), file)
        _check_base(lora_layers(model, adapter_name), trained_on, file)
        with torch.no_grad():
            for name, place in _tensors(model, adapter_name).items():
                place.copy_(tensors[name])
    except Exception:
        delete_adapter(model, adapter_name)
        set_adapter(model, *active, trainable=False)
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    set_adapter(model, adapter_name, trainable=trainable)


def _file(source: str | os.PathLike, name: str, hub: dict[str, Any]) -> str:
    source = os.fspath(source)
    if os.path.isdir(source):
        if not os.path.isfile(os.path.join(source, name)):
            raise FileNotFoundError(
                f"{source} holds no {name}: it is no adapter, or one in an old format, which could run code."
            )
        return os.path.join(source, name)
    if not is_hub_id(source):
        raise FileNotFoundError(f"{source} is neither a directory nor the id of a repository on the Hub.")
    return str(cached_file(source, name, **hub))


def _read_config(file: str) -> LoraConfig:
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        known = {item.name for item in fields(LoraConfig)}
        if content.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is {content.get('peft_type')!r}: only LORA is read here.")
        for name, value in content.items():
            if value and name not in known | WITHOUT_EFFECT:
                raise ValueError(f"{name} is {value!r}, which is not done here: load it with PEFT.")
        given = {name: value for name, value in content.items() if name in known and value is not None}
        return LoraConfig(**{"ensure_weight_tying": False, **given})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def _tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """All that an adapter consists of, under PEFT's names."""
    result: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(model, adapter_name).items():
        result[f"{name}.lora_A.weight"] = layer.lora_A[adapter_name]
        result[f"{name}.lora_B.weight"] = layer.lora_B[adapter_name]
        if adapter_name in layer.lora_magnitude_vector:
            result[f"{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector[adapter_name]
    for name, parameter in adapters_of(model).full[adapter_name].items():
        path, _, child = name.rpartition(".base_layer.")
        if path and path not in lora_layers(model, adapter_name):  # another adapter's: to this one it is the layer it was
            name = f"{path}.{child}"
        result[name] = parameter
    return result


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor put together from all processes if it is sharded over them, which then all have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _check_ranks(model: nn.Module, config: LoraConfig, tensors: dict[str, torch.Tensor], file: str) -> None:
    """Refuse ranks that are not those of the matrices, while none has been made: a damaged one could take all memory."""
    for name in targets_of(model, config):
        matrix, rank = tensors.get(f"{name}.lora_A.weight"), config.rank(name)
        if matrix is None:
            raise ValueError(f"{file} lacks {name}.lora_A.weight: it is damaged, or belongs to another base.")
        if matrix.shape[:1] != (rank,):
            shape = tuple(matrix.shape)
            raise ValueError(f"{file}: {name}.lora_A.weight is {shape}, and r is {rank} in {CONFIG}: one of them is damaged.")


def _check(model: nn.Module, tensors: dict[str, torch.Tensor], places: dict[str, torch.Tensor], file: str) -> None:
    for name in tensors.keys() - places.keys():  # PEFT may save embeddings that it has not trained
        if re.search(r"(embed\w*|wte|lm_head)(\.base_layer)?\.weight$", name):
            base = dict(model.named_parameters(remove_duplicate=False))
            own = base.get(name, base.get(name.replace(".base_layer", "")))
            if own is None or own.shape != tensors[name].shape or not torch.equal(own.to(tensors[name]), tensors[name]):
                raise ValueError(f"{file} brings embeddings of its own, {name}, which is not done here: load it with PEFT.")
            del tensors[name]
    for what, names in (("lacks", places.keys() - tensors.keys()), ("has no place for", tensors.keys() - places.keys())):
        if names:
            raise ValueError(f"{file} {what} {', '.join(sorted(names)[:3])}: it is damaged, or belongs to another base.")
    for name, place in places.items():
        if tensors[name].shape != place.shape:
            shapes = f"{tuple(tensors[name].shape)}, and should be {tuple(place.shape)}"
            raise ValueError(f"{file}: {name} is {shapes}: it is damaged, or belongs to another base.")


def _fingerprint(layers: dict[str, LoraLinear]) -> dict[str, list[float]]:
    """What tells weights apart: of the first row of each layer, the sum with turns of sign, and the length."""
    result = {}
    for name, layer in layers.items():
        if is_plain(layer.base_layer):
            weight = layer.base_layer.weight if layer.unmerged_weight is None else layer.unmerged_weight
            row = weight.detach()[0].double().cpu()
            signs = torch.ones_like(row)
            signs[1::2] = -1
            result[name] = [round(float(row @ signs), 6), round(float(row.norm()), 6)]
    return result


def _check_base(layers: dict[str, LoraLinear], trained_on: dict[str, float], file: str) -> None:
    for name, (number, length) in _fingerprint(layers).items():
        if not abs(number - trained_on.get(name, number)) <= 0.03 * length + 1e-5:  # half precision moves it by a thousandth
            raise ValueError(f"{file} was trained on other weights than this model's: load the base that it belongs to.")


def _meaning(model: nn.Module, layers: dict[str, LoraLinear]) -> str | list[str]:
    """What means these layers and no other modules: the last parts of their names, or an expression for the whole names."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    inside = tuple(f"{name}." for name in lora_layers(model))
    meant = {name for name, _ in model.named_modules() if not name.startswith(inside) and matches(name, ends)}
    return ends if meant == layers.keys() else "|".join(re.escape(name) for name in layers)


__all__ = ["load_adapter", "save_adapter"]
