"""The LoRAs of a command: files checked before anything is loaded, and put into the parts of a pipeline."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ptdit_diffusers.core.documents import read_header
from ptdit_diffusers.core.few_steps import LORA_FILE, read_distillation

from .terminal import UserError, first_line

TEXT_PARTS = (
    "text_encoder.",
    "text_encoders.",
    "lora_te",
)  # beginnings of the names of weights, in all forms of files


class LoRA(NamedTuple):
    """A file and how it is used."""

    file: Path
    scale: float
    name: str  # of the adapter in the pipeline
    has_text: bool = False  # whether it has weights for the text encoder
    steps: int | None = None  # for which it was distilled, without guidance; None: an ordinary LoRA


def find_loras(names: Sequence[str], scales: Sequence[float]) -> tuple[LoRA, ...]:
    """Return the LoRAs of `--lora` and `--lora-scale`, without loading weights.

    Args:
        names: Files of safetensors, or folders that `ptdit lora` wrote.
        scales: One for each, or none at all.

    Raises:
        UserError: A file is missing, damaged or no LoRA, or there are not as many scales as LoRAs.
    """
    if scales and len(scales) != len(names):
        raise UserError(
            f"{len(scales)} --lora-scale for {len(names)} --lora; give one for each, in the same order, or none"
        )
    return tuple(
        read_lora(lora_file(name), scale, f"lora_{number}")
        for number, (name, scale) in enumerate(zip(names, scales or [1.0] * len(names), strict=True))
    )


def lora_file(name: str) -> Path:
    """Return the file of a LoRA that is named by itself or by its folder."""
    path = Path(name)
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        what = f"has no {LORA_FILE}" if path.is_dir() else "is not there"
        raise UserError(f"--lora {name} {what}; give a .safetensors file, or a folder that ptdit lora wrote")
    if file.suffix != ".safetensors":
        raise UserError(f"--lora {name} is no .safetensors file; other files can hold programs, and are not opened")
    return file


def read_lora(file: Path, scale: float, name: str) -> LoRA:
    """Return what the header of a file says of its LoRA."""
    try:
        keys = [key for key in read_header(file) if key != "__metadata__"]
        student = read_distillation(file)
    except (ValueError, OSError) as error:
        raise UserError(f"the LoRA {file} cannot be read: {first_line(error)}") from error
    if not any("lora" in key.lower() for key in keys):
        raise UserError(f"{file} is no LoRA; its first weights are {', '.join(sorted(keys)[:3]) or 'none'}")
    return LoRA(file, scale, name, any(key.startswith(TEXT_PARTS) for key in keys), student and student["steps"])


def add_loras(pipe: Any, loras: Sequence[LoRA], text: bool, network: bool) -> None:
    """Put LoRAs into a pipeline that may lack its text encoder or its network, and switch them all on.

    Args:
        pipe: The pipeline.
        loras: From `find_loras`.
        text: Whether the pipeline has its text encoder.
        network: Whether it has its transformer.

    Raises:
        ValueError: A LoRA is for another model.
    """
    used = [each for each in loras if network or (text and each.has_text)]
    for each in used:
        with warnings.catch_warnings():  # the pipeline's other half is loaded later, or was before
            if not (text and network):
                warnings.filterwarnings("ignore", message=".*which this pipeline does not have")
            pipe.load_lora_weights(each.file.parent, weight_name=each.file.name, adapter_name=each.name)
    if used:
        pipe.set_adapters([each.name for each in used], [each.scale for each in used])
