"""Optimizers by name, for LoRA and full training."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")


def make_optimizers(
    parameters: Mapping[str, nn.Parameter],
    name: str = "adamw",
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    decay_vectors: bool = True,
    fused: bool = False,
    muon: str = "",
    round_bf16: bool | None = None,
) -> list[Optimizer]:
    """Build the optimizer of the parameters, and a second one for the matrices that `muon` names.

    Args:
        parameters: What is trained, by name.
        name: One of OPTIMIZERS; "adamw8bit" needs bitsandbytes, "prodigy" needs prodigyopt.
        lr: Learning rate of all optimizers. The steps of Muon are scaled to the size of AdamW's, so one rate serves
            both.
        weight_decay: Of matrices, and of vectors where `decay_vectors` says so.
        betas: Of the two averages of Adam.
        decay_vectors: False gives vectors a group of their own without decay.
        fused: Use torch's fused AdamW, which the CPU and CUDA have.
        muon: Regular expression; matrices with such names are trained by Muon. "" = none.
        round_bf16: Take torchao's "adamw" or "adamw8bit", and round new bf16 weights at random where this is true, so
            that changes below their precision count on average. None = not torchao's.

    Raises:
        ValueError: `muon` matches no matrix, or torch has no Muon yet.
    """
    if muon and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"muon={muon!r} needs torch 2.9 or newer, this is {torch.__version__}; nearest: ''.")
    matrices = {n: p for n, p in parameters.items() if muon and p.ndim == 2 and re.search(muon, n)}
    if muon and not matrices:
        raise ValueError(f"muon={muon!r} matches no matrix of the model, for example {next(iter(parameters))}.")
    rest = [parameter for name, parameter in parameters.items() if name not in matrices]
    groups: list[dict[str, Any]] = [{"params": rest, "weight_decay": weight_decay}]
    if not decay_vectors:
        groups[0]["params"] = [p for p in rest if p.ndim >= 2]
        groups.append({"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0})
    options = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
    if round_bf16 is not None:
        from torchao.optim import AdamW8bit, _AdamW

        kind = {"adamw": _AdamW, "adamw8bit": AdamW8bit}[name]
        optimizers: list[Optimizer] = [kind(groups, bf16_stochastic_round=round_bf16, **options)]
    elif name == "adamw":
        fused = fused and rest[0].device.type in ("cpu", "cuda")
        optimizers = [AdamW(groups, fused=fused or None, **options)]
    elif name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizers = [AdamW8bit(groups, **options)]
    else:
        from prodigyopt import Prodigy

        optimizers = [Prodigy(groups, safeguard_warmup=True, use_bias_correction=True, **options)]
    if matrices:
        from ptdit_diffusers.training.muon import make_muon

        optimizers.append(make_muon(matrices.values(), lr, weight_decay))
    return optimizers
