"""An adapter on disk: what PEFT calls one. Each reads what the other has written.

    save_adapter(model, "outputs/adapter")
    load_adapter(model, "outputs/adapter")        # or PeftModel.from_pretrained(model, "outputs/adapter")

Notable:
- What PEFT can do and LoRA here cannot is refused by the name of its field, never passed over.
- The file remembers the base it was trained on by a few of its numbers, and is not loaded onto another of the same shape.

Format: https://github.com/huggingface/peft
"""

import hashlib
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import cached_file

from .lora import LoraConfig, LoraLinear, adapters_of, add_adapter, delete_adapter, is_plain, lora_layers, set_adapter

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
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
    layers, task = lora_layers(model, adapter_name), (end for end in TASKS if type(model).__name__.endswith(end))
    written = {
        **asdict(config),
        "peft_type": "LORA",
        "inference_mode": True,
        "target_modules": _shortened(model, layers),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "ensure_weight_tying": len({id(parameter) for parameter in full.values()}) < len(full),
        "task_type": config.task_type or TASKS.get(next(task, "")),
        "base_model_name_or_path": config.base_model_name_or_path or getattr(base_config, "_name_or_path", None) or None,
        "revision": config.revision or getattr(base_config, "_commit_hash", None),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".writing-{os.getpid()}"
    try:
        tensors = {f"{PREFIX}{name}": tensor.detach().clone() for name, tensor in _tensors(model, adapter_name).items()}
        save_file(tensors, temporary, {"format": "pt", "base": _fingerprint(layers)})
        os.replace(temporary, folder / WEIGHTS)
        temporary.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
        os.replace(temporary, folder / CONFIG)
    except SafetensorError as error:  # it wraps the system's errors into its own words
        raise OSError(f"{folder / WEIGHTS} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


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
    config = _read_config(cached_file(os.fspath(source), CONFIG, **hub))
    base_config = getattr(model, "config", None)
    own = getattr(base_config, "_commit_hash", None)
    is_same = getattr(base_config, "_name_or_path", None) == config.base_model_name_or_path
    if is_same and config.revision and own and config.revision != own:
        raise ValueError(f"{source} was trained on revision {config.revision} of its base, and this is {own}: load that one.")
    file = cached_file(os.fspath(source), WEIGHTS, **hub)
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name.removeprefix(PREFIX): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            trained_on = (opened.metadata() or {}).get("base")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, or is no file of weights ({error}).") from error
    active, trainables = adapters_of(model).active, {name for name, value in model.named_parameters() if value.requires_grad}
    add_adapter(model, config, adapter_name)
    try:
        _check(tensors, _tensors(model, adapter_name), str(file))
        if trained_on and _fingerprint(lora_layers(model, adapter_name)) not in ("", trained_on):
            raise ValueError(f"{file} was trained on other weights than this model's: load the base that it belongs to.")
    except ValueError:
        delete_adapter(model, adapter_name)
        if adapters_of(model).configs:
            set_adapter(model, *active)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainables)
        raise
    with torch.no_grad():
        for name, place in _tensors(model, adapter_name).items():
            place.copy_(tensors[name])
    set_adapter(model, adapter_name, trainable=trainable)


def _read_config(file: Any) -> LoraConfig:
    try:
        content = json.loads(Path(file).read_text())
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
    return result | adapters_of(model).full[adapter_name]


def _check(tensors: dict[str, torch.Tensor], places: dict[str, torch.Tensor], file: str) -> None:
    for what, names in (("lacks", places.keys() - tensors.keys()), ("has no place for", tensors.keys() - places.keys())):
        if names:
            raise ValueError(f"{file} {what} {', '.join(sorted(names)[:3])}: it is damaged, or belongs to another base.")
    for name, place in places.items():
        if tensors[name].shape != place.shape:
            shapes = f"{tuple(tensors[name].shape)}, and should be {tuple(place.shape)}"
            raise ValueError(f"{file}: {name} is {shapes}: it is damaged, or belongs to another base.")


def _fingerprint(layers: dict[str, LoraLinear]) -> str:
    """Tells weights apart by a few numbers of each adapted layer, in bfloat16, to which other precisions round alike."""
    digest = hashlib.sha256()
    for name, layer in sorted(layers.items()):
        if not is_plain(layer.base_layer):
            return ""
        weight = layer.base_layer.weight if layer.unmerged_weight is None else layer.unmerged_weight
        digest.update(name.encode() + weight.detach()[0, :64].bfloat16().cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _shortened(model: nn.Module, layers: dict[str, LoraLinear]) -> list[str]:
    """The last parts of these layers' names if they mean no other module, or their whole names."""
    ends = {name.rpartition(".")[2] for name in layers}
    others = {name for name, _ in model.named_modules()} - layers.keys()
    return sorted(layers) if any(name.rpartition(".")[2] in ends for name in others) else sorted(ends)


__all__ = ["load_adapter", "save_adapter"]
