"""Samples of a model: prompts in batches, each sample from a seed of its own."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptdit_diffusers import ClassToImagePipeline, DiffiTImagePipeline, PTDiTPipeline
from ptdit_diffusers.core.embedded import resolve_model


def load_pipeline(
    model: str | Path, device: str | None = "cpu", **options: Any
) -> PTDiTPipeline | ClassToImagePipeline | DiffiTImagePipeline:
    """Load a model of prompts or of classes without progress bars.

    Args:
        model: Folder or short name.
        device: Of torch; None takes CUDA where there is one.
        options: Further arguments of `from_pretrained`.
    """
    name = PTDiTPipeline.load_config(resolve_model(model))["_class_name"]
    kind = {each.__name__: each for each in (ClassToImagePipeline, DiffiTImagePipeline)}.get(name, PTDiTPipeline)
    pipe = kind.from_pretrained(model, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def generate(
    pipe: Callable[..., Any], prompts: Sequence[str], seed: int = 0, batch: int | None = None, **arguments: Any
) -> Iterator[np.ndarray | Tensor]:
    """Yield the sample of each prompt; sample i depends on its prompt and on seed + i only.

    Args:
        pipe: A pipeline, or a function with the same arguments that returns the samples themselves.
        prompts: What to generate; of a model of classes, their names.
        seed: Of the first sample.
        batch: Samples at a time; None takes all at once.
        arguments: Further arguments of the call; `output_type` is "np" unless given: values 0 to 1, (H, W, 3) for a
            picture, (F, H, W, 3) for a clip or views.
    """
    batch = batch or len(prompts)
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        generators = [torch.Generator("cpu").manual_seed(seed + start + index) for index in range(len(part))]
        made = pipe(part, generator=generators, **{"output_type": "np", **arguments})
        if hasattr(made, "images"):
            kinds = (getattr(made, name, None) for name in ("views", "frames", "images"))
            made = next(samples for samples in kinds if samples is not None)
        yield from made
        if batch < len(prompts):
            sys.stderr.write(f"{start + len(part)} of {len(prompts)} samples\n")


def to_bytes(sample: np.ndarray) -> np.ndarray:
    """Return values 0 to 1 as bytes, rounded as diffusers rounds them."""
    return (sample * 255).round().astype(np.uint8)
