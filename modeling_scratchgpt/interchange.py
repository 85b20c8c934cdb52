"""Conversion of configs and weights between ScratchGPT and transformers' GPT-2 and Qwen3.

Notable:
- Every config field that changes the result is converted, or refused by name. None is ignored.
- Qwen3's weights have the same names as ours. GPT-2's have others, are transposed (Conv1D multiplies from the right), and hold
  query, key and value in one matrix. `from_pretrained` of all ScratchGPT classes converts them while loading.
"""

import os
import re
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightRenaming, apply_renamings
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import load_state_dict
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The suffixes of the models with a head, and PEFT's name of each one's task. `AutoModel{suffix}` loads `ScratchGPT{suffix}`.
HEADS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
SPECIAL_IDS = ["bos_token_id", "eos_token_id", "pad_token_id"]
SHARED = ["vocab_size", "initializer_range", "use_cache", "tie_word_embeddings", *SPECIAL_IDS]
# GPT-2 has other names for these, but its config also accepts these.
SHARED += ["max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads"]

# By model type: the fields that define its architecture (dropout may differ, since it affects only training), the names of its
# other fields, and the values of its fields that ScratchGPT cannot change.
ARCHITECTURE: dict[str, dict[str, Any]] = {
    "gpt2": {
        "position_embedding_type": "learned", "norm_type": "layernorm", "qk_norm": False, "mlp_type": "plain",
        "attention_bias": True, "mlp_bias": True,
    },
    "qwen3": {
        "position_embedding_type": "rotary", "norm_type": "rmsnorm", "qk_norm": True, "mlp_type": "gated", "mlp_bias": False,
    },
}  # fmt: skip
NAMES: dict[str, dict[str, str]] = {  # ours to theirs
    "gpt2": {
        "intermediate_size": "n_inner", "hidden_act": "activation_function", "norm_eps": "layer_norm_epsilon",
        "attention_dropout": "attn_pdrop", "hidden_dropout": "resid_pdrop", "embedding_dropout": "embd_pdrop",
    },
    "qwen3": {
        "intermediate_size": "intermediate_size", "num_key_value_heads": "num_key_value_heads", "head_dim": "head_dim",
        "hidden_act": "hidden_act", "attention_bias": "attention_bias", "attention_dropout": "attention_dropout",
        "norm_eps": "rms_norm_eps", "rope_parameters": "rope_parameters",
    },
}  # fmt: skip
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
        "add_cross_attention": False, "is_causal": True,
    },
    "qwen3": {"use_sliding_window": False, "is_causal": True},
}  # fmt: skip

LORA_TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]

# Parts of weight names, from GPT-2's to ScratchGPT's. The matrices are transposed.
GPT2_PARTS = {
    "wte": "embed_tokens", "wpe": "embed_positions", "h": "layers", "ln_f": "norm",
    "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
}  # fmt: skip
GPT2_MATRICES = {
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "mlp.c_fc": ["mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
GPT2_MATRIX = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, GPT2_MATRICES))})\.(weight|bias)$")
GPT2_NAMES = {rf"(?<!\w){theirs}\.": f"{ours}." for theirs, ours in GPT2_PARTS.items()}  # as regular expressions
GPT2_NAMES |= {r"^transformer\.": "model.", r"^classifier\.": "score."}  # the latter of GPT2ForTokenClassification


def model_type_of(fields: dict[str, Any]) -> str:
    """The model type of a `config.json`, which GPT-2's of 2019 do not name."""
    is_gpt2 = "n_embd" in fields and not fields.keys() & {"afn", "dff"}  # which GPT-1 and CTRL have
    return fields.get("model_type") or ("gpt2" if is_gpt2 else "scratchgpt")


def apply_overrides(fields: dict[str, Any], overrides: dict[str, Any], config_class: Any) -> dict[str, Any]:
    """Move the fields of a config class from `overrides` to the content of a `config.json`.

    Special ids outside the vocabulary in the latter become None: many published models have those of another vocabulary.
    """
    own_ids = set(SPECIAL_IDS) - overrides.keys()
    names = {*config_class.__annotations__, *config_class.attribute_map} & overrides.keys()
    names -= set() if config_class.model_type == "scratchgpt" else set(SPECIAL_IDS)  # checked after the conversion
    fields = fields | {name: overrides.pop(name) for name in names}
    vocab_size, ignored = fields.get("vocab_size", config_class.vocab_size), []
    for name in own_ids if isinstance(vocab_size, int) else ():
        value = fields.get(name, getattr(config_class, name))
        ids = value if isinstance(value, list) else [value]
        kept = [index for index in ids if not isinstance(index, int) or 0 <= index < vocab_size]
        if len(kept) < len(ids):
            ignored.append(f"{name} {value}")
            fields[name] = kept if kept and isinstance(value, list) else None
    if ignored:
        logger.warning_once(f"Ignored outside the vocabulary of {vocab_size} tokens: {', '.join(sorted(ignored))}.")
    return fields


def as_scratchgpt(fields: dict[str, Any], overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Convert the content of a `config.json` of ScratchGPT, GPT-2 or Qwen3 to ScratchGPT's, after `apply_overrides`.

    Raises:
        ValueError: another model type, or a feature that ScratchGPT does not have.
    """
    model_type = model_type_of(fields)
    if model_type == "scratchgpt":
        return fields
    if model_type not in ARCHITECTURE:
        known = ", ".join(["scratchgpt", *ARCHITECTURE])
        raise ValueError(f"model_type {model_type!r} is not supported: ScratchGPT loads {known}.")
    config_class: Any = CONFIG_MAPPING[model_type]
    fields = apply_overrides(fields, {} if overrides is None else overrides, config_class)
    source: Any = config_class.from_dict(fields)  # fills in and renames the fields of older files
    for name, needed in UNSUPPORTED[model_type].items():
        if (value := getattr(source, name, needed)) != needed:
            raise ValueError(f"{name} is {value} in this {model_type} config: ScratchGPT supports only {needed}.")
    layer_types = getattr(source, "layer_types", None) or ["full_attention"]
    if set(layer_types) != {"full_attention"}:
        raise ValueError(f"layer_types is {layer_types} in this {model_type} config: ScratchGPT supports only full_attention.")
    result = {name: getattr(source, their_name) for name, their_name in NAMES[model_type].items()}
    result |= {name: getattr(source, name) for name in [*SHARED, "dtype"]} | ARCHITECTURE[model_type]
    if result["hidden_act"] == "gelu_new":
        result["hidden_act"] = "gelu_pytorch_tanh"  # the same function, in one operation
    # Fields of all configs, such as labels and quantization, except those that only select the outputs of a call.
    common = PreTrainedConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    common = common - {"return_dict", "output_attentions", "output_hidden_states"} | {"num_labels", "quantization_config"}
    return {**{name: value for name, value in fields.items() if name in common and name not in result}, **result}


def as_transformers(config: PreTrainedConfig, model_type: str | None = None) -> PreTrainedConfig:
    """Convert a `ScratchGPTConfig` to the equivalent `GPT2Config` or `Qwen3Config`; by default, whichever has its positions.

    Raises:
        ValueError: there is none; the message names the field.
    """
    model_type = model_type or ("qwen3" if config.position_embedding_type == "rotary" else "gpt2")
    required = {**ARCHITECTURE[model_type]}
    if model_type == "gpt2":
        del required["attention_bias"], required["mlp_bias"]  # a missing bias equals a bias of zero
        required["num_key_value_heads"] = config.num_attention_heads
        required["head_dim"] = config.hidden_size // config.num_attention_heads
    for name, needed in required.items():
        if getattr(config, name) != needed:
            problem = f"{name} is {getattr(config, name)!r}, but a {model_type} model has only {needed!r}"
            positions = "models with rotary positions can become a qwen3, those with learned positions a gpt2"
            raise ValueError(f"{problem} ({positions}).")
    fields = {their_name: getattr(config, name) for name, their_name in NAMES[model_type].items()}
    fields |= {name: getattr(config, name) for name in SHARED}
    if model_type == "gpt2" and config.hidden_act == "gelu_pytorch_tanh":
        fields["activation_function"] = "gelu_new"
    return CONFIG_MAPPING[model_type](**fields, id2label=config.id2label, label2id=config.label2id)


@dataclass
class MatrixPart:
    """One of the equal parts of a matrix or bias of GPT-2, as `nn.Linear` stores it.

    transformers indexes it like a slice of a safetensors file, in several threads: it is read and transposed there.
    """

    tensor: torch.Tensor
    file: str  # empty: the tensor is in memory
    name: str
    index: int
    count: int

    def _view(self) -> torch.Tensor:
        tensor = self.tensor
        if self.file:  # mapped into memory anew, so that what it occupies is released after the copy
            with safe_open(self.file, "pt") as opened:
                tensor = opened.get_tensor(self.name)
        return tensor.t().chunk(self.count)[self.index]  # `t` leaves a bias as it is

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._view()[index].contiguous()

    def get_shape(self) -> list[int]:
        return [*self._view().shape]


def _split_gpt2(state_dict: dict | None, files: list[str] | None, load_config: Any) -> tuple[dict[str, Any], bool]:
    """Split the matrices with GPT-2's names in a state dict or in files; also return whether there are any."""
    renamings = [entry for entry in load_config.weight_mapping or [] if isinstance(entry, WeightRenaming)]
    options = {"weights_only": load_config.weights_only, "disable_mmap": load_config.disable_mmap}
    sources = {"": state_dict} if state_dict is not None else {file: load_state_dict(file, **options) for file in files or []}
    result: dict[str, Any] = {}
    for file, tensors in sources.items():
        is_mapped = file.endswith(".safetensors") and not load_config.disable_mmap
        for name, tensor in tensors.items():
            if not (match := GPT2_MATRIX.search(apply_renamings(name, renamings))):
                result[name] = tensor
                continue
            start, parts = match.string[: match.start()], GPT2_MATRICES[match[1]]
            for index, part in enumerate(parts):
                source = file if is_mapped and tensor.ndim == 2 else ""
                result[f"{start}{part}.{match[2]}"] = MatrixPart(tensor, source, name, index, len(parts))
    return result, any(isinstance(tensor, MatrixPart) for tensor in result.values())


def gpt2_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert a state dict of `ScratchGPTForCausalLM` to one of `GPT2LMHeadModel`. Missing biases become zeros."""
    result = {}
    for name, tensor in state.items():
        if "_proj." not in name:
            for theirs, ours in GPT2_PARTS.items():
                name = re.sub(rf"(?<!\w){ours}\.", f"{theirs}.", name)
            result[name.replace("model.", "transformer.", 1)] = tensor
    for layer in range(sum(name.endswith("mlp.up_proj.weight") for name in state)):
        for theirs, parts in GPT2_MATRICES.items():
            weight = torch.cat([state[f"model.layers.{layer}.{part}.weight"] for part in parts])
            biases = [state.get(f"model.layers.{layer}.{part}.bias") for part in parts]
            bias = weight.new_zeros(len(weight)) if biases[0] is None else torch.cat(biases)
            block = f"transformer.h.{layer}.{theirs}"
            result |= {f"{block}.weight": weight.T.contiguous(), f"{block}.bias": bias}
    return result


class PeftDefaults:
    """The attribute `peft_config` of a model without adapters: reading it registers default target modules with PEFT.

    PEFT looks up the defaults of a model type in its own tables, which no public function extends. Importing PEFT to fill them
    would slow down each import of this package. But PEFT checks for this attribute before it looks them up, and sets it later.
    """

    def __get__(self, model: PreTrainedModel | None, model_class: type) -> None:
        if constants := sys.modules.get("peft.utils.constants"):
            constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault("scratchgpt", LORA_TARGETS)
            for name, table in vars(constants).items():
                if name.endswith("_MODULES_MAPPING") and "qwen3" in table:  # whose modules have the same names
                    table.setdefault("scratchgpt", table["qwen3"])
        raise AttributeError(f"{model_class.__name__} has no adapters of PEFT")


class InterchangeModel(PreTrainedModel):
    """A model that also loads GPT-2's weights, that is saved with its code, and whose layers PEFT knows."""

    peft_config = PeftDefaults()
    _keys_to_ignore_on_load_unexpected = [r"attn\.(masked_)?bias$"]  # the causal mask in GPT-2's older files

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs) -> tuple:
        """Also convert GPT-2's weights. The conversion is not kept: `save_pretrained` writes this model's own names."""
        split, is_split = _split_gpt2(state_dict, checkpoint_files, load_config)
        if is_split and load_config.hf_quantizer and load_config.hf_quantizer.pre_quantized:
            raise ValueError("the weights of this GPT-2 are quantized: load its original weights, and quantize those.")
        if is_split and is_deepspeed_zero3_enabled():  # it copies tensors by itself
            split = {name: value[...] for name, value in split.items()}
        if is_split or load_config.disable_mmap:  # else the files are only mapped, and transformers maps them again
            state_dict = split
        gpt2 = [WeightRenaming(theirs, ours) for theirs, ours in GPT2_NAMES.items()]
        load_config = replace(load_config, weight_mapping=[*(load_config.weight_mapping or []), *gpt2])
        result = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        model._weight_conversions = [conversion for conversion in model._weight_conversions if conversion not in gpt2]
        return result

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Also save the code (through `_auto_class`) and the `auto_map` of all Auto classes, but not `skip_logits`.

        Raises:
            ValueError: the model has adapters, which are saved separately.
        """
        if not self._hf_peft_config_loaded and any(".lora_" in name for name, _ in self.named_parameters()):
            raise ValueError("this model has adapters: save them with `save_adapter`, or call `merge_and_unload` first.")
        self.config.auto_map = {
            "AutoConfig": "configuration_scratchgpt.ScratchGPTConfig",
            "AutoModel": "modeling_scratchgpt.ScratchGPTModel",
            **{f"AutoModel{head}": f"modeling_scratchgpt.ScratchGPT{head}" for head in HEADS},
        }
        # transformers saves the name of the class and the file that defines it. A class that FSDP2 or a user has derived is in
        # a file that does not load by itself, so the nearest base class that defines `_auto_class` is saved instead.
        derived = type(self)
        named = next(base for base in derived.__mro__ if "_auto_class" in vars(base) and base.__module__ != "__main__")
        self.__class__ = type(named.__name__, (derived,), {"__module__": named.__module__})
        skip_logits, self.config.skip_logits = self.config.skip_logits, False  # of one training run, not of the model
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__, self.config.skip_logits = derived, skip_logits
