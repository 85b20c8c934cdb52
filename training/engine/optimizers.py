"""The optimizers and their schedule.

Notable:
- Muon turns the update of each hidden matrix into its nearest orthogonal matrix, so that every direction is learned at the
  same rate; what is no hidden matrix (embeddings, head, norms, biases) stays with AdamW.
- Matrices of one shape are orthogonalised in one batched product, in the precision that the device is fast in.
- Under FSDP2 momentum stays sharded; only the matrix to be orthogonalised is gathered, and each process keeps its shard.
- A schedule is one function of the step.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "wsd")


def matmul_dtype(device: torch.device) -> torch.dtype:
    """What matrix products are fast in: bfloat16 where the hardware has it. A CPU without is 100 times slower in it than in
    float32; one with it takes a quarter of the time."""
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        has_bfloat16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if has_bfloat16 else torch.float32


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Matrices (N, rows, columns) with their singular vectors as they are, and their singular values moved close to 1.

    Each step of the Newton-Schulz iteration maps every singular value s to a s + b s^3 + c s^5. The coefficients are
    Jordan's (https://kellerjordan.github.io/posts/muon, 2024): they lift small values the fastest, and land between 0.7 and
    1.2 instead of at 1, which does as well.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices  # the products with itself below are then the small ones
    # The Frobenius norm bounds the largest singular value, and up to 1 the iteration converges.
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(matmul_dtype(x.device))
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """
    Momentum, orthogonalised, for matrices (Jordan et al., 2024).

    Args:
        parameters: matrices, or groups of them.
        lr: how long a step is: about the change of the weights' spectral norm.
        weight_decay: share of the weights, times `lr`, that each step takes away.
        momentum: share of the old momentum that stays; the step looks ahead by as much (Nesterov).
    """

    def __init__(self, parameters: Iterable, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> float | None:  # type: ignore[override]
        """Change the parameters that have a gradient; all processes of a sharded model take part."""
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
                # An orthogonal tall matrix has rows shorter than 1: without the factor its outputs would change too little.
                rate = group["lr"] * math.sqrt(max(1, rows / columns))
                for parameter, update in zip(parameters, orthogonalize(torch.stack(directions)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(sharded_like(parameter, update), alpha=rate)
        return loss

    def _direction(self, parameter: nn.Parameter, momentum: float) -> torch.Tensor:
        """Where momentum leads (rows, columns), whole on every process."""
        gradient, state = parameter.grad, self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(momentum).add_(gradient)
        direction = gradient + momentum * state["momentum"]
        return direction.full_tensor() if isinstance(direction, DTensor) else direction


def sharded_like(parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that every process has, or all of it where the parameter is not sharded."""
    if not isinstance(parameter, DTensor):
        return whole
    # With no source each process cuts its part out of its own copy, and nothing is sent.
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def make_optimizers(
    model: nn.Module, name: str, learning_rate: float, muon_learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """`"adamw"`: AdamW for everything. `"muon"`: Muon for the matrices of the blocks, and AdamW for the rest.

    Args:
        model: parameters that need no gradient are left out.
        learning_rate: AdamW's.
        muon_learning_rate: Muon's, if the name is `"muon"`.
        weight_decay: of matrices; with Muon, of its own alone. Biases and norms are not decayed: pulling them to zero
            regularises nothing (GPT-2's and nanoGPT's practice).
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}.")
    named = [(path, parameter) for path, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    if name == "adamw":
        groups = [
            {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
            {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
        ]
        # These betas forget old gradients faster than the default, as GPT-3's do (Brown et al., 2020).
        return [torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)]
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for path, parameter in named:
        (hidden if "layers." in path and parameter.ndim == 2 else rest).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []  # a head, or adapters, may be all there is to train
    if hidden:
        optimizers.append(Muon(hidden, lr=muon_learning_rate, weight_decay=weight_decay))
    if rest:  # AdamW keeps pace with Muon at high rates; there it has to forget fast (Jordan's betas in modded-nanogpt)
        optimizers.append(torch.optim.AdamW(rest, lr=learning_rate, betas=(0.8, 0.95), weight_decay=0.0, fused=True))
    return optimizers


def muon_initialization(model: PreTrainedModel) -> None:
    """Start a fresh language model where Muon gains the most from its first steps (Jordan's modded-nanogpt, 2024).

    What writes to the residual stream starts at zero: each block is the identity until it has something to say. A head of its
    own starts near zero, at the loss of chance; then the embedding can start at 1, and what reads from the stream so that it
    keeps its input's size. With a tied head that did harm, so there both stay as they are. (Tiny Shakespeare after 220 steps:
    1.844 instead of 1.864 with a head of its own, 1.890 instead of 1.895 tied.)
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    has_own_head = isinstance(head, nn.Linear) and head.weight is not embedding.weight
    for path, module in model.named_modules():
        if "layers." in path and isinstance(module, nn.Linear):
            if hasattr(module, "writes_to_residual"):
                nn.init.zeros_(module.weight)
            elif has_own_head:
                bound = math.sqrt(3 / module.in_features)
                nn.init.uniform_(module.weight, -bound, bound)
    if isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding) and has_own_head:
        nn.init.normal_(head.weight, std=0.001)
        nn.init.normal_(embedding.weight, std=1.0)


def schedule_factor(step: int, kind: str, warmup_steps: int, max_steps: int, min_lr_ratio: float, decay_ratio: float) -> float:
    """What the highest rate is multiplied by at a step (from 0): up to 1 in a line, then down to `min_lr_ratio`.

    Args:
        kind: `"cosine"` and `"linear"` fall from the warm-up on; `"wsd"` (warm-up, stable, decay: Hu et al., 2024) stays and
            falls in a line over the last `decay_ratio` of the steps, so that a run can be made longer before it falls.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    start = max(warmup_steps, round((1 - decay_ratio) * max_steps)) if kind == "wsd" else warmup_steps
    progress = min(max(0.0, (step - start) / max(1, max_steps - start)), 1.0)
    fall = 0.5 * (1 - math.cos(math.pi * progress)) if kind == "cosine" else progress
    return 1 - (1 - min_lr_ratio) * fall


def make_schedules(
    optimizers: list[torch.optim.Optimizer],
    kind: str,
    warmup_steps: int,
    max_steps: int,
    min_lr_ratio: float,
    decay_ratio: float,
) -> list[LambdaLR]:
    """`schedule_factor` for each optimizer, whose rates now are the highest ones."""
    if kind not in SCHEDULES:
        raise ValueError(f"unknown schedule {kind!r}: choose one of {', '.join(SCHEDULES)}.")
    factor = partial(
        schedule_factor,
        kind=kind,
        warmup_steps=warmup_steps,
        max_steps=max_steps,
        min_lr_ratio=min_lr_ratio,
        decay_ratio=decay_ratio,
    )
    return [LambdaLR(optimizer, factor) for optimizer in optimizers]


def build_optimizers(arguments, model):  # TEMPORARY, replaced by the merge
    optimizers = make_optimizers(
        model, arguments.optimizer, arguments.learning_rate, arguments.muon_learning_rate, arguments.weight_decay
    )
    schedules = make_schedules(
        optimizers,
        arguments.lr_scheduler_type,
        math.ceil(arguments.warmup_ratio * arguments.max_steps),
        arguments.max_steps,
        arguments.min_lr_ratio,
        arguments.decay_ratio,
    )
    return optimizers, schedules
