"""Stages "vae" and "decoder": the small causal VAE learns the drawn world's pictures, its decoder also others.

"decoder" goes on from a trained VAE with its encoder frozen, so that latents stay what the transformer knows; it can
run beside the transformer's training. Must not know text or the transformer.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.training.settings import LoopSettings
from ptdit_diffusers.training.stage import numpy_generator
from scripts.datasets.registry import DATA_SETS, DataSet, find_data_set, pick_data_set
from scripts.datasets.shapes import render, sample_scene


@dataclass(kw_only=True)
class ModelSettings:
    """Sizes of the VAE; the other fields of its configuration keep their defaults."""

    hidden_size: int = 16
    hidden_size_mult: tuple[int, int, int, int] = (1, 2, 4, 4)
    num_res_blocks: int = 1
    norm_num_groups: int = 1  # more groups lose the colour of plain areas: few channels are normalised per group


@dataclass(kw_only=True)
class DataSettings:
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
class Settings(LoopSettings):
    """Settings of the stage."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)


class VAEStage:
    """Reconstruction (L1 + MSE) with a small KL weight."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        if settings.data.start:
            self.model = AutoencoderKLOpenSoraPlan.from_pretrained(settings.data.start).to(device)
            self.model.encoder.requires_grad_(False)
            self.model.quant_conv.requires_grad_(False)
            if any(find_data_set(name).frame_stride > 1 for name in settings.data.worlds) and not sees_single_frames(
                self.model
            ):
                see_single_frames(self.model)
        else:
            self.model = AutoencoderKLOpenSoraPlan(**asdict(settings.model)).to(device)
            start_as_identity(self.model)

    def batch(self, step: int, rank: int, batch_size: int) -> dict[str, Tensor]:
        data = self.settings.data
        roll = numpy_generator(data.world, self.settings.seed, step).random()  # the same on all processes
        world = DATA_SETS[pick_data_set(data.worlds, roll)]
        count = data.clip_batch_size if world.frame_stride > 1 else batch_size // world.length
        generator = numpy_generator(data.world, self.settings.seed, rank, step)
        whole = step >= data.whole_after * self.settings.steps * self.settings.accumulation
        crop = data.size if whole else data.crop
        samples = []
        for _ in range(max(1, count * data.crop**2 // crop**2)):
            frames = world.render(world.sample_for_training(generator), data.size, world.length)
            y, x = generator.integers(0, data.size - crop + 1, 2)
            samples.append(frames[:, y : y + crop, x : x + crop])
        return {"pixels": to_pixels(as_decoded(world, numpy.stack(samples)))}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = batch["pixels"]
        posterior = encode_frames(self.model, pixels, 4)
        reconstruction = self.model.decode(posterior.sample()).sample.float()
        error = F.l1_loss(reconstruction, pixels) + F.mse_loss(reconstruction, pixels)
        kl = (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean() / 2
        psnr = -10 * torch.log10(F.mse_loss(reconstruction.detach(), pixels) / 4)
        return error + self.settings.data.kl_weight * kl, {"kl": kl.detach(), "psnr": psnr}

    def sheet(self, path: Path) -> dict[str, float]:
        """True pictures above their reconstructions; PSNR in dB and the latents' standard deviation. Clips: strips."""
        data, numbers = self.settings.data, {}
        for name in sorted(data.worlds, reverse=True):
            generator, world = numpy_generator(data.world, self.settings.seed, 999, 999), DATA_SETS[name]
            count = 4 if world.frame_stride > 1 else 16 // world.length
            truth = [world.render(world.sample(generator), data.size, world.length) for _ in range(count)]
            pixels = to_pixels(as_decoded(world, numpy.stack(truth))).to(self.model.device)
            latents = encode_frames(self.model, pixels, 4).mode()
            reconstruction = self.model.decode(latents).sample.clamp(-1, 1)
            columns = 8 if world.frame_stride == 1 else world.length
            strips = [video.transpose(1, 2).flatten(0, 1)[:, :, None] for video in (pixels, reconstruction)]
            rows = [part for pair in zip(*(strip.split(columns) for strip in strips), strict=True) for part in pair]
            save_sheet(torch.cat(rows), path.with_name(f"{path.name}-{name}.png"), columns)
            psnr = -10 * torch.log10(F.mse_loss(reconstruction, pixels) / 4)
            numbers |= {f"{name}_psnr": psnr.item(), f"{name}_latent_std": latents.std().item()}
        return numbers

    def export(self, folder: Path) -> None:
        """Write vae/ with the scaling factor that gives latents a standard deviation of one."""
        if self.settings.data.start:  # the encoder is the one that was scaled
            self.model.register_to_config(_name_or_path="")  # not where this machine keeps what it started from
            self.model.save_pretrained(folder / "vae")
            return
        generator = numpy_generator(self.settings.data.world, self.settings.seed, 998, 998)
        truth = numpy.stack([render(sample_scene(generator), self.settings.data.size) for _ in range(64)])
        latents = self.model.encode(to_pixels(truth[:, None]).to(self.model.device)).latent_dist.mode()
        self.model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        self.model.save_pretrained(folder / "vae")


@torch.no_grad()
def start_as_identity(model: AutoencoderKLOpenSoraPlan) -> None:
    """Let the untrained VAE pass the picture, subsampled, through its first channels; it learns colours from there.

    Residual blocks and attention begin as the identity, the convolutions between them as Dirac kernels plus a little
    of their random values. Only the newest of three time taps is used, since a picture sees them as one.
    """
    for name, weight in model.named_parameters():
        if weight.ndim < 4:
            continue
        kernel = weight if weight.ndim == 4 else weight[:, :, -1]
        if weight.ndim == 5:
            weight[:, :, :-1] = 0
        if "conv2." in name or "proj_out." in name:
            kernel.zero_()
        elif not any(part in name for part in ("conv1.", ".q.", ".k.", ".v.")):
            kernel.mul_(0.3).add_(torch.nn.init.dirac_(torch.empty_like(kernel)))
    model.quant_conv.conv.bias[model.config.z_channels :] = -6  # begin with little posterior noise


@torch.no_grad()
def see_single_frames(model: AutoencoderKLOpenSoraPlan) -> None:
    """Move every kernel over time to its newest tap: what a picture gives stays the same, exactly.

    The encoder of a VAE that learned pictures then reads frames 0, 4, 8, ... of a clip almost as it reads pictures
    (its norms see all frames together), so a transformer of pictures knows the latents of clips from the start. The
    decoder, which begins by blending frames, learns the ones between.
    """
    for weight in model.parameters():
        if weight.ndim == 5:
            newest = weight.sum(2)
            weight.zero_()
            weight[:, :, -1] = newest


def sees_single_frames(model: AutoencoderKLOpenSoraPlan) -> bool:
    """Whether the encoder is one that `see_single_frames` made: its decoder may have learned to blend frames since."""
    return not any(weight[:, :, :-1].any() for weight in model.encoder.parameters() if weight.ndim == 5)


def encode_frames(model: AutoencoderKLOpenSoraPlan, pixels: Tensor, stride: int) -> DiagonalGaussianDistribution:
    """Posterior of frames 0, s, 2 s, ..., each read as a picture: (B, 3, F, H, W) -> (B, z, 1 + (F - 1) / s, h, w).

    With stride 4 this is what the encoder does after `see_single_frames`, but for its norms, at a fifth of the work.
    """
    frames = pixels[:, :, ::stride].transpose(1, 2)  # (B, F', 3, H, W)
    moments = model.encode(frames.flatten(0, 1)[:, :, None]).latent_dist.parameters
    return DiagonalGaussianDistribution(moments.squeeze(2).unflatten(0, frames.shape[:2]).transpose(1, 2))


def as_decoded(world: DataSet, pictures: numpy.ndarray) -> numpy.ndarray:
    """Series (B, F, H, W, 3) as the VAE decodes them: clips stay, the pictures of others become clips of one frame."""
    return pictures if world.frame_stride > 1 else pictures.reshape(-1, 1, *pictures.shape[2:])


def to_pixels(frames: numpy.ndarray) -> Tensor:
    """uint8 (B, F, H, W, 3) -> float32 (B, 3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def save_sheet(pixels: Tensor, path: Path, columns: int) -> None:
    """Write pictures (B, 3, 1, H, W) in [-1, 1] as one PNG, row by row; B is a multiple of `columns`."""
    bytes_ = ((pixels[:, :, 0].float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    rows = bytes_.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # (rows, H, columns, W, 3)
    Image.fromarray(rows.flatten(2, 3).flatten(0, 1).numpy()).save(path)


def build(settings: Settings, device: torch.device) -> VAEStage:
    """Make the stage."""
    return VAEStage(settings, device)
