"""LoRA, written out: a frozen model learns by what pairs of thin matrices add to its linear layers.

With r = 16 on all linear layers of GPT-2 124M, 2,654,208 numbers are trained instead of 124 million.

    add_adapter(model, LoraConfig(r=16))                           # then train as ever
    save_adapter(model, "outputs/adapter")                         # on disk it is PEFT's
    merge_and_unload(model).save_pretrained("outputs/merged")

layer.py has the mathematics: read it first. config.py says what an adapter can be, and which layers of a model that means;
adapters.py puts it there and takes it away; files.py keeps it on disk.

LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685. rsLoRA: Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732.
DoRA: Liu et al., 2024, https://arxiv.org/abs/2402.09353. The names are those of PEFT, https://github.com/huggingface/peft.
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
    "LoraConfig",
    "LoraLinear",
    "add_adapter",
    "add_weighted_adapter",
    "delete_adapter",
    "disable_adapter",
    "load_adapter",
    "lora_layers",
    "merge_adapter",
    "merge_and_unload",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
    "unmerge_adapter",
]
