"""Stage "vae": the small causal VAE learns the drawn world's pictures. Must not know text or the transformer."""

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
    norm_num_groups: int = 8


@dataclass(kw_only=True)
class DataSettings:
    """Pictures and loss."""

    size: int = 128  # side of the pictures in pixels
    crop: int = 64  # side of the random crops that are trained on; a quarter of the cost of a whole picture
    whole_after: float = 0.7  # share of the steps after which whole pictures replace crops, at equal cost per step
    kl_weight: float = 1e-4  # of the mean KL divergence per latent value, against the mean absolute error
    world: int = 1  # first number of the seeds of the scenes


@dataclass(kw_only=True)
class Settings(LoopSettings):
    """Settings of the stage."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)


class VAEStage:
    """L1 reconstruction with a small KL weight."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.model = AutoencoderKLOpenSoraPlan(**asdict(settings.model)).to(device)
        for name, parameter in self.model.named_parameters():
            if name.endswith(".conv.weight") and parameter.shape[2] == 3:  # pictures see the three time taps as one
                parameter.data[:, :, :2] = 0

    def batch(self, step: int, rank: int, batch_size: int) -> dict[str, Tensor]:
        data = self.settings.data
        generator = numpy_generator(data.world, self.settings.seed, rank, step)
        whole = step >= data.whole_after * self.settings.steps * self.settings.accumulation
        crop = data.size if whole else data.crop
        crops = (data.size // data.crop) ** 2
        pictures = []
        for _ in range(max(1, batch_size // crops)):
            picture = render(sample_scene(generator), data.size)
            for _ in range(1 if whole else crops):
                y, x = generator.integers(0, data.size - crop + 1, 2)
                pictures.append(picture[y : y + crop, x : x + crop])
        return {"pixels": to_pixels(numpy.stack(pictures))}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = batch["pixels"]
        posterior = self.model.encode(pixels).latent_dist
        reconstruction = self.model.decode(posterior.sample()).sample.float()
        error = F.l1_loss(reconstruction, pixels)
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
        generator = numpy_generator(self.settings.data.world, self.settings.seed, 998, 998)
        truth = numpy.stack([render(sample_scene(generator), self.settings.data.size) for _ in range(64)])
        latents = self.model.encode(to_pixels(truth).to(self.model.device)).latent_dist.mode()
        self.model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        self.model.save_pretrained(folder / "vae")


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
