"""ScratchGPT: a decoder-only transformer to be read from top to bottom, with transformers' interfaces.

Notable:
- Four fields of the config choose the architecture, from GPT-2 to Qwen3 (see `configuration_scratchgpt.py`).
- Pre-norm: a norm precedes each attention, each MLP and the head.
- `nn.Linear` everywhere, under the names that PEFT, quantizers and tensor-parallel plans expect.
- Positions are derived from the attention mask, so padding on either side does not change the result.

Shapes: B batch, T new tokens, S attended tokens, C hidden_size, V vocab_size.
"""

import inspect
import math
from itertools import islice
from typing import Any

import torch
from torch import nn
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
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .attention import ScratchGPTAttention, ScratchGPTRotaryEmbedding
from .configuration_scratchgpt import ScratchGPTConfig
from .cross_entropy import IGNORE_INDEX, classification_loss, cross_entropy, is_plain_head, linear_cross_entropy, span_loss
from .interchange import InterchangeModel
from .packed_linear import PackedGenerationMixin

create_block_mask = torch.compiler.disable(create_causal_mask)  # for flex attention; torch compiles it by itself
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


class ScratchGPTMLP(nn.Module):
    """Position-wise feed-forward network; gated (SwiGLU-style) if the config says so."""

    def __init__(self, config: ScratchGPTConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.writes_to_residual = True  # type: ignore[assignment]
        self.gate_proj = None
        if config.mlp_type == "gated":
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
            self.fused_inputs = ("up_proj", "gate_proj")
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(hidden_states)
        inner = self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(hidden_states)) * up
        return self.dropout(self.down_proj(inner))


class ScratchGPTDecoderLayer(GradientCheckpointingLayer):
    """Transformer block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: ScratchGPTConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps)
        self.self_attn = ScratchGPTAttention(config, layer_idx)
        self.post_attention_layernorm = NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps)
        self.mlp = ScratchGPTMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ScratchGPTPreTrainedModel(InterchangeModel):
    """Base class: initialization, and the features of transformers that are supported."""

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
    _can_record_outputs = {"hidden_states": ScratchGPTDecoderLayer, "attentions": ScratchGPTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Also scale down the residual projections by the square root of their number (GPT-2: Radford et al., 2019, 2.3)."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and hasattr(module, "writes_to_residual"):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)


class ScratchGPTModel(ScratchGPTPreTrainedModel):
    """The backbone: embeddings, blocks and final norm, from token ids to hidden states."""

    _auto_class = "AutoModel"

    def __init__(self, config: ScratchGPTConfig):
        config.check()  # it may have been changed since it was made
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.rotary_emb = ScratchGPTRotaryEmbedding(config)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(ScratchGPTDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        try:
            return self.embed_tokens(input_ids)
        except IndexError as error:
            allowed, got = f"0 to {self.config.vocab_size - 1}", f"{input_ids.min()} to {input_ids.max()}"
            problem = f"input_ids must be within the vocabulary ({allowed}), got {got}"
            raise ValueError(f"{problem}: is this the tokenizer the model was trained with?") from error

    def _check_shapes(self, inputs_embeds: torch.Tensor, padding_mask: torch.Tensor | None, past_length: Any) -> None:
        batch, length = inputs_embeds.shape[:2]
        if batch == 0 or length == 0:
            raise ValueError(f"the inputs are empty ({batch} rows, {length} columns): pass at least one token.")
        if padding_mask is None:
            return
        # A compiler cannot branch on the length of a static cache. There, the lookup of positions fails for a narrow mask.
        rows, columns = padding_mask.shape
        if rows != batch or (not torch.compiler.is_compiling() and columns < past_length + length):
            expected = f"(batch, cached + new tokens), here {(batch, int(past_length + length))}"
            raise ValueError(f"attention_mask is {(rows, columns)}: it must be {expected}, or wider.")

    def _embed_positions(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, past_length: int | torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """The input of the first block, and the rotary embeddings if the positions are not learned."""
        if self.config.position_embedding_type == "rotary":
            # An embedding may be in a lower precision than the norms (layerwise casting of a tied head): continue in theirs.
            dtype = getattr(self.norm, "weight", inputs_embeds).dtype
            inputs_embeds = inputs_embeds.to(torch.promote_types(inputs_embeds.dtype, dtype))
            return inputs_embeds, self.rotary_emb(inputs_embeds, position_ids)
        if isinstance(self.layers[0], nn.Identity):  # a later pipeline stage, whose input has the positions already
            return inputs_embeds, None
        length, limit = past_length + inputs_embeds.shape[1], self.config.max_position_embeddings
        # A compiler and a CUDA graph cannot branch on values, but a compiled embedding checks its indices.
        if not is_tracing(position_ids) and length > limit and position_ids.max() >= limit:
            problem = f"{length} tokens exceed the {limit} learned positions of this model (max_position_embeddings)"
            raise ValueError(f"{problem}: shorten the text, or train a model with rotary positions.")
        return inputs_embeds + self.embed_positions(position_ids), None

    def _masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: Any,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None,
        has_lengths: bool,
    ) -> dict[str, Any]:
        """The mask that the attention takes, and for flash attention, which takes none, the lengths of packed documents, unless
        the caller has passed them."""
        implementation, is_plain = self.config._attn_implementation, attention_mask is None and past_key_values is None
        if is_plain and position_ids is None and implementation == "sdpa":
            # While compiling, some versions of transformers make a mask of this, which rules out SDPA's fast kernels.
            return {"attention_mask": None}
        create_mask = create_block_mask if implementation == "flex_attention" else create_causal_mask
        mask = create_mask(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        is_packed = is_plain and position_ids is not None and "flash" in implementation and not has_lengths
        return {"attention_mask": mask, **(packed_lengths(position_ids.expand(inputs_embeds.shape[:2])) if is_packed else {})}

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,  # (B, T)
        attention_mask: torch.Tensor | None = None,  # (B, S or more), 1 for tokens and 0 for padding
        position_ids: torch.Tensor | None = None,  # (B, T)
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,  # (B, T, C)
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states (B, T, C), and with `use_cache` the keys and values for the next call.

        Without `attention_mask` a row may hold packed documents: each begins where `position_ids` restart and sees only itself.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`; ids outside the vocabulary; a mask of another
                batch, or narrower than cached plus new tokens; more tokens than learned positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        padding_mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 else None
        self._check_shapes(inputs_embeds, padding_mask, past_length)
        if padding_mask is not None and past_key_values is None:
            attention_mask = padding_mask = padding_mask[:, : inputs_embeds.shape[1]]
        # First, since packed documents are detected from the caller's position_ids, and only without a cache.
        has_lengths = kwargs.get("cu_seq_lens_q") is not None
        masks = self._masks(inputs_embeds, attention_mask, past_key_values, position_ids, has_lengths)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            columns = past_length + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = columns.unsqueeze(0)
            if padding_mask is not None:  # count only real tokens
                position_ids = (padding_mask.long().cumsum(-1) - 1).clamp(min=0)[:, columns]
        hidden_states, position_embeddings = self._embed_positions(inputs_embeds, position_ids, past_length)
        hidden_states = self.dropout(hidden_states)  # (B, T, C)
        options: Any = {"position_embeddings": position_embeddings, "position_ids": position_ids, "use_cache": use_cache}
        options |= {"past_key_values": past_key_values, **masks, **kwargs}
        for layer in islice(self.layers, self.config.num_hidden_layers):  # fewer with `assistant_early_exit`
            hidden_states = layer(hidden_states, **options)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


def packed_lengths(position_ids: torch.Tensor) -> dict[str, Any]:
    """The documents of a batch (B, T) for flash attention, which takes it as one row.

    Transformers finds them only if B is 1, and again in every layer.
    """
    is_first = torch.diff(position_ids, prepend=position_ids[:, :1] - 2) != 1  # also the first column
    starts = is_first.flatten().nonzero().squeeze(1)
    boundaries = nn.functional.pad(starts, (0, 1), value=position_ids.numel()).int()
    longest = int(boundaries.diff().max())
    return {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": longest, "max_length_k": longest}


def select_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Select the hidden states (of B, T, C) that get logits: the last N (0: all), those at indices (N,) or (B, N), or those
    where a boolean mask (B, T) is true, as (N, C)."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]


class ScratchGPTForCausalLM(ScratchGPTPreTrainedModel, PackedGenerationMixin):
    """Language model: next-token logits, loss and generation."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
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
        """Return next-token logits (B, T, V), and the loss if there are labels.

        Args:
            labels: the input ids; shifted here, so that position t is scored on `labels[t + 1]`. -100 is ignored.
            shift_labels: labels that are already shifted (in `kwargs`: Trainer expects arguments named "label" in each batch).
            num_items_in_batch: divisor of the summed loss. Without it, the loss is the mean over scored tokens, in nats.
            skip_logits: return only the loss, computed without materializing the logits, which saves most of the memory of a
                training step. Default: `config.skip_logits` while training, else False.
            logits_to_keep: compute only the last N logits, or those at these positions (see `select_positions`).
        """
        shift_labels: torch.Tensor | None = kwargs.pop("shift_labels", None)
        output = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
        )
        if labels is not None and shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
        if skip_logits is None:
            skip_logits = self.training and self.config.skip_logits
        loss = logits = None
        if isinstance(num_items_in_batch, int):  # a compiler would compile again for each value
            num_items_in_batch = torch.full((), num_items_in_batch, dtype=torch.float32, device=output.last_hidden_state.device)
        if skip_logits and shift_labels is not None and is_plain_head(self.lm_head):
            loss = linear_cross_entropy(output.last_hidden_state, self.lm_head.weight, shift_labels, num_items_in_batch)
        else:
            logits = self.lm_head(select_positions(output.last_hidden_state, logits_to_keep))  # (B, T, V)
            if shift_labels is not None:
                loss = cross_entropy(logits, shift_labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss, logits, output.past_key_values, output.hidden_states, output.attentions)


# `generate` inspects the signature of custom code for every token: cached here, that takes no time.
ScratchGPTForCausalLM.forward.__signature__ = inspect.signature(ScratchGPTForCausalLM.forward)  # type: ignore[attr-defined]


# The other heads ---------------------------------------------------------------------------------------------------------


def pool_hidden_states(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, how: str, past_length: int | torch.Tensor = 0
) -> torch.Tensor:
    """Pool hidden states (B, T, C) over the real tokens of each text to (B, C): the `"last"` or the `"mean"`.

    With a cache, `attention_mask` begins with `past_length` columns for the cached tokens.

    Raises:
        ValueError: a mask that is not (B, S); with a cache, a text without a real token after the cached ones.
    """
    if attention_mask is None:
        return hidden_states[:, -1] if how == "last" else hidden_states.mean(1)
    if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}: a classifier pools by a mask of (batch, tokens).")
    indices = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    is_real = attention_mask.to(hidden_states.device)[:, past_length + indices] != 0  # (B, T)
    if how == "mean":
        return (hidden_states * is_real[..., None]).sum(1) / is_real.sum(1, keepdim=True).clamp(min=1)
    # While compiling, values cannot be read.
    if not torch.compiler.is_compiling() and past_length > 0 and not (is_continued := is_real.any(1)).all():
        problem = f"{(~is_continued).sum()} of {len(is_continued)} texts have no token after the cached ones"
        remedy = "pass these texts as a whole, without past_key_values"
        raise ValueError(f"{problem}, and the cache has no hidden states to classify: {remedy}.")
    last = (indices * is_real).argmax(-1)  # (B,)
    return hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), last]


class ScratchGPTForSequenceClassification(ScratchGPTPreTrainedModel):
    """Classification (single- or multi-label) or regression of whole texts."""

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
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,  # (B,) classes or targets, or (B, num_labels) probabilities or targets
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """Return logits (B, num_labels), and the loss of `config.problem_type` if there are labels.

        Only the attention mask marks padding, on either side; without a mask all tokens are real. Single-label targets may be
        class probabilities (B, num_labels), for label smoothing; a row that does not sum to 1 weights its text.

        Raises:
            ValueError: a mask that is not (B, S), or a cache without the hidden states that are to be pooled.
        """
        pooling = self.config.classifier_pooling
        if pooling == "mean" and past_key_values is not None and past_key_values.get_seq_length() > 0:
            reason = "classifier_pooling='mean' needs the hidden states of the whole text, and a cache has only keys and values"
            remedy = "pass the whole text without past_key_values, or train with classifier_pooling='last'"
            raise ValueError(f"{reason}: {remedy}.")
        output = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs)
        hidden_states = output.last_hidden_state
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length() - hidden_states.shape[1]
        pooled = pool_hidden_states(hidden_states, attention_mask, pooling, past_length)
        logits = self.score(pooled)  # (B, num_labels)
        loss = None if labels is None else classification_loss(logits, labels, self.config, num_items_in_batch)
        return SequenceClassifierOutputWithPast(loss, logits, output.past_key_values, output.hidden_states, output.attentions)


class ScratchGPTForTokenClassification(ScratchGPTPreTrainedModel):
    """Classification of each token."""

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
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,  # (B, T), not shifted; -100 is ignored
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Return logits (B, T, num_labels), and the loss if there are labels."""
        output = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs)
        logits = self.score(self.dropout(output.last_hidden_state))
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return TokenClassifierOutput(loss, logits, output.hidden_states, output.attentions)


class ScratchGPTForQuestionAnswering(ScratchGPTPreTrainedModel):
    """Extractive question answering: the start and the end of the answer in the text."""

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
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,  # (B,)
        end_positions: torch.LongTensor | None = None,  # (B,)
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """Return start and end logits (B, T), and the mean of both losses. Positions outside the text are ignored."""
        output = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs)
        start_logits, end_logits = self.qa_outputs(output.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            start_loss = span_loss(start_logits, start_positions, num_items_in_batch)
            loss = (start_loss + span_loss(end_logits, end_positions, num_items_in_batch)) / 2
        return QuestionAnsweringModelOutput(loss, start_logits, end_logits, output.hidden_states, output.attentions)


# The classes that transformers knows by name: Trainer shifts the labels of these language models if it smooths them, and names
# the task of the others in its model cards. Registration with the Auto classes does not add to these tables.
for table, model_class in (
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, ScratchGPTForCausalLM),
    (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, ScratchGPTForSequenceClassification),
    (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, ScratchGPTForTokenClassification),
    (modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, ScratchGPTForQuestionAnswering),
):
    table[ScratchGPTConfig.model_type] = model_class.__name__
