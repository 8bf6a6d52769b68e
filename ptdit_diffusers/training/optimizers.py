"""Optimizers by name, for LoRA and full training."""

import difflib
import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

ADAMS = ("adamw", "adamw8bit", "prodigy")
OPTIMIZERS = ("adamw", "adamw8bit", "lion", "lion8bit", "prodigy", "schedule_free_adamw")


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
    arguments: Mapping[str, Any] | None = None,
    factors: Mapping[str, float] | None = None,
) -> list[Optimizer]:
    """Build the optimizer of the parameters, and a second one for the matrices that `muon` names.

    Args:
        parameters: What is trained, by name.
        name: One of OPTIMIZERS, or the full name of a class; "adamw8bit", "lion" and "lion8bit" need bitsandbytes,
            "prodigy" needs prodigyopt, "schedule_free_adamw" schedulefree.
        lr: Learning rate of all optimizers. The steps of Muon are scaled to the size of AdamW's, so one rate serves
            both.
        weight_decay: Of matrices, and of vectors where `decay_vectors` says so.
        betas: Of the two averages of Adam; other optimizers have their own.
        decay_vectors: False gives vectors a group of their own without decay.
        fused: Use torch's fused AdamW, which the CPU and CUDA have.
        muon: Regular expression; matrices with such names are trained by Muon. "" = none.
        round_bf16: Take torchao's "adamw" or "adamw8bit", and round new bf16 weights at random where this is true, so
            that changes below their precision count on average. None = not torchao's.
        arguments: Further ones of the optimizer; they go before those above.
        factors: Name of each parameter -> factor of its learning rate; the loop reads it as `lr_factor` of a group.

    Raises:
        ValueError: `muon` matches no matrix, or torch has no Muon yet; as `optimizer_class`; an argument is unknown.
    """
    if muon and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"muon={muon!r} needs torch 2.9 or newer, this is {torch.__version__}; nearest: ''.")
    matrices = {n: p for n, p in parameters.items() if muon and p.ndim == 2 and re.search(muon, n)}
    if muon and not matrices:
        raise ValueError(f"muon={muon!r} matches no matrix of the model, for example {next(iter(parameters))}.")
    kind, options = optimizer_class(name, round_bf16)
    check_arguments(kind, name, arguments or {})
    options |= {"lr": lr, "weight_decay": weight_decay, **({"betas": betas} if name in ADAMS else {})}
    options |= arguments or {}
    if name == "adamw" and round_bf16 is None:
        on = next(iter(parameters.values())).device.type
        options["fused"] = fused and on in ("cpu", "cuda") or None
    groups: list[dict[str, Any]] = []
    for factor in sorted(set(factors.values())) if factors else [None]:
        rest = [p for n, p in parameters.items() if n not in matrices and (not factors or factors[n] == factor)]
        marked = {} if factor is None else {"lr_factor": factor}
        groups.append({"params": rest, "weight_decay": options["weight_decay"], **marked})
        if not decay_vectors:
            groups[-1]["params"] = [p for p in rest if p.ndim >= 2]
            groups.append({"params": [p for p in rest if p.ndim < 2], **marked, "weight_decay": 0.0})
    optimizers: list[Optimizer] = [kind(groups, **options)]
    if matrices:
        from ptdit_diffusers.training.muon import make_muon

        optimizers.append(make_muon(matrices.values(), lr, weight_decay))
    return optimizers


def optimizer_class(name: str, round_bf16: bool | None = None) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the class of an optimizer, and arguments that it always gets here; see `make_optimizers`.

    Raises:
        ValueError: There is no such class, or it is no optimizer.
    """
    if round_bf16 is not None:
        from torchao.optim import AdamW8bit, _AdamW

        return {"adamw": _AdamW, "adamw8bit": AdamW8bit}[name], {"bf16_stochastic_round": round_bf16}
    if name == "adamw":
        return AdamW, {}
    if name == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy, {"safeguard_warmup": True, "use_bias_correction": True}
    if name == "schedule_free_adamw":
        from schedulefree import AdamWScheduleFree

        return AdamWScheduleFree, {}
    if name in OPTIMIZERS:
        import bitsandbytes.optim

        names = {"adamw8bit": "AdamW8bit", "lion": "Lion", "lion8bit": "Lion8bit"}
        return getattr(bitsandbytes.optim, names[name]), {}
    module, _, last = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"optimizer={name!r} cannot be imported ({error}); nearest: 'adamw'.") from error
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ValueError(f"optimizer={name!r} is no optimizer of torch; nearest: 'adamw'.")
    return kind, {}


def check_arguments(kind: type[Optimizer], name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError where an optimizer has no such argument, or where it is the learning rate."""
    if "lr" in arguments:
        raise ValueError(f"optimizer_args: set lr={arguments['lr']!r} outside of it; the schedule changes that one.")
    known = [each for each in inspect.signature(kind).parameters if each not in ("params", "lr")]
    for argument in arguments:
        if argument not in known:
            near = difflib.get_close_matches(argument, known, n=1, cutoff=0)[0]
            raise ValueError(f"optimizer_args: {argument!r} is no argument of {name}; nearest: {near!r}.")


def schedule_free(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """Return the schedule-free ones: between `train()` and `eval()` the model holds the weights that gradients are
    taken at, after `eval()` their average, which is what to use (Defazio et al., arXiv 2405.15682).
    """
    return [each for each in optimizers if hasattr(each, "eval")]
