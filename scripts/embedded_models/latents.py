"""The samples of a synthetic data set as latents, encoded once before training; captions are written anew each time.

The shards are those of one's own data. A sample is a function of a seed, so its number is its key; all of them fit
into memory; captions are never stored.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ptdit_diffusers.core.sampling import time_shift
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.training.data.shards import ShardWriter, bucket_text
from ptdit_diffusers.training.latents import to_pixels
from ptdit_diffusers.training.randomness import HELD_OUT_SEED, numpy_generator
from scripts.datasets.registry import find_data_set
from scripts.embedded_models.vae_stage import encode_frames

CHUNK = 256  # samples in a shard
HELD_OUT = 64  # samples for the loss on what training never sees


@dataclass(kw_only=True)
class PartSettings:
    """One part of the training data; every step is of one part, chosen at random by its share."""

    world: str = "pictures"  # name of a data set in scripts/datasets/registry.py
    size: int = 128  # side in pixels
    length: int = 0  # pictures of each sample; 0 = as the data set has it
    samples: int = 32768  # rendered and encoded before training; captions are always new
    seed: int = 2  # first number of the seeds of the samples
    batch_size: int = 0  # samples per process and per micro-batch; 0 = that of the loop
    share: float = 1.0  # of the steps, against the shares of the other parts


class EncodedPart:
    """The samples of one part of the training data.

    Args:
        settings: Of the part.
        run_seed: Seed of the run.
        vae: Frozen.
        folder: Of the run; keeps the latents.
        base_tokens: Tokens of a frame at which the time shift of a picture is 1.
    """

    def __init__(
        self, settings: PartSettings, run_seed: int, vae: AutoencoderKLOpenSoraPlan, folder: Path, base_tokens: int
    ) -> None:
        self.settings, self.run_seed, self.vae, self.folder = settings, run_seed, vae, folder
        self.data_set = find_data_set(settings.world)
        self.length = settings.length or self.data_set.length
        self.frames = (self.length - 1) // self.data_set.frame_stride + 1  # of the latents
        self.log_shift = math.log(time_shift((settings.size // 16) ** 2, base_tokens, 4 * (self.frames - 1) + 1))
        self.latents = self.encode_all()

    @property
    def pipeline_arguments(self) -> dict[str, int]:
        """Arguments with which a pipeline generates one sample."""
        if self.data_set.frame_stride == 1 and self.length > 1:
            return {"num_views": self.length}
        return {"num_frames": self.length}

    def sample(self, index: int) -> Any:
        """Return sample `index` of the training set."""
        return self.data_set.sample_for_training(numpy_generator(self.settings.seed, self.run_seed, index))

    def render(self, sample: Any) -> np.ndarray:
        """Return the pictures that the encoder reads, evenly spread in time: uint8 (latent frames, size, size, 3)."""
        return self.data_set.render(sample, self.settings.size, self.frames)

    def encode_all(self) -> Tensor:
        """Return the latents (samples, 4, F, H/8, W/8) of the training set, float16 on the CPU.

        The run's folder keeps them in shards. Each process renders and encodes its share of the samples that are
        missing, CHUNK at a time; then all processes read all of them.
        """
        state, keys = PartialState(), [f"{index:08d}" for index in range(self.settings.samples)]
        folder = self.folder / f"latents-{self.fingerprint()}"
        bucket = bucket_text((4 * (self.frames - 1) + 1, self.settings.size, self.settings.size))
        writer = ShardWriter(folder, f"{state.process_index:05d}-")
        missing = [index for index, key in enumerate(keys) if not writer.find(bucket, key)]
        chunks = [missing[start : start + CHUNK] for start in range(0, len(missing), CHUNK)]
        state.wait_for_everyone()  # all have looked before one writes
        mine = chunks[state.process_index :: state.num_processes]
        for chunk in tqdm(mine, desc=f"encoding {self.settings.world}", unit=f" x {CHUNK}"):
            for index, latents in zip(chunk, self.encode([self.sample(index) for index in chunk]), strict=True):
                writer.add(bucket, keys[index], {"mean": latents})
            writer.flush()
        state.wait_for_everyone()
        known = ShardWriter(folder).known
        places = [known[bucket, key] for key in keys]
        shards = {name: load_file(folder / bucket / f"{name}.safetensors")["mean"] for name, _ in places}
        return torch.stack([shards[name][row] for name, row in places])

    def fingerprint(self) -> str:
        """Return eight digits that change with the VAE's encoder or the samples, so that stale latents are never read.

        The decoder does not count: it may be trained further in the meantime.
        """
        settings = self.settings
        digest = hashlib.sha256(f"{settings.world} {settings.size} {settings.seed} {self.run_seed}".encode())
        digest.update(self.render(self.sample(0)).tobytes())
        for module in (self.vae.encoder, self.vae.quant_conv):
            for value in module.state_dict().values():
                digest.update(value.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:8]

    @torch.no_grad()
    def encode(self, samples: Sequence[Any]) -> Tensor:
        """Return the scaled posterior means (B, 4, F, H/8, W/8) of samples, float16."""
        latents, batch = [], 16
        for start in range(0, len(samples), batch):
            pixels = to_pixels(np.stack([self.render(sample) for sample in samples[start : start + batch]]))
            posterior = encode_frames(self.vae, pixels.to(self.vae.device), 1)
            latents.append((posterior.mode() * self.vae.config.scaling_factor).half().cpu())
        return torch.cat(latents)

    @cached_property
    def held_out(self) -> tuple[Tensor, list[str]]:
        """Latents and captions of HELD_OUT samples that training never sees, always the same."""
        generator = numpy_generator(self.settings.seed, self.run_seed, HELD_OUT_SEED)
        samples = [self.data_set.sample(generator, held_out=True) for _ in range(HELD_OUT)]
        return self.encode(samples).float(), [self.data_set.describe(sample, generator)[0] for sample in samples]

    def random_batch(
        self, choice: np.random.Generator, batch_size: int, caption_dropout: float
    ) -> tuple[Tensor, list[str], Tensor]:
        """Return latents (B, 4, F, H/8, W/8), captions, and layouts (B, F * tokens, 2 + numbers) of random samples.

        Where time has a direction, half of the samples run backwards; their latents are those of single frames and
        are reversed with them.
        """
        data_set, indices = self.data_set, choice.integers(self.settings.samples, size=batch_size)
        latents = self.latents[torch.from_numpy(indices)].float()
        captions, layouts = [], []
        for row, index in enumerate(indices):
            sample = self.sample(int(index))
            if data_set.reverse and choice.random() < 0.5:
                backwards = data_set.reverse(sample)
                if backwards and not data_set.is_held_out(backwards):
                    sample, latents[row] = backwards, latents[row].flip(1)
            dropped = choice.random() < caption_dropout
            captions.append("" if dropped else data_set.caption_for_training(sample, choice))
            layouts.append(data_set.layout(sample, self.settings.size // 16, self.frames))
        return latents, captions, torch.from_numpy(np.stack(layouts))
