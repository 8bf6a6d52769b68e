"""The VAE on one's own pictures: how well it reconstructs them, a decoder that is trained further, or a new one."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ptdit_diffusers.core.folder_files import new_folder
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.training.data.encode import video
from ptdit_diffusers.training.data.media import fit, read_frames
from ptdit_diffusers.training.data.sources import Picture
from ptdit_diffusers.training.randomness import Stream, numpy_generator
from ptdit_diffusers.training.settings import LoopSettings
from ptdit_diffusers.training.task import Task
from ptdit_diffusers.training.vae_start import start_as_identity

logger = logging.getLogger(__name__)

KL_WEIGHT = 1e-4  # of the mean KL divergence per latent value, against the reconstruction error
POOR_PSNR = 26.0  # dB below which the VAE should be trained
SCALED_ON = 64  # pictures that the scaling factor is measured on


def psnr(reconstruction: Tensor, pixels: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of pixels in -1..1."""
    return float(-10 * torch.log10(F.mse_loss(reconstruction.float().clamp(-1, 1), pixels.float()) / 4))


@torch.no_grad()
def reconstructions(vae: AutoencoderKLOpenSoraPlan, videos: Sequence[Tensor]) -> list[float]:
    """Return the PSNR in dB of each reconstructed picture (3, 1, H, W)."""
    found = []
    for pixels in videos:
        pixels = pixels[None].to(vae.device)
        found.append(psnr(vae.decode(vae.encode(pixels).latent_dist.mode()).sample, pixels))
    return found


@dataclass(kw_only=True)
class OwnVAESettings(LoopSettings):
    """Settings of the stage."""

    start: str  # folder of the VAE to go on from, or whose sizes a new one gets
    new: bool  # new weights; else the decoder goes on and the encoder stays
    size: int  # pictures are scaled so that their shorter side has so many pixels
    crop: int  # side of the crops that are trained on
    hidden_size: int = 0  # channels of a new one at full resolution; 0 = as the VAE of `start`


class OwnVAETask(Task):
    """Reconstruction (L1 + MSE) of crops, with a small KL weight."""

    def __init__(self, settings: OwnVAESettings, pictures: Sequence[Picture], device: torch.device) -> None:
        self.settings, self.pictures = settings, pictures
        if settings.new:
            config = dict(AutoencoderKLOpenSoraPlan.load_config(settings.start))
            config |= {"hidden_size": settings.hidden_size or config["hidden_size"]}
            torch.manual_seed(settings.seed)
            self.model = AutoencoderKLOpenSoraPlan.from_config(config).to(device)
            start_as_identity(self.model)
        else:
            self.model = AutoencoderKLOpenSoraPlan.from_pretrained(settings.start).to(device)
            self.model.encoder.requires_grad_(False)
            self.model.quant_conv.requires_grad_(False)

    def crop(self, choice: np.random.Generator, side: int) -> Tensor:
        """Return a random crop (3, 1, side, side) of a random picture."""
        picture = read_frames(self.pictures[int(choice.integers(len(self.pictures)))].file, 1)[0]
        scale = self.settings.size / min(picture.size)
        picture = fit(picture, *(max(side, round(length * scale)) for length in picture.size))
        x, y = (int(choice.integers(0, length - side + 1)) for length in picture.size)
        return video([picture.crop((x, y, x + side, y + side))])

    def batch(self, step: int, rank: int, batch_size: int) -> dict[str, Tensor]:
        choice = numpy_generator(self.settings.seed, Stream.OWN_VAE, rank, step)
        return {"pixels": torch.stack([self.crop(choice, self.settings.crop) for _ in range(batch_size)])}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = batch["pixels"]
        posterior = self.model.encode(pixels).latent_dist
        reconstruction = self.model.decode(posterior.sample()).sample.float()
        error = F.l1_loss(reconstruction, pixels) + F.mse_loss(reconstruction, pixels)
        kl = (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean() / 2
        quality = -10 * torch.log10(F.mse_loss(reconstruction.detach(), pixels) / 4)
        return error + KL_WEIGHT * kl * self.settings.new, {"psnr": quality}

    def export(self, folder: Path) -> None:
        """Write the VAE; a new one with the scaling factor that gives latents a standard deviation of one."""
        if self.settings.new:
            choice = numpy_generator(self.settings.seed, Stream.OWN_VAE, 2**31)
            crops = [self.crop(choice, self.settings.crop) for _ in range(SCALED_ON)]
            latents = [self.model.encode(crop[None].to(self.model.device)).latent_dist.mode() for crop in crops]
            self.model.register_to_config(scaling_factor=round(1 / torch.cat(latents).std().item(), 5))
        self.model.register_to_config(_name_or_path="")
        with new_folder(folder) as made:
            self.model.save_pretrained(made / "vae")
