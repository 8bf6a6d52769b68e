"""Stages "vae" and "decoder": the small causal VAE learns pictures of shapes; its decoder also clips and views.

"decoder" goes on from a trained VAE with its encoder frozen, so that the latents stay those that the transformer was
trained on; it can run beside the transformer's training.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from einops import rearrange
from PIL import Image
from torch import Tensor

from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.training.latents import to_pixels
from ptdit_diffusers.training.randomness import Stream, numpy_generator
from ptdit_diffusers.training.settings import LoopSettings
from ptdit_diffusers.training.task import Task
from ptdit_diffusers.training.vae_start import start_as_identity
from scripts.datasets.registry import DATA_SETS, DataSet, find_data_set, pick_data_set
from scripts.datasets.shapes import render, sample_scene


@dataclass(kw_only=True)
class VAEModelSettings:
    """Sizes of the VAE; the other fields of its configuration keep their defaults."""

    hidden_size: int = 16
    hidden_size_mult: tuple[int, int, int, int] = (1, 2, 4, 4)
    num_res_blocks: int = 1
    norm_num_groups: int = 1  # more groups lose the color of plain areas: few channels are normalized per group


@dataclass(kw_only=True)
class VAEDataSettings:
    """Pictures and loss."""

    size: int = 128  # side in pixels
    crop: int = 64  # side of the random crops that are trained on; a quarter of the cost of a whole picture
    start: str = ""  # diffusers folder of a trained VAE to go on from with a frozen encoder; "" = train all from new
    worlds: dict[str, float] = field(default_factory=lambda: {"pictures": 1.0})  # share of the steps that each has
    clip_batch_size: int = 2  # clips in such a step
    whole_after: float = 0.7  # share of the steps after which whole pictures replace crops, at equal cost per step
    kl_weight: float = 1e-4  # of the mean KL divergence per latent value, against the reconstruction error
    world: int = 1  # first number of the seeds of the scenes


@dataclass(kw_only=True)
class VAEStageSettings(LoopSettings):
    """Settings of the stage."""

    model: VAEModelSettings = field(default_factory=VAEModelSettings)
    data: VAEDataSettings = field(default_factory=VAEDataSettings)


class VAEStage(Task):
    """Reconstruction (L1 + MSE) with a small KL weight."""

    settings_type = VAEStageSettings

    def __init__(self, settings: VAEStageSettings, device: torch.device) -> None:
        self.settings = settings
        if settings.data.start:
            self.model = AutoencoderKLOpenSoraPlan.from_pretrained(settings.data.start).to(device)
            self.model.encoder.requires_grad_(False)
            self.model.quant_conv.requires_grad_(False)
            clips = any(find_data_set(name).frame_stride > 1 for name in settings.data.worlds)
            if clips and not sees_single_frames(self.model):
                see_single_frames(self.model)
        else:
            self.model = AutoencoderKLOpenSoraPlan(**asdict(settings.model)).to(device)
            start_as_identity(self.model)

    def batch(self, step: int, rank: int, batch_size: int) -> dict[str, Tensor]:
        data = self.settings.data
        roll = numpy_generator(data.world, self.settings.seed, step).random()  # the same on all processes
        data_set = DATA_SETS[pick_data_set(data.worlds, roll)]
        count = data.clip_batch_size if data_set.frame_stride > 1 else batch_size // data_set.length
        generator = numpy_generator(data.world, self.settings.seed, rank, step)
        whole = step >= data.whole_after * self.settings.steps * self.settings.accumulation
        crop = data.size if whole else data.crop
        samples = []
        for _ in range(max(1, count * data.crop**2 // crop**2)):
            frames = data_set.render(data_set.sample_for_training(generator), data.size, data_set.length)
            y, x = generator.integers(0, data.size - crop + 1, 2)
            samples.append(frames[:, y : y + crop, x : x + crop])
        return {"pixels": to_pixels(as_decoded(data_set, np.stack(samples)))}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = batch["pixels"]
        posterior = encode_frames(self.model, pixels, 4)
        reconstruction = self.model.decode(posterior.sample()).sample.float()
        error = F.l1_loss(reconstruction, pixels) + F.mse_loss(reconstruction, pixels)
        kl = (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean() / 2
        psnr = -10 * torch.log10(F.mse_loss(reconstruction.detach(), pixels) / 4)
        return error + self.settings.data.kl_weight * kl, {"kl": kl.detach(), "psnr": psnr}

    def sheet(self, path: Path, step: int) -> dict[str, float]:
        """Write rendered pictures above their reconstructions (clips as strips).

        Returns PSNR in dB and the standard deviation of the latents.
        """
        data, numbers = self.settings.data, {}
        for name in sorted(data.worlds, reverse=True):
            seeds = (data.world, self.settings.seed, Stream.VAE_SHEET, Stream.VAE_SHEET)
            generator, data_set = numpy_generator(*seeds), DATA_SETS[name]
            count = 4 if data_set.frame_stride > 1 else 16 // data_set.length
            truth = [data_set.render(data_set.sample(generator), data.size, data_set.length) for _ in range(count)]
            pixels = to_pixels(as_decoded(data_set, np.stack(truth))).to(self.model.device)
            latents = encode_frames(self.model, pixels, 4).mode()
            reconstruction = self.model.decode(latents).sample.clamp(-1, 1)
            columns = 8 if data_set.frame_stride == 1 else data_set.length
            strips = [rearrange(video, "b c f h w -> (b f) c h w") for video in (pixels, reconstruction)]
            rows = [part for pair in zip(*(strip.split(columns) for strip in strips), strict=True) for part in pair]
            save_sheet(torch.cat(rows), path.with_name(f"{path.name}-{name}.png"), columns)
            psnr = -10 * torch.log10(F.mse_loss(reconstruction, pixels) / 4)
            numbers |= {f"{name}_psnr": psnr.item(), f"{name}_latent_std": latents.std().item()}
        return numbers

    def export(self, folder: Path) -> None:
        """Write vae/ with the scaling factor that gives latents a standard deviation of one."""
        if self.settings.data.start:  # the encoder is the one that was scaled
            self.model.register_to_config(_name_or_path="")  # not a folder of this machine
            self.model.save_pretrained(folder / "vae")
            return
        generator = numpy_generator(self.settings.data.world, self.settings.seed, Stream.VAE_SCALE, Stream.VAE_SCALE)
        truth = np.stack([render(sample_scene(generator), self.settings.data.size) for _ in range(64)])
        latents = self.model.encode(to_pixels(truth[:, None]).to(self.model.device)).latent_dist.mode()
        self.model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        self.model.save_pretrained(folder / "vae")


@torch.no_grad()
def see_single_frames(model: AutoencoderKLOpenSoraPlan) -> None:
    """Move every kernel over time to its newest tap; the results for pictures stay exactly the same.

    The encoder of a VAE that learned pictures then reads frames 0, 4, 8, ... of a clip almost as pictures (only its
    norms see all frames together), so the latents of clips fit a transformer of pictures from the start. The decoder
    blends frames at first and learns the ones between.
    """
    for weight in model.parameters():
        if weight.ndim == 5:
            newest = weight.sum(2)
            weight.zero_()
            weight[:, :, -1] = newest


def sees_single_frames(model: AutoencoderKLOpenSoraPlan) -> bool:
    """Return whether `see_single_frames` was applied before; the decoder may have learned to blend frames since."""
    return not any(weight[:, :, :-1].any() for weight in model.encoder.parameters() if weight.ndim == 5)


def encode_frames(model: AutoencoderKLOpenSoraPlan, pixels: Tensor, stride: int) -> DiagonalGaussianDistribution:
    """Return the posterior of frames 0, s, 2 s, ..., each encoded as a picture.

    With stride 4 the encoder does the same after `see_single_frames`, except for its norms, with five times the work.

    Args:
        model: The VAE.
        pixels: (B, 3, F, H, W) in -1..1.
        stride: s.

    Returns:
        The posterior of latents (B, z, 1 + (F - 1) / s, H / 8, W / 8).
    """
    frames = pixels[:, :, ::stride]
    moments = model.encode(rearrange(frames, "b c f h w -> (b f) c 1 h w")).latent_dist.parameters
    return DiagonalGaussianDistribution(rearrange(moments, "(b f) z 1 h w -> b z f h w", b=len(frames)))


def as_decoded(data_set: DataSet, pictures: np.ndarray) -> np.ndarray:
    """Return series (B, F, H, W, 3) as the VAE decodes them: clips as they are, others as clips of one frame."""
    return pictures if data_set.frame_stride > 1 else pictures.reshape(-1, 1, *pictures.shape[2:])


def save_sheet(pixels: Tensor, path: Path, columns: int) -> None:
    """Write pictures (B, 3, H, W) in -1..1 as one PNG, row by row; B is a multiple of `columns`."""
    values = ((pixels.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    sheet = rearrange(values, "(rows columns) c h w -> (rows h) (columns w) c", columns=columns)
    Image.fromarray(sheet.numpy()).save(path)
