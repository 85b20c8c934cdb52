"""Causal self-attention with rotary position embeddings, from transformers' registry (SDPA, flash, flex) or written out here.

Shapes: B batch, T new tokens, S attended tokens, C hidden_size, H query heads, K key-value heads, D head_dim.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_scratchgpt import ScratchGPTConfig


class ScratchGPTRotaryEmbedding(nn.Module):
    """Rotary position embeddings (Su et al., 2021), with transformers' scaling types for long contexts."""

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
        """Inverse frequencies (D/2,) and the scale of cosine and sine (1: none)."""
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
    """Rotate each pair (x[i], x[i + D/2]) of every head in `x` (B, heads, T, D) by the angle of its position."""
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
    """Scaled dot-product attention (Vaswani et al., 2017): output (B, T, H, D) and weights (B, H, T, S)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)  # (B, H, S, D)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ScratchGPTHeadNorm(nn.RMSNorm):
    """RMSNorm (Zhang & Sennrich, 2019) of each head, in the dtype of its input, as the fast kernels require."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class ScratchGPTAttention(nn.Module):
    """Causal self-attention; grouped-query if there are fewer key-value heads than query heads."""

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
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.o_proj.writes_to_residual = True  # type: ignore[assignment]  # for `_init_weights`, which only gets the module
        self.q_norm = ScratchGPTHeadNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = ScratchGPTHeadNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        # Modules, whose probability other libraries may change; that of the weights is an argument of the attention interface.
        self.attention_dropout, self.dropout = nn.Dropout(config.attention_dropout), nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, C)
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key = self.q_proj(hidden_states).view(heads), self.k_proj(hidden_states).view(heads)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)  # (B, H, T, D), (B, K, T, D)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)  # (B, K, T, D)

        if position_embeddings is not None:
            cos, sin = (x.unsqueeze(1) for x in position_embeddings)  # (B, 1, T, D)
            query, key = apply_rotary_pos_emb(query, cos, sin), apply_rotary_pos_emb(key, cos, sin)
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotations return float32
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, K, S, D)

        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout.p if self.training else 0.0
        output, weights = attention_interface(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()  # (B, T, H * D); some return (B * T, H * D)
        return self.dropout(self.o_proj(output)), weights
