"""Things of a world as latents, encoded once before training, with captions that are written anew for each sample.

Must not know the transformer.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ptdit_diffusers.core.sampling import time_shift
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.training.stage import HELD_OUT_SEED, numpy_generator
from scripts.datasets.registry import find_data_set
from scripts.embedded_models.vae_stage import encode_frames, to_pixels

CHUNK = 256  # samples in a file of latents
HELD_OUT = 64  # things for the loss on what training never sees


@dataclass(kw_only=True)
class PartSettings:
    """One part of the training data; every step is of one part, drawn by its share."""

    world: str = "pictures"  # name in scripts/datasets/registry.py
    size: int = 128  # side in pixels
    length: int = 0  # pictures of each sample; 0 = as the world has it
    samples: int = 32768  # drawn and encoded before training; captions are always new
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
        self.world = find_data_set(settings.world)
        self.length = settings.length or self.world.length
        self.frames = (self.length - 1) // self.world.frame_stride + 1  # of the latents
        self.log_shift = math.log(time_shift((settings.size // 16) ** 2, base_tokens, 4 * (self.frames - 1) + 1))
        self.latents = self.encode_all()

    @property
    def pipeline_arguments(self) -> dict[str, int]:
        """What a pipeline is asked for to draw one."""
        if self.world.frame_stride == 1 and self.length > 1:
            return {"num_views": self.length}
        return {"num_frames": self.length}

    def thing(self, index: int) -> Any:
        """Sample `index` of the training set."""
        return self.world.sample_for_training(numpy_generator(self.settings.seed, self.run_seed, index))

    def render(self, thing: Any) -> numpy.ndarray:
        """The pictures that the encoder reads, evenly spread in time: uint8 (latent frames, size, size, 3)."""
        return self.world.render(thing, self.settings.size, self.frames)

    def encode_all(self) -> Tensor:
        """Latents (samples, 4, F, H/8, W/8) of the training set, float16 on the CPU; kept in the run's folder.

        They are drawn and encoded in files of CHUNK, each process its share, and what is there is not made again;
        all processes read everything.
        """
        state, samples = PartialState(), self.settings.samples
        folder = self.folder / f"latents-{self.fingerprint()}"
        folder.mkdir(parents=True, exist_ok=True)
        chunks = [range(start, min(start + CHUNK, samples)) for start in range(0, samples, CHUNK)]
        files = {chunk: folder / f"samples-{chunk.start:08d}-{chunk.stop:08d}.safetensors" for chunk in chunks}
        missing = [chunk for chunk in chunks if not files[chunk].exists()]
        state.wait_for_everyone()  # all have looked before one writes
        mine = missing[state.process_index :: state.num_processes]
        for chunk in tqdm(mine, desc=f"encoding {self.settings.world}", unit=f" x {CHUNK}"):
            temporary = files[chunk].with_suffix(".tmp")
            save_file({"latents": self.encode([self.thing(index) for index in chunk])}, temporary)
            temporary.replace(files[chunk])
        state.wait_for_everyone()
        return torch.cat([load_file(file)["latents"] for file in files.values()])

    def fingerprint(self) -> str:
        """Eight digits that change with the VAE's encoder or the samples, so that stale latents are never read."""
        settings = self.settings
        digest = hashlib.sha256(f"{settings.world} {settings.size} {settings.seed} {self.run_seed}".encode())
        digest.update(self.render(self.thing(0)).tobytes())
        for module in (self.vae.encoder, self.vae.quant_conv):
            for value in module.state_dict().values():
                digest.update(value.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:8]

    @torch.no_grad()
    def encode(self, things: Sequence[Any]) -> Tensor:
        """Scaled posterior means of things, float16."""
        latents, batch = [], 16
        for start in range(0, len(things), batch):
            pixels = to_pixels(numpy.stack([self.render(thing) for thing in things[start : start + batch]]))
            posterior = encode_frames(self.vae, pixels.to(self.vae.device), 1)
            latents.append((posterior.mode() * self.vae.config.scaling_factor).half().cpu())
        return torch.cat(latents)

    @cached_property
    def held_out(self) -> tuple[Tensor, list[str]]:
        """Latents and captions of HELD_OUT things that training never sees, always the same."""
        generator = numpy_generator(self.settings.seed, self.run_seed, HELD_OUT_SEED)
        things = [self.world.sample(generator, held_out=True) for _ in range(HELD_OUT)]
        return self.encode(things).float(), [self.world.describe(thing, generator)[0] for thing in things]

    def draw(
        self, choice: numpy.random.Generator, batch_size: int, caption_dropout: float
    ) -> tuple[Tensor, list[str], Tensor]:
        """Latents (B, 4, F, H/8, W/8), captions, and layouts (B, F * tokens, 2 + numbers) of random samples.

        Half of what has a direction in time is taken backwards; the latents, being those of single frames, follow.
        """
        indices = choice.integers(self.settings.samples, size=batch_size)
        latents = self.latents[torch.from_numpy(indices)].float()
        captions, layouts = [], []
        for row, index in enumerate(indices):
            thing = self.thing(int(index))
            if self.world.reverse and choice.random() < 0.5:
                backwards = self.world.reverse(thing)
                if backwards and not self.world.is_held_out(backwards):
                    thing, latents[row] = backwards, latents[row].flip(1)
            dropped = choice.random() < caption_dropout
            captions.append("" if dropped else self.world.caption_for_training(thing, choice))
            layouts.append(self.world.layout(thing, self.settings.size // 16, self.frames))
        return latents, captions, torch.from_numpy(numpy.stack(layouts))
