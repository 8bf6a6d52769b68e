"""The base model of a run: where it lies, its parts one at a time, and how to tell one from another.

Must not know data or training.
"""

import gc
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, FlowMatchEulerDiscreteScheduler
from huggingface_hub import snapshot_download

from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.pipelines.ptdit_embedded import resolve_model

SAMPLES, SAMPLE_BYTES = 64, 65536


class BaseModel:
    """A model folder whose parts are loaded only when they are asked for."""

    def __init__(self, name: str) -> None:
        """Find the folder; a Hub id (owner/name) is downloaded.

        Raises:
            ValueError: There is no such model.
        """
        folder = Path(resolve_model(name))
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(str(folder)))
            except Exception as error:  # of many kinds: no network, no such repository, no access
                reason = str(error).strip().splitlines()[0]
                raise ValueError(f"base {name!r} is no folder and cannot be had from the Hub: {reason}") from error
        if not (folder / "transformer" / "config.json").is_file():
            raise ValueError(f"base {name!r} is not a model folder: transformer/config.json is missing in {folder}.")
        self.name, self.folder = name, folder
        self.transformer_config = self._config("transformer")
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")

    def _config(self, part: str) -> dict[str, Any]:
        return json.loads((self.folder / part / "config.json").read_text(encoding="utf-8"))

    @property
    def window_pixels(self) -> int:
        """Side of one trained window in pixels: latent pixels of the VAE times patch times window."""
        return 8 * self.transformer_config["patch_size"] * max(self.transformer_config["window_size"][1:])

    @property
    def own_resolution(self) -> int:
        """Side in pixels at which the trained windows fit exactly."""
        return self.window_pixels * max(1, round(self.transformer_config["num_windows"] ** 0.5))

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied by before the transformer sees them."""
        return self._config("vae")["scaling_factor"]

    def load_transformer(self, dtype: torch.dtype, kept_as: str, device: torch.device) -> PTDiTTransformer3DModel:
        """The frozen transformer on its device; `kept_as` is one of config.BASES."""
        options: dict[str, Any] = {"subfolder": "transformer", "dtype": dtype}
        if kept_as in ("int8", "nf4"):
            options |= {"quantization_config": _bitsandbytes(kept_as, dtype), "device_map": {"": device}}
        transformer = PTDiTTransformer3DModel.from_pretrained(self.folder, **options).requires_grad_(False)
        if kept_as not in ("int8", "nf4"):
            transformer.to(device)
        if kept_as == "fp8":
            transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        return transformer

    def load_vae(self, dtype: torch.dtype, device: torch.device) -> AutoencoderKLOpenSoraPlan:
        """The VAE, frozen."""
        vae = AutoencoderKLOpenSoraPlan.from_pretrained(self.folder, subfolder="vae", dtype=dtype)
        return vae.eval().requires_grad_(False).to(device)

    def load_text_pipeline(self, dtype: torch.dtype, device: torch.device) -> PTDiTPipeline:
        """A pipeline that can only encode prompts."""
        return PTDiTPipeline.from_pretrained(self.folder, transformer=None, vae=None, dtype=dtype).to(device)

    def fingerprint(self, part: str) -> str:
        """Sixteen digits that change with a part's configuration or weights.

        Of large weight files, the name, the size, and 64 samples of 64 KiB spread over the file are looked at.
        """
        digest = hashlib.sha256()
        for path in sorted(p for p in (self.folder / part).rglob("*") if p.is_file()):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                for index in range(SAMPLES if size > SAMPLES * SAMPLE_BYTES else 1):
                    file.seek(size * index // SAMPLES)
                    digest.update(file.read(SAMPLE_BYTES if size > SAMPLES * SAMPLE_BYTES else size))
        return digest.hexdigest()[:16]


def _bitsandbytes(kept_as: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if kept_as == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def check_base_weights(kept_as: str, device: torch.device) -> None:
    """Raise ValueError where a way of keeping the frozen weights needs a GPU or a library that is not there."""
    if kept_as not in ("int8", "nf4"):
        return
    if device.type == "cpu":
        raise ValueError(f"base_weights={kept_as!r} needs a GPU (bitsandbytes); nearest: 'fp8'.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"base_weights={kept_as!r} needs bitsandbytes: pip install bitsandbytes; nearest: 'fp8'.")


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type that the frozen weights are computed in.

    Raises:
        ValueError: fp16 on a CPU, which cannot train in it.
    """
    if precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision='fp16' does not train on a CPU; nearest: 'bf16'.")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def free_memory() -> None:
    """Give back what parts that are no longer used held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
