"""The optimizer and its schedule."""

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019), in one fused kernel, with decay on matrices only.

    Biases and norms are not decayed: pulling them to zero regularises nothing (GPT-2's and nanoGPT's practice). Betas of
    (0.9, 0.95) forget old gradients faster than the default, as GPT-3 does (Brown et al., 2020).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def make_schedule(optimizer: torch.optim.Optimizer, warmup_fraction: float, max_steps: int) -> LambdaLR:
    """Linear warm-up, then a cosine down to a tenth of the highest rate: the schedule of GPT-3 and nanoGPT.

    Args:
        optimizer: its learning rates are the highest ones.
        warmup_fraction: share of the steps that warm up; the first step is at the first rate above zero.
        max_steps: steps in the run.
    """
    warmup_steps = math.ceil(warmup_fraction * max_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    return LambdaLR(optimizer, factor)
