"""LoRA, written out: low-rank adapters for the linear layers of a frozen model, compatible with PEFT.

With r = 16 on all linear layers of the blocks, GPT-2 124M trains 2,654,208 parameters instead of 124 million.

    add_adapter(model, LoraConfig(r=16))                           # then train as usual
    save_adapter(model, "outputs/adapter")                         # in PEFT's format
    merge_and_unload(model).save_pretrained("outputs/merged")

Read layer.py first: it has the mathematics. config.py has the settings and the layers they select.

LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685. rsLoRA: Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732.
DoRA: Liu et al., 2024, https://arxiv.org/abs/2402.09353. Names follow PEFT, https://github.com/huggingface/peft.
"""

from .adapters import (
    add_adapter,
    add_weighted_adapter,
    delete_adapter,
    disable_adapter,
    lora_layers,
    merge_adapter,
    merge_and_unload,
    set_adapter,
    trainable_parameters,
    unmerge_adapter,
)
from .config import LoraConfig
from .files import load_adapter, save_adapter
from .layer import LoraLinear

__all__ = [
    "LoraConfig", "LoraLinear", "add_adapter", "add_weighted_adapter", "delete_adapter", "disable_adapter",
    "load_adapter", "lora_layers", "merge_adapter", "merge_and_unload", "save_adapter", "set_adapter",
    "trainable_parameters", "unmerge_adapter",
]  # fmt: skip
