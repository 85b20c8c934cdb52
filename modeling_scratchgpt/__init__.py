"""ScratchGPT for transformers. Importing it teaches the Auto classes the model type "scratchgpt".

The models are imported when one is first used: transformers' `PreTrainedModel` alone takes longer to import than torch.
"""

import sys
from typing import TYPE_CHECKING, Any

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
from .tokenization_scratchgpt import ScratchGPTTokenizer

if TYPE_CHECKING:
    from .modeling_scratchgpt import (
        ScratchGPTForCausalLM,
        ScratchGPTForQuestionAnswering,
        ScratchGPTForSequenceClassification,
        ScratchGPTForTokenClassification,
        ScratchGPTModel,
        ScratchGPTPreTrainedModel,
    )

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

AUTO_CLASSES = {
    "ScratchGPTModel": AutoModel,
    "ScratchGPTForCausalLM": AutoModelForCausalLM,
    "ScratchGPTForSequenceClassification": AutoModelForSequenceClassification,
    "ScratchGPTForTokenClassification": AutoModelForTokenClassification,
    "ScratchGPTForQuestionAnswering": AutoModelForQuestionAnswering,
}


class LazyModel(type):
    """The type of what stands for a model class in the Auto classes, until something is asked of it."""

    def __getattr__(cls, name: str) -> Any:
        return getattr(getattr(sys.modules[__name__], cls.__name__), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return getattr(sys.modules[__name__], cls.__name__)(*args, **kwargs)


def __getattr__(name: str) -> Any:
    """The models, when one is asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import modeling_scratchgpt

    for model_name in modeling_scratchgpt.__all__:
        globals()[model_name] = getattr(modeling_scratchgpt, model_name)
    for model_name, auto_class in AUTO_CLASSES.items():
        auto_class.register(ScratchGPTConfig, globals()[model_name], exist_ok=True)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


AutoConfig.register("scratchgpt", ScratchGPTConfig)
AutoTokenizer.register(ScratchGPTConfig, ScratchGPTTokenizer)
for model_name, auto_class in AUTO_CLASSES.items():
    auto_class.register(ScratchGPTConfig, LazyModel(model_name, (), {"config_class": ScratchGPTConfig}))
