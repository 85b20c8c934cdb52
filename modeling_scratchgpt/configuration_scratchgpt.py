"""Configuration of a ScratchGPT, validated on construction.

Notable:
- Fields have transformers' standard names; GPT-2's (`n_embd`, `n_layer`, ...) are accepted as aliases.
- Four fields choose the architecture. The defaults are GPT-2; the other column is Qwen3 (dense):

      position_embedding_type   "learned"    | "rotary"
      norm_type                 "layernorm"  | "rmsnorm"
      qk_norm                   False        | True
      mlp_type                  "plain"      | "gated"
"""

import json
from dataclasses import asdict, field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config, PreTrainedConfig, Qwen3Config
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from .interchange import NAMES, SPECIAL_IDS, apply_overrides, as_scratchgpt, logger

# GPT-2's published sizes (Radford et al., 2019), by the number of parameters with tied embeddings.
PRESETS = {
    "124M": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "355M": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "774M": {"hidden_size": 1280, "num_hidden_layers": 36, "num_attention_heads": 20},
    "1.5B": {"hidden_size": 1600, "num_hidden_layers": 48, "num_attention_heads": 25},
}

SIZES = ["vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers"]
SIZES += ["num_attention_heads", "num_key_value_heads", "head_dim"]
MAX_LAYERS = 10_000  # sanity limit: building the model of a corrupt config would take days
CHOICES = {
    "position_embedding_type": ("learned", "rotary"),
    "norm_type": ("layernorm", "rmsnorm"),
    "mlp_type": ("plain", "gated"),
    "classifier_pooling": ("last", "mean"),
}


class _PresentFields(dict):
    """The dataclass's fields, and of one config those that it has: with learned positions there is no `rope_parameters`."""

    def __get__(self, config: Any, owner: type | None = None) -> dict[str, Any]:
        return self if config is None else {name: field for name, field in self.items() if hasattr(config, name)}


@strict
class ScratchGPTConfig(PreTrainedConfig):
    """Configuration of a ScratchGPT. The defaults make GPT-2 124M.

    Args:
        vocab_size (`int`): number of token ids.
        max_position_embeddings (`int`): longest sequence, in tokens.
        hidden_size (`int`): width of the residual stream.
        intermediate_size (`int`, *optional*): width inside the MLP. Default: 4 x `hidden_size`; gated: 8/3 x, a multiple of 64.
        num_hidden_layers (`int`): number of blocks.
        num_attention_heads (`int`): number of query heads.
        num_key_value_heads (`int`, *optional*): number of key and value heads, a divisor of `num_attention_heads`
            (grouped-query attention, Ainslie et al., 2023). Default: the number of query heads.
        head_dim (`int`, *optional*): width of one head. Default: `hidden_size / num_attention_heads`.
        position_embedding_type (`str`): `"learned"`, or `"rotary"` (Su et al., 2021).
        norm_type (`str`): `"layernorm"` or `"rmsnorm"` (Zhang and Sennrich, 2019), before attention, MLP and head.
        qk_norm (`bool`): RMS-normalise each query and key head, as Qwen3 does.
        mlp_type (`str`): `"plain"` (up, activation, down) or `"gated"` (Shazeer, 2020).
        hidden_act (`str`, *optional*): a name in transformers' `ACT2FN`. Default: `gelu_pytorch_tanh`; in a gated MLP `silu`.
        attention_bias, mlp_bias (`bool`): whether the projections of attention and MLP have biases.
        attention_dropout, hidden_dropout, embedding_dropout (`float`): probabilities in [0, 1). The default is 0, since
            training for about one epoch does not overfit; GPT-2 was published with 0.1.
        norm_eps (`float`): added to the variance in each norm.
        initializer_range (`float`): standard deviation of the initial weights.
        tie_word_embeddings (`bool`): whether the head shares its weight with the token embedding.
        rope_parameters (`dict`, *optional*): transformers' settings of rotary embeddings and their scaling; else not used.
        classifier_pooling (`str`): hidden state that a text classifier reads: that of the `"last"` real token, or the `"mean"`.
        skip_logits (`bool`): in training mode, return only the loss of a language model, in less memory (see its `forward`).
        use_cache (`bool`): whether a forward pass returns keys and values for the next one.
        bos_token_id, eos_token_id, pad_token_id (`int`, *optional*): ids of the tokenizer's special tokens.

    Raises:
        ValueError: an invalid value or combination of values; the message says what is allowed.
    """

    model_type = "scratchgpt"
    _auto_class = "AutoConfig"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {theirs: ours for ours, theirs in (GPT2Config.attribute_map | NAMES["gpt2"]).items()}

    # The modules have the names of Qwen3's. Its tensor parallelism splits attention by heads, and the MLP by its inner width.
    base_model_tp_plan = Qwen3Config.base_model_tp_plan
    base_model_pp_plan = Qwen3Config.base_model_pp_plan

    vocab_size: int = 50257
    max_position_embeddings: int = 1024
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    position_embedding_type: str = "learned"
    norm_type: str = "layernorm"
    qk_norm: bool = False
    mlp_type: str = "plain"
    hidden_act: str | None = None
    attention_bias: bool = True
    mlp_bias: bool = True
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    # A factory, so that the class has no such attribute.
    rope_parameters: RopeParameters | dict | None = field(default_factory=lambda: None)
    classifier_pooling: str = "last"
    skip_logits: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        # GPT-2's names first, since the defaults below depend on their values.
        for old_name in self.attribute_map.keys() & kwargs.keys():
            setattr(self, self.attribute_map[old_name], kwargs.pop(old_name))
        self._validate_sizes()
        if self.intermediate_size is None:
            # A gated MLP has three matrices: with 8/3 of the width it has as many parameters as a plain one (Shazeer, 2020).
            gated = 64 * -(-self.hidden_size // 24)
            self.intermediate_size = gated if self.mlp_type == "gated" else 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                heads = f"num_attention_heads ({self.num_attention_heads}): change one of them, or pass head_dim."
                raise ValueError(f"hidden_size ({self.hidden_size}) is not a multiple of {heads}")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.hidden_act is None:
            self.hidden_act = "gelu_pytorch_tanh" if self.mlp_type == "plain" else "silu"
        super().__post_init__(**kwargs)
        if self.position_embedding_type == "learned":
            del self.rope_parameters  # transformers recognises a rotary model by this attribute
        absent = {"gate_proj": self.mlp_type == "plain", "q_norm": not self.qk_norm, "k_norm": not self.qk_norm}
        plan = self.base_model_tp_plan.items()
        self.base_model_tp_plan = {name: how for name, how in plan if not absent.get(name.rpartition(".")[2])}
        self.check()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and asdict(self) == asdict(other)

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Also convert the configs of GPT-2 and Qwen3, after the overrides of their fields."""
        fields, unused = super().get_config_dict(*args, **kwargs)
        return as_scratchgpt(fields, unused), unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Also check overrides, and ignore special ids outside the vocabulary."""
        return super().from_dict(apply_overrides(config_dict, kwargs, cls), **kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "ScratchGPTConfig":
        """Build the config of a GPT-2 size (`"124M"`, `"355M"`, `"774M"`, `"1.5B"`); `overrides` replace fields."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}.")
        return cls(**(PRESETS[name] | overrides))

    def _validate_sizes(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value}.")
        if self.num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"num_hidden_layers must be at most {MAX_LAYERS:,}, got {self.num_hidden_layers}.")

    def _validate_rotary(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"rotary positions rotate pairs of dimensions: head_dim must be even, got {self.head_dim}.")
        rope_type = self.rope_parameters.get("rope_type", "default")
        if rope_type != "default" and rope_type not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
            raise ValueError(f"rope_parameters: rope_type {rope_type!r} is unknown, choose one of {known}.")
        for name in ("rope_theta", "factor"):
            value = self.rope_parameters.get(name, 1.0)
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"rope_parameters: {name} must be a positive number, got {value!r}.")
        try:
            json.dumps(self.rope_parameters, sort_keys=True)
            if rope_type != "default":
                ROPE_INIT_FUNCTIONS[rope_type](self)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"rope_parameters {self.rope_parameters} are invalid: {error}") from error

    def validate_architecture(self) -> None:
        """Warn about invalid fields when the config is saved: an error would lose a trained model."""
        try:
            self.check()
        except ValueError as error:
            logger.warning(f"This config cannot be loaded as it is: {error}")

    def check(self) -> None:
        """Raise `ValueError` for invalid fields. Runs when a config is made, and when a model is made from it."""
        self._validate_sizes()
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}.")
        for name in ("attention_dropout", "hidden_dropout", "embedding_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a probability: it must be at least 0 and below 1, got {getattr(self, name)}.")
        for name in ("norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}.")
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"num_attention_heads ({self.num_attention_heads})"
            problem = f"{heads} is not a multiple of num_key_value_heads ({self.num_key_value_heads})"
            raise ValueError(f"{problem}: each key and value head serves the same number of query heads.")
        if self.position_embedding_type == "rotary":
            self._validate_rotary()
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r} is unknown: choose one of {', '.join(sorted(ACT2FN))}.")
        for name in SPECIAL_IDS:
            ids = getattr(self, name)
            for value in ids if isinstance(ids, list) else [ids]:
                if value is not None and not 0 <= value < self.vocab_size:
                    raise ValueError(f"{name} must be within the vocabulary (0 to {self.vocab_size - 1}) or None, got {value}.")


ScratchGPTConfig.__dataclass_fields__ = _PresentFields(ScratchGPTConfig.__dataclass_fields__)
