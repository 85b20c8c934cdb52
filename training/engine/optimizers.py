"""Optimizers and learning rate schedules.

Background: Adam rescales each weight on its own. Muon ("momentum orthogonalized by Newton-Schulz", Jordan et al., 2024) updates
a weight matrix as a whole. The momentum of a matrix is dominated by a few directions: most of its singular values are tiny, so
plain momentum learns hardly anything along the others. Muon keeps the singular vectors and sets all singular values to about 1,
i.e. it replaces U S V^T by U V^T, the nearest orthogonal matrix: every direction is learned at the same rate. No singular value
decomposition is needed: a few matrix products (the Newton-Schulz iteration) are precise enough. This suits the matrices inside
the blocks. Embeddings (looked up, not multiplied), the head, norms and biases stay with AdamW.

Notable:
- Matrices of one shape are orthogonalized in one batched product, in the device's fastest dtype; processes share them out.
- With FSDP2 the momentum stays sharded: only the matrix to orthogonalize is gathered, and each process keeps its shard.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from training.cli import option


def matmul_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the fastest matrix products: bfloat16 where the hardware supports it, else float32."""
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        has_bfloat16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if has_bfloat16 else torch.float32


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Move the singular values of matrices (N, rows, columns) close to 1 and keep their singular vectors.

    Each step of the Newton-Schulz iteration maps every singular value s to a s + b s^3 + c s^5. With Jordan's coefficients
    (https://kellerjordan.github.io/posts/muon, 2024) small values grow fastest; all end near 1, between 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices  # x @ x.mT below is then the smaller of the two possible squares
    # The Frobenius norm bounds the largest singular value, and the iteration converges for values up to 1.
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(matmul_dtype(x.device))
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


def orthogonalize_together(matrices: torch.Tensor) -> torch.Tensor:
    """`orthogonalize` matrices (N, rows, columns) that all processes have, each process its part."""
    num_processes = dist.get_world_size() if dist.is_initialized() else 1
    if num_processes == 1:
        return orthogonalize(matrices)
    parts = functional.pad(matrices, (0, 0, 0, 0, 0, -len(matrices) % num_processes)).chunk(num_processes)
    dtype = matmul_dtype(matrices.device)  # of the result, too: nothing is lost on the way
    results = [torch.empty_like(part, dtype=dtype) for part in parts]
    dist.all_gather(results, orthogonalize(parts[dist.get_rank()]).to(dtype).contiguous())
    return torch.cat(results)[: len(matrices)].to(matrices.dtype)


class Muon(Optimizer):
    """Muon, for matrices: momentum, orthogonalized (Jordan et al., 2024).

    With several processes (torch.distributed), all must hold the same parameters and gradients, or shards of them.

    Args:
        parameters: matrices, or parameter groups of matrices.
        lr: learning rate, about the change of the spectral norm of the weights per step.
        weight_decay: decoupled weight decay, as in AdamW: each step multiplies the weights by `1 - lr * weight_decay`.
        momentum: decay rate of the momentum, which is Nesterov's.
    """

    def __init__(self, parameters: Iterable, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have a gradient; with a sharded model every process must call it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for (rows, columns), parameters in by_shape.items():
                directions = [self._direction(parameter, group["momentum"]) for parameter in parameters]
                # Rows of a tall orthogonal matrix are shorter than 1: without the factor its outputs would change too little.
                rate = group["lr"] * math.sqrt(max(1, rows / columns))
                for parameter, update in zip(parameters, orthogonalize_together(torch.stack(directions)), strict=True):
                    if isinstance(parameter, DTensor):
                        # Without a source rank each process cuts its shard out of its own copy: nothing is communicated.
                        update = distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)
        return loss

    def _direction(self, parameter: nn.Parameter, momentum: float) -> torch.Tensor:
        """Update the momentum; return the Nesterov direction (rows, columns), unsharded on every process."""
        gradient, state = parameter.grad, self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(momentum).add_(gradient)
        direction = gradient + momentum * state["momentum"]
        return direction.full_tensor() if isinstance(direction, DTensor) else direction


def adamw_for_all(parameters: dict[str, nn.Parameter], arguments: OptimizerArguments) -> list[Optimizer]:
    """AdamW for all parameters. Only matrices are decayed: decaying biases and norms regularizes nothing (GPT-2, nanoGPT)."""
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    others = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": arguments.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # GPT-3's betas (Brown et al., 2020): old gradients are forgotten faster than with the default.
    return [AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.95), fused=True)]


def muon_and_adamw(parameters: dict[str, nn.Parameter], arguments: OptimizerArguments) -> list[Optimizer]:
    """Muon, with weight decay, for the matrices of the blocks, and AdamW, without, for all other parameters."""
    hidden = {path: parameter for path, parameter in parameters.items() if "layers." in path and parameter.ndim == 2}
    others = [parameter for path, parameter in parameters.items() if path not in hidden]
    optimizers: list[Optimizer] = []
    if hidden:  # either may be missing when only a head, or only adapters, are trained
        optimizers.append(Muon(hidden.values(), lr=arguments.muon_learning_rate, weight_decay=arguments.weight_decay))
    if others:  # at the high learning rates that keep pace with Muon, AdamW must forget fast (betas of Jordan's modded-nanogpt)
        optimizers.append(AdamW(others, lr=arguments.learning_rate, betas=(0.8, 0.95), weight_decay=0.0, fused=True))
    return optimizers


OPTIMIZERS = {"adamw": adamw_for_all, "muon": muon_and_adamw}


def decayed(step: int, start: int, arguments: OptimizerArguments) -> float:
    """Fraction of the decay from step `start` to the last step that is done, between 0 and 1."""
    return min(max(0.0, (step - start) / max(1, arguments.max_steps - start)), 1.0)


def cosine(step: int, warmup_steps: int, arguments: OptimizerArguments) -> float:
    """Decay along half a cosine, from the end of the warm-up on."""
    return 0.5 * (1 - math.cos(math.pi * decayed(step, warmup_steps, arguments)))


def warmup_stable_decay(step: int, warmup_steps: int, arguments: OptimizerArguments) -> float:
    """Constant, then linear decay over the last `decay_ratio` of the steps (Hu et al., 2024); extensible until it decays."""
    return decayed(step, max(warmup_steps, round((1 - arguments.decay_ratio) * arguments.max_steps)), arguments)


# From the step (from 0) and the number of warm-up steps to the fraction of the decay that is done.
SCHEDULES = {"cosine": cosine, "linear": decayed, "wsd": warmup_stable_decay}


@dataclass
class OptimizerArguments:
    """Arguments of optimizers and schedules."""

    max_steps: int = option(1000, "optimizer steps", minimum=1)
    optimizer: str = option("adamw", "adamw, or muon: Muon for the blocks' matrices, AdamW for the rest", choices=OPTIMIZERS)
    learning_rate: float = option(1e-3, "peak learning rate (AdamW)", above=0)
    muon_learning_rate: float = option(0.02, "peak learning rate (Muon)", above=0)
    weight_decay: float = option(0.1, "weight decay (matrices only)", minimum=0)
    lr_scheduler_type: str = option("cosine", "LR schedule: cosine, linear, or wsd (warmup, stable, decay)", choices=SCHEDULES)
    warmup_ratio: float = option(0.05, "fraction of the steps with linear warmup", minimum=0, maximum=1)
    decay_ratio: float = option(0.2, "fraction of the steps in which wsd decays", minimum=0, maximum=1)
    min_lr_ratio: float = option(0.1, "final learning rate as a fraction of the peak", minimum=0, maximum=1)


def lr_factor(step: int, arguments: OptimizerArguments) -> float:
    """Factor on the peak learning rate at a step (from 0): linear warm-up to 1, then decay to `min_lr_ratio`."""
    warmup_steps = math.ceil(arguments.warmup_ratio * arguments.max_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 1 - (1 - arguments.min_lr_ratio) * SCHEDULES[arguments.lr_scheduler_type](step, warmup_steps, arguments)


def set_learning_rates(optimizers: Iterable[Optimizer], factor: float) -> dict[str, float]:
    """Set all learning rates to this fraction of their peaks; returns them by the names of their options."""
    rates = {}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        rates[group["option"]] = group["lr"] = group["initial_lr"] * factor
    return rates


def build_optimizers(arguments: OptimizerArguments, model: nn.Module) -> list[Optimizer]:
    """The optimizers of a run, for the parameters that require a gradient."""
    parameters = {path: parameter for path, parameter in model.named_parameters() if parameter.requires_grad}
    optimizers = OPTIMIZERS[arguments.optimizer](parameters, arguments)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # the peak, by the name that torch's schedulers use
            group["option"] = "muon_learning_rate" if isinstance(optimizer, Muon) else "learning_rate"
    return optimizers


def muon_initialization(model: PreTrainedModel) -> None:
    """Re-initialize a new language model for training with Muon (Jordan's modded-nanogpt, 2024).

    Projections that write to the residual stream start at zero, so that each block starts as the identity. An untied head
    starts near zero, which gives the loss of uniform predictions; then the embedding can start with standard deviation 1, and
    projections that read from the residual stream such that they keep the scale of their input. With a tied head this did harm,
    so both stay. (Tiny Shakespeare, 220 steps: 1.844 instead of 1.864 untied, 1.890 instead of 1.895 tied.)
    """
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    is_untied = head.weight is not embedding.weight
    for path, module in model.named_modules():
        if "layers." in path and isinstance(module, nn.Linear):
            if hasattr(module, "writes_to_residual"):
                nn.init.zeros_(module.weight)
            elif is_untied:
                bound = math.sqrt(3 / module.in_features)
                nn.init.uniform_(module.weight, -bound, bound)
    if is_untied:
        nn.init.normal_(head.weight, std=0.001)
        nn.init.normal_(embedding.weight, std=1.0)
