"""Pretrained models: loading, and attaching LoRA."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from modeling_scratchgpt import ScratchGPTConfig
from modeling_scratchgpt.hub import is_hub_id
from modeling_scratchgpt.lora import LoraConfig, add_adapter
from modeling_scratchgpt.tokenization_scratchgpt import panics_as_errors
from training.cli import option
from training.engine.run_folder import METRICS
from training.errors import UserError, explain_errors, quiet

KINDS = {AutoModelForCausalLM: "causal language model", AutoModelForSequenceClassification: "text classifier"}
REPORT: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # to name what does not fit


@dataclass
class LoraArguments:
    """Arguments of LoRA, under PEFT's names."""

    lora_r: int = option(0, "rank of LoRA adapters, which are trained instead of the model; 0: train the model", minimum=0)
    lora_alpha: float = option(32.0, "LoRA scaling: lora_alpha / lora_r")
    lora_dropout: float = option(0.0, "dropout of the inputs of the adapters")
    lora_target_modules: list[str] = option(["all-linear"], "layers to adapt: the last parts of their names, or all-linear")
    use_rslora: bool = option(False, "rank-stabilized LoRA: scale by lora_alpha / sqrt(lora_r)")
    use_dora: bool = option(False, "DoRA: also train the magnitude of each row of the matrices")


@dataclass
class TuningArguments(LoraArguments):
    """Arguments of fine-tuning."""

    base_model: str = option("outputs/pretrain", "directory or Hub id of the pretrained model: a ScratchGPT, GPT-2 or Qwen3")
    train_last_n_layers: int = option(
        -1, "train only the last N blocks, the final norm and the head; 0: only the head; -1: everything", minimum=-1
    )
    dropout: float = option(0.1, "dropout of hidden states, embeddings and attention", minimum=0, below=1)


def check_tuning(arguments: TuningArguments) -> None:
    """Validate the LoRA arguments, alone and with `train_last_n_layers`."""
    if lora_config(arguments) and arguments.train_last_n_layers >= 0:
        raise UserError("--train_last_n_layers and --lora_r each choose what is trained: pass one of them.")


def dropout_fields(dropout: float) -> dict[str, Any]:
    """The dropout fields of a model's config."""
    return dict.fromkeys(("hidden_dropout", "attention_dropout", "embedding_dropout"), dropout)


def lora_config(arguments: LoraArguments, modules_to_save: list[str] | None = None) -> LoraConfig | None:
    """The LoRA config of the arguments; None without LoRA.

    Raises:
        UserError: an invalid value or combination.
    """
    if not arguments.lora_r:
        for name, default in asdict(LoraArguments()).items():
            if getattr(arguments, name) != default:
                raise UserError(f"--{name} {getattr(arguments, name)} is an option of LoRA: pass its rank, --lora_r, too.")
        return None
    targets: Any = arguments.lora_target_modules
    if "all-linear" in targets and len(targets) > 1:
        raise UserError(f"--lora_target_modules {' '.join(targets)}: pass all-linear alone, or names of layers.")
    try:
        same = {name: getattr(arguments, name) for name in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora")}
        modules = targets[0] if targets == ["all-linear"] else targets
        return LoraConfig(r=arguments.lora_r, target_modules=modules, modules_to_save=modules_to_save or [], **same)
    except ValueError as error:
        raise UserError(f"LoRA: {error}") from error


def load_pretrained(
    model_class: Any,
    name: str,
    lora: LoraConfig | None,
    new_parameters: frozenset[str] = frozenset(),
    num_tokens: int = 0,
    **fields: Any,
) -> Any:
    """Load a model to fine-tune from a directory or the Hub (a ScratchGPT, GPT-2 or Qwen3), and attach LoRA.

    Args:
        new_parameters: names of parameters that may be missing or of another shape: those of a new head.
        num_tokens: a smaller vocabulary is resized to this size.
        fields: values for fields of the model's config.

    Raises:
        UserError: the model cannot be loaded, lacks weights, or cannot have that adapter.
    """
    with explain_errors(f"--base_model {name} cannot be used"), quiet():  # the loading report is checked here
        model, report = model_class.from_pretrained(name, dtype=torch.float32, **REPORT, **fields)
        if missing := sorted(set(report["missing_keys"]) - new_parameters):
            raise ValueError(f"it lacks {', '.join(missing[:3])}")
        check_sizes(report, new_parameters)
        if num_tokens > model.config.vocab_size:
            model.resize_token_embeddings(num_tokens)
        if lora:
            add_adapter(model, lora)
    return model


def check_sizes(report: dict[str, Any], new_parameters: frozenset[str] = frozenset()) -> None:
    """Raise `ValueError` if the loading report names parameters of another size than the config's."""
    if other := sorted({key for key, *_ in report["mismatched_keys"]} - new_parameters):
        raise ValueError(f"its weights do not have the sizes in its config: {', '.join(other[:3])}")


def freeze(model: Any, num_layers: int, *heads: nn.Module) -> None:
    """Freeze everything but the heads, the last `num_layers` blocks, and, if that is not 0, the final norm."""
    model.requires_grad_(False)
    trained = [*heads, model.model.norm, *model.model.layers[-num_layers:]] if num_layers else heads
    for module in trained:
        module.requires_grad_(True)


def load_config_and_tokenizer(
    name: str, context_length: int, train_last_n_layers: int = -1
) -> tuple[ScratchGPTConfig, PreTrainedTokenizerBase]:
    """Load and check the config and the tokenizer of a base model, before its weights are read.

    Raises:
        UserError: a missing or unsupported model; too few positions or blocks; no tokenizer, or one of too many tokens.
    """
    if Path(name, "adapter_config.json").is_file():
        raise UserError(f"--base_model {name} contains an adapter: merge it into its model, and pass the directory of that.")
    _check_place(name)
    remedy = "" if Path(name).is_dir() else ": check the name and the connection, or pass a directory"
    with explain_errors(f"--base_model {name} cannot be loaded", remedy=remedy):
        config = ScratchGPTConfig.from_pretrained(name)
    if (positions := config.max_position_embeddings) < context_length:
        raise UserError(f"--context_length {context_length} is longer than the {positions} positions of {name}: lower it.")
    if train_last_n_layers > (blocks := config.num_hidden_layers):
        raise UserError(f"--train_last_n_layers {train_last_n_layers} is more than the {blocks} blocks of the model.")
    tokenizer = load_tokenizer(name, trust_remote_code=False)
    if (needed := max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)) > config.vocab_size:
        raise UserError(f"--base_model {name} has a tokenizer of {needed:,} tokens, but embeddings for {config.vocab_size:,}.")
    return config, tokenizer


def _check_place(name: str) -> None:
    """Refuse a name that is neither a model directory nor of the form of a Hub id."""
    folder = Path(name)
    is_default = name == TuningArguments.base_model  # which has the form of a Hub id
    if not name or (not folder.is_dir() and (is_default or not is_hub_id(name))):
        missing = f"{name} is not a directory" if name else "no model was given"
        train = ", or train it first, with training/pretrain.py" if is_default else ""
        raise UserError(f"{missing}: pass the directory or the Hub id of a model{train}.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / METRICS).is_file():
            raise UserError(f"{name} contains an unfinished run: finish it, with --resume, or pass one of its checkpoints.")
        raise UserError(f"{name} has no config.json: it is not a model directory.")


def load_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        UserError: none, or one that is not a fast tokenizer.
    """
    with explain_errors(f"{name}: its tokenizer cannot be loaded"), panics_as_errors():
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    # In a directory without a vocabulary, transformers may build an empty tokenizer.
    if not tokenizer.is_fast or len(tokenizer) - len(tokenizer.added_tokens_decoder) <= 0:
        raise UserError(f"{name} has no tokenizer.json: save the tokenizer of the model there, with `save_pretrained`.")
    return tokenizer


def ensure_padding(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give a tokenizer without a padding token another special one to pad with: the attention mask marks what is padding.

    Raises:
        UserError: it has no special token.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise UserError(f"{name}: its tokenizer has no special token to pad with: add one, and save it again.")


def load_model_and_tokenizer(
    name: str, trust_remote_code: bool, device: torch.device, auto_class: Any = AutoModelForCausalLM
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model onto the device for inference: in float32 on a CPU, elsewhere in the dtype it was saved in.

    Code that comes with the model never runs for a ScratchGPT, whose code is in this package.

    Raises:
        UserError: a missing model, one of another kind, with untrusted code, without all weights, or without a fast tokenizer.
    """
    _check_place(name)
    problem = "its config.json cannot be read" if os.path.isdir(name) else "no such directory, and not found on the Hub"
    with explain_errors(f"{name}: {problem}"):
        config, _ = PreTrainedConfig.get_config_dict(name)
        trusted = trust_remote_code and config.get("model_type") != "scratchgpt"
        needs_trust = "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING and not trusted
    if needs_trust:
        raise UserError(f"{name} comes with code of its own: read it, and pass --trust_remote_code if you trust it.")
    tokenizer = load_tokenizer(name, trusted)
    kind, dtype = KINDS[auto_class], torch.float32 if device.type == "cpu" else "auto"
    with explain_errors(f"{name} cannot be loaded as a {kind}"), quiet():
        options = {"dtype": dtype, "trust_remote_code": trusted}
        model, report = auto_class.from_pretrained(name, **REPORT, **options)
        check_sizes(report)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{name} is not a {kind}, or incomplete (it lacks {', '.join(missing[:3])}): pass another model.")
    return model.to(device).eval(), tokenizer
