"""Forward passes of the heads other than the language model: text classification, token classification, question answering.

The classes with their layers are at the end of `modeling_scratchgpt.py`.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutputWithPast, TokenClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .cross_entropy import classification_loss, cross_entropy, span_loss


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
        raise ValueError(
            f"{(~is_continued).sum()} of {len(is_continued)} texts have no token after the cached ones, and the cache has no "
            "hidden states to classify: pass these texts as a whole, without past_key_values."
        )
    last = (indices * is_real).argmax(-1)  # (B,)
    return hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), last]


class SequenceClassificationMixin:
    """Classification (single- or multi-label) or regression of whole texts."""

    config: Any
    model: Any
    score: Any

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

        Only the attention mask marks padding, on either side; without a mask all tokens are real. As in transformers,
        `problem_type` is inferred from the labels if not set. Single-label targets may be class probabilities
        (B, num_labels), for label smoothing; a row that does not sum to 1 weights its text.

        Raises:
            ValueError: a mask that is not (B, S), or a cache without the hidden states that are to be pooled.
        """
        pooling = self.config.classifier_pooling
        if pooling == "mean" and past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise ValueError(
                "classifier_pooling='mean' needs the hidden states of the whole text, and a cache has only keys and values: "
                "pass the whole text without past_key_values, or train with classifier_pooling='last'."
            )
        output = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs)
        hidden_states = output.last_hidden_state
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length() - hidden_states.shape[1]
        pooled = pool_hidden_states(hidden_states, attention_mask, pooling, past_length)
        logits = self.score(pooled)  # (B, num_labels)
        loss = None if labels is None else classification_loss(logits, labels, self.config, num_items_in_batch)
        return SequenceClassifierOutputWithPast(loss, logits, output.past_key_values, output.hidden_states, output.attentions)


class TokenClassificationMixin:
    """Classification of each token."""

    config: Any
    model: Any
    dropout: Any
    score: Any

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


class QuestionAnsweringMixin:
    """Extractive question answering: the start and the end of the answer in the text."""

    config: Any
    model: Any
    qa_outputs: Any

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
