"""Latents and embeddings on disk: safetensors files of entries, each under a key of everything it depends on.

A key holds the VAE or text encoder, the content of the file or the caption, and the size. So nothing stale is read,
and runs with other data or other models may share a folder. The folder has no index: the files say what is in them,
and two runs never write one file. Which samples a run has, stands in a file of its own (`samples.py`).
Training reads only this and constructs neither the VAE nor the text encoder.

The stages of the embedded models have a reader of their own, `scripts.embedded_models.latents`: their samples are
functions of a seed, fit into memory, and get new captions each time, so they need neither hashes nor single reads nor
embeddings. Pixels and writing files are common to both (`ptdit_diffusers.training.latents`).
"""

import hashlib
import logging
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import free_memory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ptdit_diffusers.core.files import file_hash
from ptdit_diffusers.training.base_model import BaseModel
from ptdit_diffusers.training.data.encode import encode_captions, encode_pictures, tokenize_captions
from ptdit_diffusers.training.data.find import Item
from ptdit_diffusers.training.data.media import EVEN
from ptdit_diffusers.training.data.space import require_space
from ptdit_diffusers.training.latents import write_tensors

from .samples import Sample

logger = logging.getLogger("lora")

FORMAT = 2  # changes when the same file gives other latents
SHARD = 128  # entries per file
SHARD_NAME = re.compile(r"(latents|text|tokens)-[0-9a-f]+\.safetensors")
MIRRORED = "-mirrored"  # end of the key of a mirrored copy


def makers(base: BaseModel) -> dict[str, str]:
    """Return the beginnings of all keys of entries that a model makes."""
    return {
        "latents": f"{FORMAT}-{base.fingerprint('vae')}",
        "text": f"text-{base.fingerprint('text_encoder', 'tokenizer')}",
    }


def latents_of(sample: Sample) -> list[str]:
    """Return the keys of everything that a sample's latents are taken from: crops, and mirrored copies."""
    keys = [sample.latents, *sample.more_latents]
    return keys + [key + MIRRORED for key in keys] if sample.mirrored else keys


class Cache:
    """The folder of a cache. `get` reads single entries, so every process reads only what it trains on.

    Attributes:
        samples: What this run trains on.
    """

    def __init__(self, folder: Path, base: BaseModel, rebuild: bool = False, tokens: bool = False) -> None:
        """Read which entries the folder has.

        Args:
            folder: Of the cache; it need not exist.
            base: The model whose VAE and text encoder make the entries.
            rebuild: Delete everything that is cached there. No other run may be using it.
            tokens: Of captions, keep the ids of the tokens instead of embeddings: the text encoder is trained.
        """
        self.folder, self.base, self.tokens = folder, base, tokens
        self.maker = makers(base)
        self.token_maker = f"tokens-{base.fingerprint('tokenizer')}" if tokens else ""
        self.samples: list[Sample] = []
        self.files: dict[str, Any] = {}
        self.entries: dict[str, str] = {}  # key -> name of the file
        self.damaged: list[Path] = []
        self.hashes: dict[tuple[Path, int, int], str] = {}  # path, size, time of its last change -> hash of a file
        for path in sorted(path for path in folder.glob("*.safetensors") if SHARD_NAME.fullmatch(path.name)):
            if rebuild:
                path.unlink()
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    self.entries |= {name.rpartition(".")[0]: path.name for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                logger.warning("%s is damaged and will be made again (%s)", path, error)
                self.damaged.append(path)

    def latent_key(self, item: Item) -> str:
        """Return the key of a file's latents: VAE, hash of the file's bytes, size, crop and mask."""
        known = item.path.stat()
        state = item.path, known.st_size, known.st_mtime_ns
        if state not in self.hashes:
            self.hashes[state] = file_hash(item.path)[:32]
        key = f"{self.maker['latents']}-{self.hashes[state]}-{item.frames}x{item.height}x{item.width}"
        key += "" if item.crop == EVEN else f"-crop{item.crop[0]}x{item.crop[1]}"
        key += f"-from{item.begin}" if item.begin else ""
        key += f"-fps{item.fps:g}" if item.fps else ""
        return key + ("-alpha" if item.masked else "")

    def text_key(self, caption: str) -> str:
        """Return the key of a caption: text encoder and hash."""
        return f"{self.maker['text']}-{hashlib.sha256(caption.encode()).hexdigest()[:32]}"

    def stored_text(self, key: str) -> str:
        """Return the key under which the text with a `text_key` is stored: itself, or that of its tokens."""
        return f"{self.token_maker}-{key.rpartition('-')[2]}" if self.tokens else key

    def lacks(self, keys: Iterable[str]) -> list[str]:
        """Return the keys that are not in the cache, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self.entries]

    def write(self, kind: str, entries: Iterator[tuple[str, dict[str, Tensor]]]) -> None:
        """Add entries (key, tensors) in files of their own; after Ctrl-C, those that are finished are kept.

        Raises:
            OSError: They could not be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        shard: dict[str, dict[str, Tensor]] = {}
        try:
            for key, tensors in entries:
                shard[key] = tensors
                if len(shard) == SHARD:
                    self._write_shard(kind, shard)
                    shard = {}
        except KeyboardInterrupt:
            self._write_shard(kind, shard)
            raise
        self._write_shard(kind, shard)

    def _write_shard(self, kind: str, shard: dict[str, dict[str, Tensor]]) -> None:
        if shard:
            path = self.folder / f"{kind}-{uuid.uuid4().hex[:12]}.safetensors"
            write_tensors(path, {f"{key}.{part}": t for key, tensors in shard.items() for part, t in tensors.items()})
            self.entries |= dict.fromkeys(shard, path.name)

    def get(self, key: str, part: str) -> Tensor:
        """Return one tensor of one entry, on the CPU.

        Raises:
            OSError: It cannot be read any more.
        """
        name = self.entries[key]
        try:
            if name not in self.files:
                self.files[name] = safe_open(self.folder / name, framework="pt")
            return self.files[name].get_tensor(f"{key}.{part}")
        except (SafetensorError, FileNotFoundError) as error:
            raise OSError(
                f"{self.folder / name} cannot be read any more ({error}); --rebuild-cache mends it"
            ) from error

    def text(self, caption: str) -> Tensor:
        """Return the embedding (L, D) of a caption in the cache, or its tokens; see `read_text`."""
        return self.read_text(self.text_key(caption))

    def read_text(self, key: str) -> Tensor:
        """Return the embedding (L, D) of the text with a `text_key`, or ids (L,) where the cache keeps tokens."""
        return self.get(self.stored_text(key), "ids" if self.tokens else "embeds")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}  # worker processes open the files themselves

    def plan(self, items: Sequence[Item], flip: bool, data_set: int = 0) -> list[Sample]:
        """Return the samples of a run, which say what must be in the cache.

        Args:
            items: Files with their captions and sizes.
            flip: Also train on mirrored pictures.
            data_set: Number of their data set.
        """
        samples = []
        for item in items:
            key, *crops = map(self.latent_key, item.all_crops)
            others = tuple(map(self.text_key, item.variations))
            mirrored, text = key + MIRRORED if flip else "", self.text_key(item.caption)
            samples.append(
                Sample(item.name, key, mirrored, text, item.bucket, item.prior, data_set, others, tuple(crops))
            )
        return samples

    def fill(self, items: Sequence[Item], samples: list[Sample], captions: list[str], device: torch.device) -> None:
        """Encode what the cache lacks, and take the samples as those of this run.

        Args:
            items: Files with their captions and sizes.
            samples: From `plan`, of the same items.
            captions: Further texts that the run needs: the empty caption and validation prompts.
            device: Where to encode.

        Raises:
            ValueError: A file changed meanwhile or cannot be encoded.
            OSError: There is too little space.
        """
        sources = {}
        for item, sample in zip(items, samples, strict=True):
            for key, each in zip((sample.latents, *sample.more_latents), item.all_crops, strict=True):
                sources[key] = each, False
                sources |= {key + MIRRORED: (each, True)} if sample.mirrored else {}
        new = self.lacks(sources)
        texts = dict.fromkeys(captions, "")
        for item in items:
            for caption in (item.caption, *item.variations):
                texts.setdefault(caption, item.name)
        self._require_space([sources[key][0] for key in new], list(texts), device)
        for path in self.damaged:
            path.unlink(missing_ok=True)
        if new:
            if len(new) < len(sources):
                logger.info("the cache lacks %d of %d pictures: new, changed, or resized", len(new), len(sources))
            logger.info("encoding %d pictures or videos", len(new))
            self.write(
                "latents", encode_pictures(self.base, {key: sources[key] for key in new}, device, self.latent_key)
            )
            free_memory()
        self.add_captions(texts, device)
        self.samples = samples

    def _require_space(self, items: list[Item], captions: list[str], device: torch.device) -> None:
        """Raise OSError unless the disk has room for what is encoded now."""
        config, width = self.base.transformer_config, 2 if device.type == "cuda" else 4
        pixels = sum((1 + (item.frames - 1) // 4) * item.height * item.width for item in items)
        latents = pixels // 64 * config["in_channels"] * 2 * 4  # mean and standard deviation, float32
        new = [caption for caption in captions if self.stored_text(self.text_key(caption)) not in self.entries]
        tokens = sum(min(200, len(caption.encode()) // 3 + 2) for caption in new)
        each = 8 if self.tokens else config["caption_channels"] * width
        require_space("cache_dir", self.folder, latents + tokens * each)

    def add_captions(self, texts: dict[str, str], device: torch.device) -> None:
        """Encode the captions that the cache lacks; `texts` gives each the name of a file that has it, or ""."""
        keys = {self.stored_text(self.text_key(caption)): caption for caption in texts}
        new = self.lacks(keys)
        captions = {key: (keys[key], texts[keys[key]]) for key in new}
        if new and self.tokens:
            self.write("tokens", tokenize_captions(self.base, captions))
        elif new:
            logger.info("encoding %d captions", len(new))
            self.write("text", encode_captions(self.base, captions, device))
            free_memory()

    def require_samples(self, samples: list[Sample]) -> None:
        """Take these samples as those of this run.

        Raises:
            ValueError: The cache does not have all of them.
        """
        texts = [key for sample in samples for key in (sample.text, *sample.more_texts)]
        latents = [key for sample in samples for key in latents_of(sample)]
        foreign = [
            key for key in latents + texts if not key.startswith(tuple(f"{maker}-" for maker in self.maker.values()))
        ]
        if foreign:
            raise ValueError(
                f"the samples of this run were encoded by another VAE or text encoder than those of base "
                f"{self.base.name!r}; give `data` to encode them again."
            )
        keys = [*latents, *map(self.stored_text, texts)]
        if missing := self.lacks(keys):
            raise ValueError(
                f"the cache {self.folder} lacks {len(missing)} of {len(set(keys))} entries of this run for base "
                f"{self.base.name!r}; give `data` to encode them."
            )
        self.samples = samples
