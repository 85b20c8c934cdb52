"""Models that are there already: loaded, adapted with LoRA, and put together again at the end of a run."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling_scratchgpt import ScratchGPTConfig
from modeling_scratchgpt.lora import LoraConfig, add_adapter, lora_layers, merge_and_unload, save_adapter
from modeling_scratchgpt.tokenization_scratchgpt import panics_as_errors
from training.cli import option
from training.data.sources import is_hub_id
from training.engine.checkpoints import METRICS
from training.errors import UserError, one_line, quiet

KINDS = {AutoModelForCausalLM: "causal language model", AutoModelForSequenceClassification: "text classifier"}
ADAPTER = "adapter"  # folder inside that of the merged model


@dataclass
class LoraArguments:
    """What is trained of a model that is there already."""

    lora_r: int = option(0, "Rank of LoRA adapters, which are trained instead of the model; 0 trains the whole model.")
    lora_alpha: float = option(32.0, "What the adapters add is scaled by lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Share of their inputs that the adapters do not see.")
    lora_target_modules: list[str] = option(["all-linear"], "Last parts of the names of the layers to adapt.")
    use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(lora_r).")
    use_dora: bool = option(False, "Also train the length of each row of the matrices.")


@dataclass
class TuningArguments(LoraArguments):
    """What the recipes share that teach a language model something new."""

    base_model: str = option("outputs/pretrain", "Folder or Hub id of the model to start from: ours, GPT-2's or Qwen3's.")
    train_last_n_layers: int = option(
        -1, "Train only the last so many blocks, the final norm and the head; 0: the head alone; -1: everything."
    )
    dropout: float = option(0.1, "Share of the hidden states and of the attention that is left out in training.")


def check_tuning(arguments: TuningArguments) -> None:
    """Refuse nonsense before any long work."""
    if not 0 <= arguments.dropout < 1:
        raise UserError(f"--dropout must be at least 0 and below 1, got {arguments.dropout}.")
    if arguments.train_last_n_layers < -1:
        raise UserError(
            f"--train_last_n_layers must be -1 (everything), 0 (the head) or more, got {arguments.train_last_n_layers}."
        )
    if lora_config(arguments) and arguments.train_last_n_layers >= 0:
        raise UserError("--train_last_n_layers and --lora_r are two ways to train less than everything: give one of them.")


def dropout_fields(dropout: float) -> dict[str, Any]:
    """The fields of a model's config that say how much is left out in training."""
    return dict.fromkeys(("hidden_dropout", "attention_dropout", "embedding_dropout"), dropout)


def lora_config(arguments: LoraArguments, modules_to_save: list[str] | None = None) -> LoraConfig | None:
    """The adapter that is asked for, if one is.

    Raises:
        UserError: its settings cannot be.
    """
    if not arguments.lora_r:
        for name, default in asdict(LoraArguments()).items():
            if getattr(arguments, name) != default:
                raise UserError(f"--{name} {getattr(arguments, name)} is for LoRA: give its rank by --lora_r.")
        return None
    targets: Any = arguments.lora_target_modules
    if "all-linear" in targets and len(targets) > 1:
        raise UserError(f"--lora_target_modules {' '.join(targets)}: give all-linear alone, or names of layers.")
    try:
        return LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=targets[0] if targets == ["all-linear"] else targets,
            use_rslora=arguments.use_rslora,
            use_dora=arguments.use_dora,
            modules_to_save=modules_to_save or [],
        )
    except ValueError as error:
        raise UserError(f"--lora_r and the like: {error}") from error


def load_pretrained(
    model_class: Any,
    name: str,
    config: LoraConfig | None,
    fresh: frozenset[str] = frozenset(),
    num_tokens: int = 0,
    **fields: Any,
) -> Any:
    """A model of ours to train on, from a folder or the Hub, be it ours, GPT-2's or Qwen3's; with an adapter if so asked.

    Args:
        fresh: parameters that may be missing, or of another shape: those of a new head.
        num_tokens: the vocabulary grows to so many, if it is smaller.
        fields: of the model's config, to be set anew.

    Raises:
        UserError: it cannot be loaded, lacks weights, or cannot have that adapter.
    """
    try:
        with quiet():  # what it would report is looked at here
            model, report = model_class.from_pretrained(
                name, output_loading_info=True, dtype=torch.float32, ignore_mismatched_sizes=bool(fresh), **fields
            )
        if missing := sorted(set(report["missing_keys"]) - fresh):
            raise ValueError(f"it lacks {', '.join(missing[:3])}")
        if other := sorted({key for key, *_ in report["mismatched_keys"]} - fresh):
            raise ValueError(f"it has other sizes than its config says: {', '.join(other[:3])}")
        if num_tokens > model.config.vocab_size:
            with quiet():
                model.resize_token_embeddings(num_tokens)
        if config:
            add_adapter(model, config)
    except Exception as error:  # transformers, safetensors, torch and the Hub each have their own
        raise UserError(f"--base_model {name} cannot be used ({one_line(error)}).") from error
    return model


def freeze(model: Any, train_last_n_layers: int, *heads: nn.Module) -> None:
    """Freeze a model but for its heads, its last so many blocks, and the final norm if there is one of these."""
    blocks = model.model.layers
    model.requires_grad_(False)
    trained = [*heads, *([model.model.norm, *blocks[len(blocks) - train_last_n_layers :]] if train_last_n_layers else [])]
    for module in trained:
        module.requires_grad_(True)


def load_config_and_tokenizer(
    name: str, context_length: int, train_last_n_layers: int = -1
) -> tuple[ScratchGPTConfig, PreTrainedTokenizerBase]:
    """What is to be known of a model to train on before its weights are read.

    Raises:
        UserError: there is none, it is of no model that can be ours, its positions are too few, or its blocks; its tokenizer
            cannot be loaded, or is not the model's.
    """
    if Path(name, "adapter_config.json").is_file():
        raise UserError(f"--base_model {name} holds an adapter: merge it into its model, and give the folder of that.")
    _check_place(name)
    try:
        config = ScratchGPTConfig.from_pretrained(name)
    except Exception as error:  # transformers and the Hub each have their own
        raise UserError(f"--base_model {name} cannot be loaded ({one_line(error)}).") from error
    if config.max_position_embeddings < context_length:
        positions = config.max_position_embeddings
        raise UserError(f"--context_length {context_length} is longer than the {positions} positions of {name}: shorten it.")
    if train_last_n_layers > (blocks := config.num_hidden_layers):
        raise UserError(f"--train_last_n_layers {train_last_n_layers} is more than the {blocks} blocks of the model.")
    tokenizer = load_tokenizer(name, trust_remote_code=False)
    if (needed := max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)) > config.vocab_size:
        raise UserError(f"--base_model {name} has {needed:,} tokens, and rows for {config.vocab_size:,}.")
    return config, tokenizer


def save_trained(
    folder: Path, model: Any, weights: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, first: Callable[[], Any]
) -> None:
    """The model and its tokenizer as a folder that transformers loads; adapters are merged, and stand in one inside it too.

    Args:
        model, weights: as trained; the model may be in parts, its weights are whole.
        first: makes the model as it was before the first step.
    """
    if lora_layers(model):
        whole = first()
        whole.load_state_dict(weights)
        save_adapter(whole, folder / ADAPTER)
        tokenizer.save_pretrained(folder / ADAPTER)
        merge_and_unload(whole)
        whole.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def check_model(name: str, trust_remote_code: bool) -> bool:
    """Whether the code that comes with the model may run: never where this package has the model itself.

    Raises:
        UserError: there is no such model, or its code was not trusted.
    """
    folder = Path(name)
    _check_place(name)
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        where = "its config.json cannot be read" if folder.is_dir() else "no such folder here, and the Hub did not give it"
        raise UserError(f"{name}: {where} ({one_line(error)}).") from error
    if config.get("model_type") == "scratchgpt":
        return False
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
        raise UserError(f"{name} brings code of its own: read it, and pass --trust_remote_code if you trust it.")
    return trust_remote_code


def _check_place(name: str) -> None:
    """Refuse what is neither a model's folder nor shaped like a Hub id."""
    folder = Path(name)
    is_default = name == TuningArguments.base_model  # which is shaped like an id
    if not name or (not folder.is_dir() and (is_default or not is_hub_id(name))):
        missing = f"{name} is no folder" if name else "no model is named"
        train = ", or train it first, by training/pretrain.py" if is_default else ""
        raise UserError(f"{missing}: give the folder or the Hub id of a model{train}.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / METRICS).is_file():
            raise UserError(f"{name} holds a run that did not finish: go on with it first, by --resume.")
        raise UserError(f"{name} holds no config.json: it is no model folder.")


def load_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The model's own tokenizer.

    Raises:
        UserError: there is none, or none that `tokenizers` runs.
    """
    try:
        with panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers, tokenizers and the Hub each have their own
        raise UserError(f"{name}: its tokenizer cannot be loaded ({one_line(error)}).") from error
    # Where a folder holds no vocabulary, transformers may make a tokenizer without one.
    if not tokenizer.is_fast or len(tokenizer) - len(tokenizer.added_tokens_decoder) <= 0:
        raise UserError(f"{name} holds no tokenizer.json: save the model's tokenizer beside it, with `save_pretrained`.")
    return tokenizer


def load_model(
    name: str, trust_remote_code: bool, device: torch.device, auto_class: Any = AutoModelForCausalLM, **fields: Any
) -> PreTrainedModel:
    """The model on the device, in float32 on a CPU and in the precision it was saved in elsewhere.

    Raises:
        UserError: it is not there, is of another kind, brings code that is not trusted, or lacks weights.
    """
    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    kind = KINDS[auto_class]
    try:
        with quiet():
            loaded: Any = auto_class.from_pretrained(
                name, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **fields
            )
    except Exception as error:  # transformers, safetensors, torch and the Hub each have their own
        raise UserError(f"{name} cannot be loaded as a {kind} ({one_line(error)}).") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{name} is no {kind}, or not a whole one (it lacks {', '.join(missing[:3])}): give the folder of one.")
    return model.to(device).eval()
