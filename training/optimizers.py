"""The optimizer and its schedule."""

import torch
from torch import nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup


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


def make_schedule(
    optimizer: torch.optim.Optimizer, warmup_steps: int, max_steps: int, min_learning_rate_ratio: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to a tenth: the schedule of GPT-3 and nanoGPT."""
    return get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup_steps, max_steps, min_lr_rate=min_learning_rate_ratio)
