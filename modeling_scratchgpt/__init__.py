"""ScratchGPT for transformers. Importing this package registers the model type "scratchgpt" with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

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

AutoConfig.register("scratchgpt", ScratchGPTConfig)
AutoTokenizer.register(ScratchGPTConfig, ScratchGPTTokenizer)
AutoModel.register(ScratchGPTConfig, ScratchGPTModel)
AutoModelForCausalLM.register(ScratchGPTConfig, ScratchGPTForCausalLM)
AutoModelForSequenceClassification.register(ScratchGPTConfig, ScratchGPTForSequenceClassification)
AutoModelForTokenClassification.register(ScratchGPTConfig, ScratchGPTForTokenClassification)
AutoModelForQuestionAnswering.register(ScratchGPTConfig, ScratchGPTForQuestionAnswering)

__all__ = [
    "ScratchGPTConfig",
    "ScratchGPTForCausalLM",
    "ScratchGPTForQuestionAnswering",
    "ScratchGPTForSequenceClassification",
    "ScratchGPTForTokenClassification",
    "ScratchGPTModel",
    "ScratchGPTPreTrainedModel",
    "ScratchGPTTokenizer",
]
