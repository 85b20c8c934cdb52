"""ScratchGPT for transformers. Importing this package registers the model type "scratchgpt" with the Auto classes."""

import transformers

from .configuration_scratchgpt import ScratchGPTConfig
from .modeling_scratchgpt import (
    ScratchGPTForCausalLM,
    ScratchGPTForQuestionAnswering,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
    ScratchGPTModel,
    ScratchGPTPreTrainedModel,
)
from .tokenization_scratchgpt import ScratchGPTTokenizer

transformers.AutoConfig.register("scratchgpt", ScratchGPTConfig)
transformers.AutoTokenizer.register(ScratchGPTConfig, ScratchGPTTokenizer)
transformers.AutoModel.register(ScratchGPTConfig, ScratchGPTModel)
transformers.AutoModelForCausalLM.register(ScratchGPTConfig, ScratchGPTForCausalLM)
transformers.AutoModelForSequenceClassification.register(ScratchGPTConfig, ScratchGPTForSequenceClassification)
transformers.AutoModelForTokenClassification.register(ScratchGPTConfig, ScratchGPTForTokenClassification)
transformers.AutoModelForQuestionAnswering.register(ScratchGPTConfig, ScratchGPTForQuestionAnswering)

__all__ = [
    "ScratchGPTConfig", "ScratchGPTForCausalLM", "ScratchGPTForQuestionAnswering", "ScratchGPTForSequenceClassification",
    "ScratchGPTForTokenClassification", "ScratchGPTModel", "ScratchGPTPreTrainedModel", "ScratchGPTTokenizer",
]  # fmt: skip
