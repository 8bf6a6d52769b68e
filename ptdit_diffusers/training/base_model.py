"""The model that a run starts from: its folder, its parts one at a time, and fingerprints that tell models apart."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from ptdit_diffusers.conversion.quantize import KEPT, int8_config, store_in_fp8
from ptdit_diffusers.core.devices import computes_bf16
from ptdit_diffusers.core.embedded import resolve_model
from ptdit_diffusers.core.sampling import time_shift
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline

logger = logging.getLogger(__name__)

SAMPLE_BYTES, STRIDE = 4096, 2**20  # of large files, so much is read in every mebibyte
PART_FILES = re.compile(r".*\.(json|safetensors|bin|model|txt)")


class BaseModel:
    """A model folder whose parts are loaded one at a time, when they are needed."""

    def __init__(self, name: str, parts: Mapping[str, Path] | None = None) -> None:
        """Find the folder; download a Hub id (owner/name).

        Args:
            name: Folder, Hub id or short name.
            parts: Folders of parts that stand elsewhere, by name.

        Raises:
            ValueError: There is no such model.
        """
        folder = Path(resolve_model(name))
        if not folder.is_dir():
            folder = from_hub("base", str(folder), "model")
        if not (folder / "transformer" / "config.json").is_file():
            raise ValueError(f"base {name!r} is not a model folder: transformer/config.json is missing in {folder}.")
        self.name, self.folder, self.parts = name, folder, dict(parts or {})
        self._fingerprints: dict[tuple[str, ...], str] = {}
        self.transformer_config = self.config("transformer")
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")

    def part(self, name: str) -> Path:
        """Return the folder of a part."""
        return self.parts.get(name, self.folder / name)

    def config(self, part: str) -> dict[str, Any]:
        """Return the configuration of a part."""
        return json.loads((self.part(part) / "config.json").read_text(encoding="utf-8"))

    @property
    def window_pixels(self) -> int:
        """Side of one trained window in pixels: 8 (of the VAE) times patch times window."""
        return 8 * self.transformer_config["patch_size"] * max(self.transformer_config["window_size"][1:])

    @property
    def own_resolution(self) -> int:
        """Side in pixels at which the trained windows fit exactly."""
        return self.window_pixels * max(1, round(self.transformer_config["num_windows"] ** 0.5))

    @property
    def scaling_factor(self) -> float:
        """Factor by which latents are multiplied before they enter the transformer."""
        return self.config("vae")["scaling_factor"]

    def load_transformer(self, dtype: torch.dtype, kept_as: str, device: torch.device) -> PTDiTTransformer3DModel:
        """Load the frozen transformer to its device; `kept_as`: "none", "fp8", "int8" or "nf4"."""
        options = {"quantization_config": int8_config("transformer")} if kept_as == "int8" else {}
        transformer = PTDiTTransformer3DModel.from_pretrained(
            self.folder, subfolder="transformer", dtype=dtype, **options
        ).requires_grad_(False)
        if kept_as == "nf4":
            store_in_nf4(transformer, dtype)
        transformer.to(device)
        if kept_as == "fp8":
            store_in_fp8(transformer, dtype)
        return transformer

    def load_vae(self, dtype: torch.dtype, device: torch.device) -> AutoencoderKLOpenSoraPlan:
        """Load the VAE, frozen."""
        vae = AutoencoderKLOpenSoraPlan.from_pretrained(self.part("vae"), dtype=dtype)
        return vae.eval().requires_grad_(False).to(device)

    def load_text_pipeline(self, dtype: torch.dtype, device: torch.device) -> PTDiTPipeline:
        """Load a pipeline that can only encode prompts."""
        own: dict[str, Any] = {}
        if "tokenizer" in self.parts:
            own["tokenizer"] = self.load_tokenizer()
        if "text_encoder" in self.parts:
            own["text_encoder"] = T5EncoderModel.from_pretrained(self.parts["text_encoder"], dtype=dtype)
        pipe = PTDiTPipeline.from_pretrained(self.folder, transformer=None, vae=None, dtype=dtype, **own)
        return pipe.to(device)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the text encoder."""
        return AutoTokenizer.from_pretrained(self.part("tokenizer"))

    def load_text_encoder(self, device: torch.device) -> T5EncoderModel:
        """Load the text encoder in float32, frozen, without dropout."""
        folder, options = self.part("text_encoder"), {"dtype": torch.float32, "dropout_rate": 0.0}
        return T5EncoderModel.from_pretrained(folder, **options).eval().requires_grad_(False).to(device)

    def empty_text_encoder(self) -> T5EncoderModel:
        """Return the text encoder without weights, on the meta device.

        Raises:
            ValueError: The model has none.
        """
        folder = self.part("text_encoder")
        if not (folder / "config.json").is_file():
            raise ValueError(f"base {self.name!r} has no text encoder: {folder / 'config.json'} is missing.")
        with torch.device("meta"):
            return T5EncoderModel(T5Config.from_pretrained(folder))

    def time_ratio(self, bucket: tuple[int, int, int]) -> float:
        """Return the shift of the times towards noise for a size (frames, height, width), which is the sampler's."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return config.shift
        frames, height, width = bucket
        cell = 8 * self.transformer_config["patch_size"]
        return time_shift((height // cell) * (width // cell), config.base_image_seq_len, frames)

    def fingerprint(self, *parts: str) -> str:
        """Return sixteen digits that change with the configuration or weights of these parts of the model.

        Of large files, a sample of every mebibyte is read: any matrix of at least a mebibyte that changes is seen.
        """
        if parts in self._fingerprints:
            return self._fingerprints[parts]
        digest = hashlib.sha256()
        for path in (path for part in parts for path in sorted(self.part(part).glob("*"))):
            if not PART_FILES.fullmatch(path.name) or not path.is_file():
                continue  # what the system or a download put there
            size = path.stat().st_size
            digest.update(f"{path.parent.name}/{path.name} {size}".encode())
            with open(path, "rb") as file:
                if size <= STRIDE:
                    digest.update(file.read())
                else:
                    for place in (*range(0, size - SAMPLE_BYTES, STRIDE), size - SAMPLE_BYTES):
                        file.seek(place)
                        digest.update(file.read(SAMPLE_BYTES))
        self._fingerprints[parts] = digest.hexdigest()[:16]
        return self._fingerprints[parts]


def from_hub(setting: str, name: str, kind: str) -> Path:
    """Download a repository of the Hub and return its folder; `kind` is "model" or "dataset".

    Raises:
        ValueError: That failed.
    """
    try:
        return Path(snapshot_download(name, repo_type=kind))
    except Exception as error:  # of many kinds: no network, no such repository, no access
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{setting} {name!r} is no folder and cannot be had from the Hub: {reason}") from error


def store_in_nf4(transformer: PTDiTTransformer3DModel, compute_dtype: torch.dtype) -> None:
    """Replace the linear layers by those of bitsandbytes, whose weights become nf4 when they move to a device.

    diffusers' own loading does the same, but refuses on a machine without a GPU.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in list(transformer.named_modules()):
        if type(layer) is not nn.Linear or any(part in name for part in KEPT["transformer"]):
            continue
        small = Linear4bit(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype,
            quant_type="nf4",
            device="meta",
        )
        small.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=small)
        small.bias = layer.bias
        transformer.set_submodule(name, small)
    transformer.is_loaded_in_4bit = True  # peft reads this


def gpu_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 on a GPU of CUDA that computes in it, else float32."""
    return torch.bfloat16 if device.type == "cuda" and computes_bf16(device) else torch.float32


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the type that the frozen weights are computed in.

    Raises:
        ValueError: fp16 on a CPU, which cannot train in it.
    """
    if precision == "auto":
        return gpu_dtype(device)
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision='fp16' does not train on a CPU; nearest: 'bf16'.")
    if precision == "bf16" and device.type == "cuda" and not computes_bf16(device):
        logger.warning("this GPU only emulates bf16, which is slow; precision fp16 or fp32 is faster")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
