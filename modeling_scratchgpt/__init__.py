"""ScratchGPT for transformers. Importing it teaches the Auto classes the model type "scratchgpt"."""

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
for auto_class, model_class in (
    (AutoModel, ScratchGPTModel),
    (AutoModelForCausalLM, ScratchGPTForCausalLM),
    (AutoModelForSequenceClassification, ScratchGPTForSequenceClassification),
    (AutoModelForTokenClassification, ScratchGPTForTokenClassification),
    (AutoModelForQuestionAnswering, ScratchGPTForQuestionAnswering),
):
    auto_class.register(ScratchGPTConfig, model_class)
    model_class.register_for_auto_class(auto_class.__name__)  # what is saved carries its own code
ScratchGPTConfig.register_for_auto_class()
ScratchGPTTokenizer.register_for_auto_class()

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
