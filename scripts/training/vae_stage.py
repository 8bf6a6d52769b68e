"""Stages "vae" and "decoder": the small causal VAE learns the drawn world's pictures.

"decoder" goes on from a trained VAE with its encoder frozen, so that latents stay what the transformer knows; it can
run beside the transformer's training. Must not know text or the transformer.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from scripts.drawn_world import render, sample_scene
from scripts.training.config import LoopSettings
from scripts.training.stage import numpy_generator


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

    size: int = 128  # side of the pictures in pixels
    crop: int = 64  # side of the random crops that are trained on; a quarter of the cost of a whole picture
    start: str = ""  # diffusers folder of a trained VAE to go on from with a frozen encoder; "" = train all from new
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
        else:
            self.model = AutoencoderKLOpenSoraPlan(**asdict(settings.model)).to(device)
            start_as_identity(self.model)

    def batch(self, step: int, rank: int, batch_size: int) -> dict[str, Tensor]:
        data = self.settings.data
        generator = numpy_generator(data.world, self.settings.seed, rank, step)
        whole = step >= data.whole_after * self.settings.steps * self.settings.accumulation
        crop = data.size if whole else data.crop
        pictures = []
        for _ in range(max(1, batch_size * data.crop**2 // crop**2)):
            picture = render(sample_scene(generator), data.size)
            y, x = generator.integers(0, data.size - crop + 1, 2)
            pictures.append(picture[y : y + crop, x : x + crop])
        return {"pixels": to_pixels(numpy.stack(pictures))}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = batch["pixels"]
        posterior = self.model.encode(pixels).latent_dist
        reconstruction = self.model.decode(posterior.sample()).sample.float()
        error = F.l1_loss(reconstruction, pixels) + F.mse_loss(reconstruction, pixels)
        kl = (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean() / 2
        psnr = -10 * torch.log10(F.mse_loss(reconstruction.detach(), pixels) / 4)
        return error + self.settings.data.kl_weight * kl, {"kl": kl.detach(), "psnr": psnr}

    def sheet(self, path: Path) -> dict[str, float]:
        """True pictures above their reconstructions; PSNR in dB and the latents' standard deviation."""
        generator = numpy_generator(self.settings.data.world, self.settings.seed, 999, 999)
        truth = numpy.stack([render(sample_scene(generator), self.settings.data.size) for _ in range(16)])
        pixels = to_pixels(truth).to(self.model.device)
        latents = self.model.encode(pixels).latent_dist.mode()
        reconstruction = self.model.decode(latents).sample.clamp(-1, 1)
        rows = torch.cat([pixels[:8], reconstruction[:8], pixels[8:], reconstruction[8:]])
        save_sheet(rows, path.with_suffix(".png"), columns=8)
        psnr = -10 * torch.log10(F.mse_loss(reconstruction, pixels) / 4)
        return {"psnr": psnr.item(), "latent_std": latents.std().item()}

    def export(self, folder: Path) -> None:
        """Write vae/ with the scaling factor that gives latents a standard deviation of one."""
        if self.settings.data.start:  # the encoder is the one that was scaled
            self.model.register_to_config(_name_or_path="")  # not where this machine keeps what it started from
            self.model.save_pretrained(folder / "vae")
            return
        generator = numpy_generator(self.settings.data.world, self.settings.seed, 998, 998)
        truth = numpy.stack([render(sample_scene(generator), self.settings.data.size) for _ in range(64)])
        latents = self.model.encode(to_pixels(truth).to(self.model.device)).latent_dist.mode()
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


def to_pixels(pictures: numpy.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, 1, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1


def save_sheet(pixels: Tensor, path: Path, columns: int) -> None:
    """Write pictures (B, 3, 1, H, W) in [-1, 1] as one PNG, row by row; B is a multiple of `columns`."""
    bytes_ = ((pixels[:, :, 0].float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    rows = bytes_.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # (rows, H, columns, W, 3)
    Image.fromarray(rows.flatten(2, 3).flatten(0, 1).numpy()).save(path)


def build(settings: Settings, device: torch.device) -> VAEStage:
    """Make the stage."""
    return VAEStage(settings, device)
