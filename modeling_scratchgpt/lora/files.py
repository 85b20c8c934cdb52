"""Save and load adapters in PEFT's format, in both directions.

    save_adapter(model, "outputs/adapter")
    load_adapter(model, "outputs/adapter")        # or PeftModel.from_pretrained(model, "outputs/adapter")

Notable:
- Features of PEFT that are not supported here are refused by the name of their field, never ignored.
- The file holds a fingerprint of the base's weights, so an adapter is not loaded onto another base of the same shape.
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
from .adapters import adapters_of, add_adapter, disable_adapter, lora_layers, peft_name, set_adapter, tensors_of
from .config import LoraConfig, matches, modules_in_full, parameters_in_full, targets_of
from .layer import LoraLinear, is_plain

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Fields of PEFT that do not change the result while the features they belong to are off.
WITHOUT_EFFECT = {"auto_mapping", "inference_mode", "megatron_core", "peft_type", "peft_version", "qalora_group_size"}

# Where PEFT's default of a field is another one than in `LoraConfig`.
PEFT_DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8, "ensure_weight_tying": False}


def save_adapter(model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default") -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, each atomically.

    Raises:
        ValueError: the model has no such adapter.
        OSError: the directory cannot be written.
    """
    adapters, base_config = adapters_of(model, adapter_name), getattr(model, "config", None)
    config, full = adapters.configs[adapter_name], adapters.full[adapter_name]
    layers = lora_layers(model, adapter_name)
    in_full = [name.removesuffix(".base_layer") for name in modules_in_full(model, config)]
    # For the task of a classifier, PEFT expects a head in the file.
    tasks = (task for head, task in HEADS.items() if type(model).__name__.endswith(head) and (in_full or task == "CAUSAL_LM"))
    written = {
        **asdict(config),
        "peft_type": "LORA",
        "inference_mode": True,
        "target_modules": _target_modules(model, layers),
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),  # `target_modules` is exact
        "modules_to_save": in_full or None,
        "ensure_weight_tying": len({id(parameter) for parameter in full.values()}) < len(full),
        "task_type": config.task_type or next(tasks, None),
        "base_model_name_or_path": config.base_model_name_or_path or getattr(base_config, "_name_or_path", None) or None,
        "revision": config.revision,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in tensors_of(model, adapter_name).items():  # all processes have to gather sharded tensors
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        tensors[f"{PREFIX}{name}"] = gathered.clone()
    try:
        with atomic_file(directory / WEIGHTS) as temporary:
            save_file(tensors, temporary, {"format": "pt", "base": json.dumps(_fingerprint(layers, adapters_of(model).base))})
        with atomic_file(directory / CONFIG) as temporary:  # keys unsorted: of two patterns that match, the first one wins
            temporary.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    except SafetensorError as error:  # safetensors wraps OSError
        raise OSError(f"{directory / WEIGHTS} cannot be written: {error}") from error


def load_adapter(
    model: nn.Module, source: str | os.PathLike, adapter_name: str = "default", trainable: bool = False, **hub: Any
) -> None:
    """Load and activate an adapter that was saved here or by PEFT. After an error, the model is unchanged.

    Args:
        source: a directory, or the id of a repository on the Hub; `hub` takes its `revision`, `token` and so on.

    Raises:
        ValueError: it is not LoRA, uses an unsupported feature (the message names it), is damaged, or belongs to another base.
        OSError: it does not exist.
    """
    config = _read_config(_file(source, CONFIG, hub))
    file = _file(source, WEIGHTS, hub)
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name.removeprefix(PREFIX): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            base = json.loads((opened.metadata() or {}).get("base", "{}"))
            trained_on = {name: float(number) for name, (number, _) in base.items()}
    except (AttributeError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged or not a safetensors file ({error}).") from error
    # PEFT lists the usual names of heads: those that this model lacks are ignored.
    names = [name for name, _ in model.named_modules()]
    known = [end for end in config.modules_to_save or [] if any(name.endswith(end) for name in names)]
    config = replace(config, modules_to_save=known)
    with disable_adapter(model):  # others may train parameters of the base in full
        _check_tensors(model, config, tensors, file)
        for name, (number, length) in _fingerprint(targets_of(model, config), {}).items():
            tolerance = 0.03 * length + 1e-5  # half precision changes it by a thousandth
            if not abs(number - trained_on.get(name, number)) <= tolerance:
                raise ValueError(f"{file} was trained on other weights than this model's: load the base it belongs to.")
    add_adapter(model, config, adapter_name, limit_rank=False)
    with torch.no_grad():
        for name, parameter in tensors_of(model, adapter_name).items():
            parameter.copy_(tensors[name])
    set_adapter(model, adapter_name, trainable=trainable)


def _file(source: str | os.PathLike, name: str, hub: dict[str, Any]) -> str:
    source = os.fspath(source)
    if os.path.isdir(source):
        file = os.path.join(source, name)
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{source} has no {name}: it is not an adapter, or one in an old format that can run code.")
        return file
    if not is_hub_id(source):
        raise FileNotFoundError(f"{source} is neither a directory nor the id of a repository on the Hub.")
    return str(cached_file(source, name, **hub))


def _read_config(file: str) -> LoraConfig:
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        known = {item.name for item in fields(LoraConfig)}
        if content.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is {content.get('peft_type')!r}, only LORA is supported: load it with PEFT.")
        for name, value in content.items():
            # Initializations with a name, such as "pissa", may belong to a base that they have changed.
            is_other = name == "init_lora_weights" and value not in (True, False, "gaussian")
            if value and (is_other or name not in known | WITHOUT_EFFECT):
                raise ValueError(f"{name} is {value!r}, which is not supported: load it with PEFT.")
        given = {name: value for name, value in content.items() if name in known and value is not None}
        return LoraConfig(**{**PEFT_DEFAULTS, **given})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def _check_tensors(model: nn.Module, config: LoraConfig, tensors: dict[str, torch.Tensor], file: str) -> None:
    """Compare names and shapes before any matrix is allocated: a damaged rank could take all memory."""
    targets = targets_of(model, config)
    full = parameters_in_full(model, config, targets)
    expected = {peft_name(name, targets): tuple(parameter.shape) for name, parameter in full.items()}
    for name, layer in targets.items():
        expected[f"{name}.lora_A.weight"] = (config.rank(name), layer.in_features)
        expected[f"{name}.lora_B.weight"] = (layer.out_features, config.rank(name))
        if config.use_dora:
            expected[f"{name}.lora_magnitude_vector"] = (layer.out_features,)
    for name in tensors.keys() - expected.keys():  # PEFT may save embeddings that it has not trained
        if re.search(r"(embed\w*|wte|lm_head)(\.base_layer)?\.weight$", name):
            base = {peft_name(name, ()): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
            own = base.get(peft_name(name, ()))
            if own is None or own.shape != tensors[name].shape or not torch.equal(own.to(tensors[name]), tensors[name]):
                raise ValueError(f"{file} has its own embeddings, {name}, which is not supported: load it with PEFT.")
            del tensors[name]
    for what, names in (("lacks", expected.keys() - tensors.keys()), ("has the unknown", tensors.keys() - expected.keys())):
        if names:
            raise ValueError(f"{file} {what} {', '.join(sorted(names)[:3])}: it is damaged or belongs to another base.")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            shapes = f"{tuple(tensors[name].shape)}, expected {shape}"
            raise ValueError(f"{file}: {name} is {shapes}: it or {CONFIG} is damaged or belongs to another base.")


def _fingerprint(layers: dict[str, Any], replaced: dict[str, nn.Parameter]) -> dict[str, list[float]]:
    """Identify weights by the first row of each layer: its sum with alternating signs, and its norm. `replaced` are the
    parameters of the base in whose place others are trained in full."""
    result = {}
    for name, layer in layers.items():
        base, unmerged = getattr(layer, "base_layer", layer), getattr(layer, "unmerged_weight", None)
        if is_plain(base) and not base.weight.is_meta:
            weight = replaced.get(f"{name}.base_layer.weight", base.weight if unmerged is None else unmerged)
            row = weight.detach()[0].double().cpu()
            result[name] = [round(float(row[::2].sum() - row[1::2].sum()), 6), round(float(row.norm()), 6)]
    return result


def _target_modules(model: nn.Module, layers: dict[str, LoraLinear]) -> str | list[str]:
    """Select exactly these layers: by suffixes if possible, else by a regular expression for whole names."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    inside = tuple(f"{name}." for name in lora_layers(model))
    meant = {name for name, _ in model.named_modules() if not name.startswith(inside) and matches(name, ends)}
    return ends if meant == layers.keys() else "|".join(re.escape(name) for name in layers)
