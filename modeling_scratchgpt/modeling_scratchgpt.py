"""ScratchGPT: a decoder-only transformer that reads top to bottom and is at home in transformers.

Notable:
- With the config's defaults it is GPT-2: the same function of the same weights. With rotary positions, RMSNorm, QK-norm and
  a gated MLP it is Qwen3. Four words of the config decide (see `configuration_scratchgpt.py`).
- Norms come before attention and MLP, never after (pre-norm); one more comes before the head.
- `nn.Linear` everywhere, under the names that PEFT, quantizers and tensor-parallel plans look for.
- Positions follow the attention mask, so a padded prompt means the same as a bare one, whichever side the padding is on.
- Attention itself comes from transformers' registry (SDPA, flash, flex), with the eager form written out below.

Shapes: B batch, T tokens now, S tokens attended to (cached and now), C hidden_size, H query heads, K key-value heads,
D head_dim, V vocab_size.
"""

import inspect
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_scratchgpt import ScratchGPTConfig
from .cross_entropy import IGNORE_INDEX, cross_entropy, linear_cross_entropy, reduce_losses
from .interchange import HEADS, gpt2_weights
from .packed_linear import packed_linears


def make_norm(config: ScratchGPTConfig, size: int) -> nn.Module:
    """The norm over the last dimension that the config asks for."""
    norm_class = nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return norm_class(size, eps=config.norm_eps)


def residual_projection(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """A projection that writes to the residual stream. The mark tells `_init_weights` to start it smaller."""
    projection = nn.Linear(in_features, out_features, bias=bias)
    projection.writes_to_residual = True  # type: ignore[assignment]
    return projection


class ScratchGPTRotaryEmbedding(nn.Module):
    """Cosine and sine of each position's angles (Su et al., 2021), with transformers' scalings for long contexts."""

    def __init__(self, config: ScratchGPTConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        compute = self.compute_default_rope_parameters if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = compute(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: ScratchGPTConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Angle per position of each pair of dimensions (D/2,), and the factor on cosine and sine (none here)."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine (B, T, D) in the dtype of `x`; the angles are computed in float32."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)  # (B, T, D/2)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def apply_rotary_pos_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + D/2]) of every head in `x` (B, heads, T, D) by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def eager_attention_forward(
    module: "ScratchGPTAttention",
    query: torch.Tensor,  # (B, H, T, D)
    key: torch.Tensor,  # (B, K, S, D)
    value: torch.Tensor,  # (B, K, S, D)
    attention_mask: torch.Tensor | None,  # (B, 1, T, S), 0 where attended and -inf where not
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as in the paper (Vaswani et al., 2017): the output (B, T, H, D) and the weights (B, H, T, S)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)  # (B, H, S, D)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ScratchGPTAttention(nn.Module):
    """Causal self-attention with any number of key and value heads."""

    def __init__(self, config: ScratchGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.fused_inputs = ("q_proj", "k_proj", "v_proj")  # see packed_linear.py

        query_size, key_value_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = residual_projection(query_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        # Read here once: a config looks its fields up slowly, and a token that is decoded passes each layer.
        self.attention_dropout, self.hidden_dropout = config.attention_dropout, config.hidden_dropout

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, C)
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        heads = (*input_shape, -1, self.head_dim)
        query, key = self.q_proj(hidden_states).view(heads), self.k_proj(hidden_states).view(heads)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)  # (B, H, T, D), (B, K, T, D)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)  # (B, K, T, D)

        if position_embeddings is not None:
            cos, sin = (x.unsqueeze(1) for x in position_embeddings)  # (B, 1, T, D)
            query, key = apply_rotary_pos_emb(query, cos, sin), apply_rotary_pos_emb(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, K, S, D)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attention_interface(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )  # (B, T, H, D)
        output = output.reshape(*input_shape, -1).contiguous()  # (B, T, H * D)
        return nn.functional.dropout(self.o_proj(output), self.hidden_dropout, self.training), weights


class ScratchGPTMLP(nn.Module):
    """Each token by itself: widen, bend, narrow; with a gate on the wide side if the config says so."""

    def __init__(self, config: ScratchGPTConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = residual_projection(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.gate_proj = None
        if config.mlp_type == "gated":
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
            self.fused_inputs = ("up_proj", "gate_proj")
        self.act_fn = ACT2FN[config.hidden_act]
        self.hidden_dropout = config.hidden_dropout

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(hidden_states)
        wide = self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(hidden_states)) * up
        return nn.functional.dropout(self.down_proj(wide), self.hidden_dropout, self.training)


class ScratchGPTDecoderLayer(GradientCheckpointingLayer):
    """One block: attention between tokens, then the MLP, each added to the residual stream."""

    def __init__(self, config: ScratchGPTConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.self_attn = ScratchGPTAttention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        self.mlp = ScratchGPTMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ScratchGPTPreTrainedModel(PreTrainedModel):
    """What all ScratchGPT models share: how they start, and what transformers may do with them."""

    config_class = ScratchGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ScratchGPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keys_to_ignore_on_load_unexpected = [r"attn\.(masked_)?bias$"]  # GPT-2's old files hold its causal mask
    _can_record_outputs = {"hidden_states": ScratchGPTDecoderLayer, "attentions": ScratchGPTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights, zero biases; what writes to the residual stream starts smaller, by the number of its writes.

        Source: GPT-2 (Radford et al., 2019), section 2.3. The mark is on the projections themselves, because
        transformers passes over modules of custom code that hold no parameter of their own.
        """
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and hasattr(module, "writes_to_residual"):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs) -> tuple:
        """As in transformers, and GPT-2's weights go where they belong. What is saved later bears our names."""
        foreign = gpt2_weights()
        load_config = replace(load_config, weight_mapping=[*(load_config.weight_mapping or []), *foreign])
        result = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        model._weight_conversions = [conversion for conversion in model._weight_conversions if conversion not in foreign]
        return result

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As in transformers. The folder also gets the code (by `_auto_class`), and says what each Auto class finds in it.

        Raises:
            ValueError: the model has adapters, which are no part of its folder.
        """
        if not self._hf_peft_config_loaded and any(".lora_" in name for name, _ in self.named_parameters()):
            raise ValueError("this model has adapters: save them with `save_adapter`, or the whole after `merge_and_unload`.")
        self.config.auto_map = {
            "AutoConfig": "configuration_scratchgpt.ScratchGPTConfig",
            "AutoModel": "modeling_scratchgpt.ScratchGPTModel",
            **{f"AutoModel{head}": f"modeling_scratchgpt.ScratchGPT{head}" for head in HEADS},
        }
        super().save_pretrained(save_directory, *args, **kwargs)


class ScratchGPTModel(ScratchGPTPreTrainedModel):
    """Embeddings, the blocks, the last norm: from token ids to one vector a token."""

    _auto_class = "AutoModel"

    def __init__(self, config: ScratchGPTConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.rotary_emb = ScratchGPTRotaryEmbedding(config)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(ScratchGPTDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        try:
            return self.embed_tokens(input_ids)
        except IndexError as error:
            raise ValueError(
                f"input_ids must be within the vocabulary (0 to {self.config.vocab_size - 1}), got {input_ids.min()} to "
                f"{input_ids.max()}: is this the tokenizer the model was trained with?"
            ) from error

    def _positions(self, attention_mask: torch.Tensor | None, past_length: int, length: int, device) -> torch.Tensor:
        """Position of each token now: how many real tokens stand before it. (B or 1, T)."""
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return torch.arange(length, device=device).unsqueeze(0) + past_length

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,  # (B, T)
        attention_mask: torch.Tensor | None = None,  # (B, S), 1 for tokens and 0 for padding
        position_ids: torch.Tensor | None = None,  # (B, T)
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,  # (B, T, C)
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """The last hidden states (B, T, C), and with `use_cache` the keys and values for the next call.

        Several documents may stand in one row: where `position_ids` start again, a new one begins, and no token sees
        another's document. There must be no `attention_mask` then.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`; ids outside the vocabulary; a mask of another
                shape; more tokens than learned positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids)
        batch, length = inputs_embeds.shape[:2]
        if batch == 0 or length == 0:
            raise ValueError(f"there is no token in inputs of {batch} rows and {length} columns: give at least one.")
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            fits = attention_mask.shape[1] == length if past_key_values is None else attention_mask.shape[1] >= length
            if attention_mask.shape[0] != batch or not fits:
                raise ValueError(
                    f"attention_mask is {tuple(attention_mask.shape)}: it must be (batch, tokens cached and now), here "
                    f"({batch}, {past_length + length})."
                )

        # Only positions that the caller gives can tell of several documents in a row, and only before there is a cache.
        causal_mask = create_causal_mask(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self._positions(attention_mask, past_length, length, inputs_embeds.device)

        hidden_states, position_embeddings = inputs_embeds, None
        if self.config.position_embedding_type == "learned":
            limit = self.config.max_position_embeddings
            if past_length + length > limit and position_ids.max() >= limit:
                raise ValueError(
                    f"{past_length + length} tokens were given, but this model has learned only {limit} positions "
                    "(max_position_embeddings): shorten the text, or train a model with rotary positions."
                )
            hidden_states = inputs_embeds + self.embed_positions(position_ids)
        else:
            position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = self.dropout(hidden_states)  # (B, T, C)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


def select_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The hidden states (B, T, C) that get logits: the last so many (0: all), the places listed for all rows or for each,
    or those that a mask (B, T) marks, then as (N, C)."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]


class ScratchGPTForCausalLM(ScratchGPTPreTrainedModel, GenerationMixin):
    """The language model: for each token, how likely each id is to come next."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ScratchGPTConfig):
        super().__init__(config)
        self.model = ScratchGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,  # (B, T)
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,  # (B, T)
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and the loss when there are labels.

        Args:
            labels: the input ids themselves; position t is scored on `labels[t + 1]`. -100 counts for nothing.
            shift_labels (among `kwargs`: Trainer takes every argument with "label" in its name for one that each batch has):
                what comes next, shifted already; instead of `labels`.
            num_items_in_batch: the sum of the losses is divided by it, so that a batch has one loss however it is split;
                without it the loss is the mean over scored tokens, in nats.
            skip_logits: whether to give the loss alone, which saves most of the memory of a training step. While
                training with labels that is the default; pass False to get the logits all the same.
            logits_to_keep: compute only the last so many logits, or those at these positions.
        """
        shift_labels: torch.Tensor | None = kwargs.pop("shift_labels", None)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if labels is not None and shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
        # The lean loss needs the head's bare weight: what LoRA, a quantizer or a tensor-parallel plan has made of it is called.
        head = self.lm_head
        is_bare = type(head) is nn.Linear and head.bias is None and type(head.weight) in (nn.Parameter, torch.Tensor)
        if skip_logits is None:
            skip_logits = self.training and shift_labels is not None
        loss = logits = None
        if skip_logits and shift_labels is not None and is_bare:
            loss = linear_cross_entropy(hidden_states, self.lm_head.weight, shift_labels, num_items_in_batch)
        else:
            logits = self.lm_head(select_positions(hidden_states, logits_to_keep))  # (B, T, V)
            if shift_labels is not None:
                loss = cross_entropy(logits, shift_labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions)

    @wraps(GenerationMixin.generate)  # type: ignore[arg-type]
    def generate(self, *args, **kwargs) -> Any:  # type: ignore[override]
        with packed_linears(self):
            return super().generate(*args, **kwargs)

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length) -> None:
        """Also refuse, before the first token, to go past the learned positions; the last token that is written is not read."""
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)
        limit = self.config.max_position_embeddings
        if self.config.position_embedding_type == "learned" and generation_config.max_length > limit + 1:
            raise ValueError(
                f"a prompt of {input_ids_length} tokens and {generation_config.max_length - input_ids_length} new ones are "
                f"more than the {limit} positions that this model has learned: pass max_new_tokens="
                f"{max(limit + 1 - input_ids_length, 0)} or less, or shorten the prompt."
            )


# `generate` asks custom code for its signature at every token; found here, the answer costs nothing.
ScratchGPTForCausalLM.forward.__signature__ = inspect.signature(ScratchGPTForCausalLM.forward)  # type: ignore[attr-defined]


def pool_hidden_states(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, how: str) -> torch.Tensor:
    """One vector a text (B, C), from the hidden states (B, T, C) of its real tokens: `"last"` or `"mean"`."""
    if attention_mask is None:
        return hidden_states[:, -1] if how == "last" else hidden_states.mean(1)
    is_real = (attention_mask != 0).to(hidden_states.device)  # (B, T)
    if how == "mean":
        return (hidden_states * is_real[..., None]).sum(1) / is_real.sum(1, keepdim=True).clamp(min=1)
    places = torch.arange(is_real.shape[1], device=hidden_states.device)
    last = (places * is_real).argmax(-1)  # (B,)
    return hidden_states[torch.arange(len(last), device=hidden_states.device), last]


class ScratchGPTForSequenceClassification(ScratchGPTPreTrainedModel):
    """One set of scores a text, read off its last real token or the mean of all: any number of classes, several at once, or
    numbers."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: ScratchGPTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ScratchGPTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,  # (B,) classes or numbers, or (B, num_labels) of 0 and 1, shares or numbers
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """Scores (B, num_labels), and the loss that `config.problem_type` asks for when there are labels.

        The attention mask alone says which tokens are real, on whichever side the padding is; without a mask all are. A
        `problem_type` that is not set is told from the labels, as in transformers. For one class a text, labels (B, num_labels)
        are the share of each class: so they carry label smoothing, and the weight of the text as their sum.
        """
        outputs: BaseModelOutputWithPast = self.model(input_ids, attention_mask, **kwargs)
        text = pool_hidden_states(outputs.last_hidden_state, attention_mask, self.config.classifier_pooling)
        logits = self.score(text)  # (B, num_labels)
        loss = None if labels is None else self._loss(logits, labels.to(logits.device), num_items_in_batch)
        return SequenceClassifierOutputWithPast(
            loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        if self.config.problem_type is None:
            if self.num_labels == 1:
                self.config.problem_type = "regression"
            elif labels.dtype in (torch.long, torch.int):
                self.config.problem_type = "single_label_classification"
            else:
                self.config.problem_type = "multi_label_classification"
        if self.config.problem_type == "single_label_classification" and not labels.is_floating_point():
            return cross_entropy(logits, labels, num_items_in_batch)
        logits, labels = logits.float(), labels.float().view_as(logits)
        if self.config.problem_type == "single_label_classification":
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            return reduce_losses(losses[:, None].expand_as(labels), num_items_in_batch)  # Trainer counts every share
        regression = self.config.problem_type == "regression"
        per_element = nn.functional.mse_loss if regression else nn.functional.binary_cross_entropy_with_logits
        return reduce_losses(per_element(logits, labels, reduction="none"), num_items_in_batch)


class ScratchGPTForTokenClassification(ScratchGPTPreTrainedModel):
    """One class a token."""

    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: ScratchGPTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ScratchGPTModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,  # (B, T), not shifted; -100 counts for nothing
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Scores (B, T, num_labels), and the loss when there are labels."""
        outputs: BaseModelOutputWithPast = self.model(input_ids, attention_mask, **kwargs)
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class ScratchGPTForQuestionAnswering(ScratchGPTPreTrainedModel):
    """Where in the text the answer starts and ends."""

    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: ScratchGPTConfig):
        super().__init__(config)
        self.model = ScratchGPTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,  # (B,)
        end_positions: torch.LongTensor | None = None,  # (B,)
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """Scores of each token as start and as end (B, T), and the mean of both losses. Places past the end do not count."""
        outputs: BaseModelOutputWithPast = self.model(input_ids, attention_mask, **kwargs)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            losses = [
                cross_entropy(logits, places.masked_fill(places >= logits.shape[1], IGNORE_INDEX), num_items_in_batch)
                for logits, places in ((start_logits, start_positions.flatten()), (end_logits, end_positions.flatten()))
            ]
            loss = (losses[0] + losses[1]) / 2
        return QuestionAnsweringModelOutput(loss, start_logits, end_logits, outputs.hidden_states, outputs.attentions)


__all__ = [
    "ScratchGPTForCausalLM",
    "ScratchGPTForQuestionAnswering",
    "ScratchGPTForSequenceClassification",
    "ScratchGPTForTokenClassification",
    "ScratchGPTModel",
    "ScratchGPTPreTrainedModel",
]
