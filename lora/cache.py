"""Latents and embeddings on disk: safetensors files under the hash of what they were made from, and a manifest.

A file that changes gets another hash, so nothing stale is read; a cache of another VAE or text encoder is refused.
Training reads only this and constructs neither the VAE nor the text encoder.

The stages of the embedded models have a reader of their own, `scripts.embedded_models.latents`: their samples are
functions of a seed, fit into memory, and get new captions each time, so they need neither hashes nor single reads nor
embeddings. Pixels and writing files are common to both (`ptdit_diffusers.training.latents`).
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import free_memory
from PIL import ImageOps
from safetensors import safe_open
from torch import Tensor

from ptdit_diffusers.core.files import file_hash, replace_json
from ptdit_diffusers.training.latents import to_pixels, write_tensors

from .base import BaseModel, gpu_dtype
from .dataset import Item
from .media import fit, read_frames

logger = logging.getLogger(__name__)

SHARD = 128  # entries per file


@dataclass(frozen=True)
class Sample:
    """One item as training reads it: keys of its latents and its text, and its size."""

    latents: str  # key
    mirrored: str  # key of the mirrored copy, "" = none
    text: str  # key
    bucket: tuple[int, int, int]
    prior: bool


class Cache:
    """The folder of a cache. `get` reads single entries, so every process reads only what it trains on."""

    def __init__(self, folder: Path, base: BaseModel, rebuild: bool = False) -> None:
        """Open the folder, or begin a new one.

        Raises:
            ValueError: It was made by another VAE or text encoder, and `rebuild` is false.
        """
        self.folder, self.path, self.base = folder, folder / "manifest.json", base
        self.files: dict[str, Any] = {}
        made_by = {
            "format": 1,
            "vae": base.fingerprint("vae"),
            "text_encoder": base.fingerprint("text_encoder") + base.fingerprint("tokenizer"),
        }
        self.manifest: dict[str, Any] = {**made_by, "entries": {}, "samples": []}
        if self.path.is_file():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            other = [name for name, value in made_by.items() if found.get(name) != value]
            if not other:
                self.manifest = found
            elif not rebuild:
                raise ValueError(
                    f"the cache {folder} was made by another {' and '.join(other)} than that of base {base.name!r}; "
                    "give another cache_dir, or replace it with --rebuild-cache."
                )
            else:
                logger.info("replacing the cache of another %s", " and ".join(other))
                for shard in set(found["entries"].values()):
                    (folder / shard).unlink(missing_ok=True)

    def lacks(self, keys: list[str]) -> list[str]:
        """Return the keys that are not in the cache, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self.manifest["entries"]]

    def write(self, name: str, entries: Iterator[tuple[str, dict[str, Tensor]]]) -> None:
        """Add entries (key, tensors) in files; each file is complete before the manifest names it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        shard: dict[str, dict[str, Tensor]] = {}
        for key, tensors in entries:
            shard[key] = tensors
            if len(shard) == SHARD:
                self._write_shard(name, shard)
                shard = {}
        if shard:
            self._write_shard(name, shard)

    def _write_shard(self, name: str, shard: dict[str, dict[str, Tensor]]) -> None:
        number = len(list(self.folder.glob(f"{name}-*.safetensors")))
        while (self.folder / f"{name}-{number:05d}.safetensors").exists():
            number += 1
        target = self.folder / f"{name}-{number:05d}.safetensors"
        write_tensors(target, {f"{key}.{part}": t for key, tensors in shard.items() for part, t in tensors.items()})
        self.manifest["entries"] |= {key: target.name for key in shard}
        replace_json(self.path, self.manifest)

    def get(self, key: str, part: str) -> Tensor:
        """Return one tensor of one entry, on the CPU."""
        name = self.manifest["entries"][key]
        if name not in self.files:
            self.files[name] = safe_open(self.folder / name, framework="pt")
        return self.files[name].get_tensor(f"{key}.{part}")

    def text(self, caption: str) -> Tensor:
        """Return the embedding (L, D) of a caption in the cache."""
        return self.get(text_key(caption), "embeds")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}  # worker processes open the files themselves

    def samples(self) -> list[Sample]:
        """Return the samples of the last `fill`.

        Raises:
            ValueError: There are none.
        """
        found = [Sample(**{**entry, "bucket": tuple(entry["bucket"])}) for entry in self.manifest["samples"]]
        if not found:
            raise ValueError(f"the cache {self.folder} holds no samples; give `data` to fill it.")
        return found

    def fill(self, items: list[Item], captions: list[str], flip: bool, device: torch.device) -> None:
        """Encode what the cache lacks, and write down the samples of a run.

        Args:
            items: Files with their captions and sizes.
            captions: Further texts that the run needs: the empty caption and validation prompts.
            flip: Also encode mirrored pictures.
            device: Where to encode.
        """
        keys = {item: latent_key(item) for item in items}
        sources = {key: (item, False) for item, key in keys.items()}
        if flip:
            sources |= {key + "-mirrored": (item, True) for item, key in keys.items()}
        new = self.lacks(list(sources))
        if new:
            if self.manifest["samples"] and len(new) < len(sources):
                logger.info(
                    "the cache is stale for %d of %d pictures: new, changed, or resized", len(new), len(sources)
                )
            logger.info("encoding %d pictures or videos", len(new))
            self.write("latents", encode_pictures(self.base, {key: sources[key] for key in new}, device))
            free_memory()
        self.add_captions([*captions, *(item.caption for item in items)], device)
        self.manifest["samples"] = [
            {
                "latents": keys[item],
                "mirrored": keys[item] + "-mirrored" if flip else "",
                "text": text_key(item.caption),
                "bucket": item.bucket,
                "prior": item.prior,
            }
            for item in items
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_json(self.path, self.manifest)

    def add_captions(self, captions: list[str], device: torch.device) -> None:
        """Encode the captions that the cache lacks."""
        texts = {text_key(caption): caption for caption in captions}
        new = self.lacks(list(texts))
        if new:
            logger.info("encoding %d captions", len(new))
            self.write("text", encode_captions(self.base, {key: texts[key] for key in new}, device))
            free_memory()


def latent_key(item: Item) -> str:
    """Return the hash of the file's bytes, and the size to which it is scaled."""
    return f"{file_hash(item.path)[:32]}-{item.frames}x{item.height}x{item.width}"


def text_key(caption: str) -> str:
    """Return the hash of a caption."""
    return "text-" + hashlib.sha256(caption.encode()).hexdigest()[:32]


@torch.no_grad()
def encode_pictures(
    base: BaseModel, sources: dict[str, tuple[Item, bool]], device: torch.device
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield posterior mean and standard deviation (C, F, H/8, W/8) of each picture or video, float32."""
    vae = base.load_vae(torch.float32, device)
    for key, (item, mirror) in sources.items():
        frames = [fit(frame, item.width, item.height) for frame in read_frames(item.path, item.frames)]
        pixels = to_pixels(np.stack([np.asarray(ImageOps.mirror(frame) if mirror else frame) for frame in frames]))
        posterior = vae.encode(pixels[None].to(device)).latent_dist
        yield key, {"mean": posterior.mean[0].cpu(), "std": posterior.std[0].cpu()}


@torch.no_grad()
def encode_captions(
    base: BaseModel, texts: dict[str, str], device: torch.device
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the embedding (L, D) of each caption without padding, cleaned as the pipeline cleans prompts."""
    pipe = base.load_text_pipeline(gpu_dtype(device), device)
    for key, caption in texts.items():
        yield key, {"embeds": pipe.encode_prompt(caption, do_classifier_free_guidance=False)[0][0].cpu()}
