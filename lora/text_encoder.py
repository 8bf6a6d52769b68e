"""The text encoder that is trained together with the transformer: which one may be, its layers, its embeddings."""

import re

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ptdit_diffusers.training.base_model import BaseModel

LARGEST = 150 * 10**6  # parameters: a T5 of size "base" is smaller, "large" is not, the official one has 4.7 billion
TARGETS = {  # preset -> regular expression that the whole name of a Linear layer must match; other targets: attention
    "attention": r".*SelfAttention\.[qkvo]",
    "attention+ff": r".*SelfAttention\.[qkvo]|.*DenseReluDense\.w[io](_\d)?",
    "all-linear": r".*",
}


def checked_text_encoder(base: BaseModel, accelerator: Accelerator) -> nn.Module:
    """Return the text encoder of a base model without weights, after checking that it can be trained here.

    Raises:
        ValueError: There is none, it is large, or processes share the weights.
    """
    encoder = base.empty_text_encoder()
    if (size := sum(parameter.numel() for parameter in encoder.parameters())) > LARGEST:
        raise ValueError(
            f"train_text_encoder: the text encoder of base {base.name!r} has {size // 10**6} M parameters, more than "
            f"{LARGEST // 10**6} M, and stays frozen; nearest: train_text_encoder=False."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("train_text_encoder was not made for FSDP2; nearest: several processes without it (DDP).")
    return encoder


def text_layers(encoder: nn.Module, targets: str) -> list[str]:
    """Return the names of the linear layers of a T5 that get an adapter; `targets` as in the settings."""
    pattern = re.compile(TARGETS.get(targets, TARGETS["attention"]))
    linear = (name for name, module in encoder.named_modules() if isinstance(module, nn.Linear))
    return [name for name in linear if pattern.fullmatch(name)]


def embed(encoder: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the embeddings (B, L, D), float32, of token ids (B, L); mask (B, L), None where all tokens count."""
    with torch.autocast(ids.device.type, enabled=False):  # it is small, and T5 can overflow in fp16
        return encoder(ids, attention_mask=None if mask is None else mask.long())[0]
