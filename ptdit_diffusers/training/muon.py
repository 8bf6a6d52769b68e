"""Muon (arXiv 2502.16982) for matrices. Needs torch 2.9, so it is imported where it is used."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Muon

from ptdit_diffusers.core.devices import computes_bf16


def make_muon(matrices: Iterable[nn.Parameter], lr: float, weight_decay: float) -> Muon:
    """Build Muon with steps of the size of AdamW's, so that one learning rate serves both."""
    matrices = list(matrices)
    kind = Muon if computes_bf16(matrices[0].device) else Float32Muon
    return kind(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


class Float32Muon(Muon):
    """Muon that orthogonalizes in float32, for devices without bfloat16 products.

    torch's class always casts to bfloat16, so its step is written out here. Options and state are torch's.
    """

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """Make one step with Nesterov momentum and decoupled weight decay; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for matrix in (p for p in group["params"] if p.grad is not None):
                average = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix.grad))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalized(
                    matrix.grad.lerp(average, group["momentum"]),
                    group["ns_coefficients"],
                    group["ns_steps"],
                    group["eps"],
                )
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * (0.2 * math.sqrt(max(matrix.shape))))
        return loss


def orthogonalized(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return a matrix (rows, columns) with its singular values brought near 1, by Newton-Schulz iterations.

    X <- (a I + b G + c G G) X with G = X X^T. These factors commute with G, so all but the last product are of the
    small square matrices alone.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    result = matrix.T if tall else matrix
    result = result / result.norm().clamp(min=eps)
    gram, product = result @ result.T, None
    for number in range(steps):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if number + 1 < steps:
            gram = factor @ gram @ factor
    result = result if product is None else product @ result
    return result.T if tall else result
