"""Loading a model in little memory: the text encoder before the rest, offloaded or quantized if asked.

The prompt is encoded first, and the text encoder, mostly the largest part, is freed before the rest is loaded.
"""

import gc
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ptdit_diffusers.core.small_formats import QUANTIZED_PARTS

from .loras import LoRA, add_loras
from .models import load_pipeline_class
from .terminal import UserError, first_line

if TYPE_CHECKING:
    from .. import PTDiTPipeline

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # our names -> torch's
OFFLOADS = ("model", "group", "sequential")
QUANTIZED = ("int8", "fp8")
TEXT_PARTS = ("tokenizer", "text_encoder")
IMAGE_PARTS = ("transformer", "vae")


class Plan(NamedTuple):
    """Where a model is and how to load it; names as on the command line."""

    folder: Path
    device: str
    dtype: str
    offload: str | None = None
    quantize: str | None = None
    loras: tuple[LoRA, ...] = ()


def check_plan(offload: str | None, quantize: str | None, device: str) -> None:
    """Refuse what cannot work here, before anything is downloaded or loaded."""
    from ptdit_diffusers.core.devices import has_float8

    if offload is not None and device == "cpu":
        raise UserError(
            f"--offload {offload} keeps weights in main memory until the GPU needs them, but this runs on the CPU; "
            "to need less memory here, use --dtype bf16, --quantize int8 or a smaller size"
        )
    if quantize == "fp8" and not has_float8(device):
        raise UserError(f"--quantize fp8: {device} has no float8; use --dtype bf16 or --quantize int8")
    if quantize == "int8" and find_spec("torchao") is None:
        raise UserError("--quantize int8 needs the package torchao: python -m pip install torchao")


def check_parts(folder: Path) -> None:
    """Refuse a model folder whose parts do not fit their weights or each other, before any of them is loaded."""
    load_pipeline_class(folder)  # it silences the libraries
    from ..pipelines.model_folders import check_folder

    try:
        check_folder(folder)
    except (ValueError, OSError) as error:
        raise UserError(f"the model in {folder} cannot be loaded: {first_line(error)}") from error


def encode(plan: Plan, prompt: str, negative_prompt: str, guided: bool) -> dict[str, Any]:
    """Encode the prompt and free the text encoder.

    Args:
        guided: Whether guidance is on, which needs the negative prompt.

    Returns:
        Embeddings and masks by the names of the pipeline's arguments.
    """
    import torch

    pipe = load(plan, without=IMAGE_PARTS)
    with torch.no_grad():
        texts = pipe.encode_prompt(prompt, negative_prompt, guided)
    pipe.remove_all_hooks()  # they hold references to the models
    del pipe
    gc.collect()  # models in a reference cycle would stay while the rest is loaded
    from ..pipelines.ptdit_text import TEXT_TENSORS

    return dict(zip(TEXT_TENSORS, texts, strict=True))


def load_rest(plan: Plan) -> "PTDiTPipeline":
    """Load the pipeline without its text encoder and tokenizer."""
    return load(plan, without=TEXT_PARTS)


def load(plan: Plan, without: tuple[str, ...] = ()) -> "PTDiTPipeline":
    """Load a pipeline without some of its components and put it where it runs.

    Raises:
        UserError: The model cannot be loaded, or not in this way.
    """
    pipeline_class = load_pipeline_class(plan.folder)  # first: it silences the libraries
    import torch

    from ..conversion.quantize import int8_on_load, load_in_fp8

    options: dict[str, Any] = dict.fromkeys(without)
    dtype = getattr(torch, DTYPES[plan.dtype])
    try:
        if plan.quantize == "int8":
            options["quantization_config"] = int8_on_load()
        elif plan.quantize == "fp8":
            present = [name for name in QUANTIZED_PARTS if name not in without and (plan.folder / name).is_dir()]
            options |= {name: load_in_fp8(plan.folder, name, dtype) for name in present}
        pipe = pipeline_class.from_pretrained(plan.folder, dtype=dtype, use_safetensors=True, **options)
        add_loras(pipe, plan.loras, "text_encoder" not in without, "transformer" not in without)
        return place(pipe, plan.device, plan.offload)
    except Exception as error:  # a damaged folder fails in many ways; all mean that there is no model to run
        raise UserError(
            f"the model in {plan.folder} cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error


def place(pipe: "PTDiTPipeline", device: str, offload: str | None) -> "PTDiTPipeline":
    """Put a pipeline on a device, or leave its weights in main memory until they are needed there.

    Args:
        offload: None, "model" (one component at a time), "group" (one layer at a time, the next one copied ahead) or
            "sequential" (one layer at a time).
    """
    import torch

    if offload is None:
        return pipe.to(device)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        ahead = device == "cuda"  # only there a copy can run during the computation
        pipe.enable_group_offload(torch.device(device), offload_type="leaf_level", use_stream=ahead)
    else:
        pipe.enable_sequential_cpu_offload(device=device)
    return pipe
