"""Stage "diffit_image": DiffiT's image-space model learns single figures from their pixels, with the loss of EDM."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import EDMEulerScheduler
from torch import Tensor

from ptdit_diffusers.models.unet_diffit import DiffiTUNet2DModel
from ptdit_diffusers.pipelines.pipeline_diffit_image import DiffiTImagePipeline
from ptdit_diffusers.training.latents import to_pixels
from ptdit_diffusers.training.objective_edm import MEAN, STD, edm_matching, sample_sigmas
from ptdit_diffusers.training.processes import attention_kernels
from ptdit_diffusers.training.randomness import HELD_OUT_SEED, Stream, numpy_generator, torch_generator
from ptdit_diffusers.training.settings import LoopSettings
from ptdit_diffusers.training.task import Task
from scripts.datasets.registry import find_data_set
from scripts.datasets.shapes import CLASSES
from scripts.embedded_models.class_stage import draw_classes, label_of

HELD_OUT = 64  # pictures for the loss on what training never sees


@dataclass(kw_only=True)
class ImageModelSettings:
    """Sizes, as `DiffiTUNet2DModel` has them."""

    sample_size: int = 64  # side of the pictures, in pixels
    block_out_channels: tuple[int, ...] = (32, 64, 128)
    layers_per_block: tuple[int, ...] = (1, 1, 2)
    window_size: int = 8
    attention_head_dim: int = 32
    norm_num_groups: int = 16
    time_embed_dim: int = 256
    class_dropout_prob: float = 0.1  # share of samples trained as the null class, for guidance
    start: str = ""  # unet folder to go on from, with the sizes above; "" = new weights


@dataclass(kw_only=True)
class ImageDataSettings:
    """Noise levels of training, and the sheets of samples; training pictures are drawn anew at every step."""

    noise_mean: float = MEAN  # of ln sigma
    noise_std: float = STD  # of ln sigma
    steps: int = 18  # of the sample sheets, by Heun's method
    guidance: float = 1.5  # of the sample sheets


@dataclass(kw_only=True)
class ImageStageSettings(LoopSettings):
    """Settings of the stage."""

    compile: bool = False  # torch.compile the cells: slow to begin, then faster
    model: ImageModelSettings = field(default_factory=ImageModelSettings)
    data: ImageDataSettings = field(default_factory=ImageDataSettings)


class ImageStage(Task):
    """The image-space model on pictures of single figures."""

    settings_type = ImageStageSettings

    def __init__(self, settings: ImageStageSettings, device: torch.device) -> None:
        self.settings, self.device, self.figures = settings, device, find_data_set("figures")
        sizes = {name: value for name, value in asdict(settings.model).items() if name != "start"}
        self.model = DiffiTUNet2DModel(**sizes, num_classes=len(CLASSES)).to(device)
        if settings.model.start:
            weights = DiffiTUNet2DModel.from_pretrained(settings.model.start, dtype=torch.float32)
            self.model.load_state_dict(weights.state_dict())
        if settings.compile:
            self.model.compile_repeated_blocks(dynamic=False)

    def draw(self, choice: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Return random pictures (count, 3, H, W) in -1..1 and their classes (count,)."""
        scenes = [self.figures.sample_for_training(choice) for _ in range(count)]
        size = self.settings.model.sample_size
        pixels = to_pixels(np.stack([self.figures.render(scene, size, 1) for scene in scenes]))
        return pixels[:, :, 0], torch.tensor([label_of(scene) for scene in scenes])

    def batch(self, step: int, rank: int, batch_size: int) -> dict[str, Tensor]:
        choice = numpy_generator(self.settings.seed, Stream.SAMPLES, rank, step)
        return self.noise_batch(*self.draw(choice, batch_size), (self.settings.seed, Stream.NOISE, rank, step))

    def noise_batch(self, pictures: Tensor, labels: Tensor, seeds: tuple[int, ...]) -> dict[str, Tensor]:
        """Return pictures (B, 3, H, W), labels (B,), noise and noise levels (B,)."""
        generator, data = torch_generator(*seeds), self.settings.data
        sigma = sample_sigmas(len(pictures), generator, data.noise_mean, data.noise_std)
        return {
            "pictures": pictures,
            "labels": labels,
            "noise": torch.randn(pictures.shape, generator=generator),
            "sigma": sigma,
        }

    def errors(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of each sample (B,)."""

        def predict(noisy: Tensor, noise_level: Tensor) -> Tensor:
            return self.model(noisy, noise_level, batch["labels"]).sample.float()

        with attention_kernels(self.device):
            return edm_matching(predict, batch["pictures"], batch["noise"], batch["sigma"])

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.errors(batch).mean(), {}

    def pipeline(self) -> DiffiTImagePipeline:
        """Return the pipeline of the present weights."""
        names = dict(enumerate(CLASSES))
        return DiffiTImagePipeline(self.model, EDMEulerScheduler(), names, guidance_scale=self.settings.data.guidance)

    def held_out_loss(self) -> float:
        """Return the mean loss on pictures that training never sees, always with the same noise."""
        pictures, labels = self.draw(numpy_generator(self.settings.seed, HELD_OUT_SEED), HELD_OUT)
        batch = self.noise_batch(pictures, labels, (self.settings.seed, Stream.HELD_OUT_NOISE))
        return float(self.errors({name: value.to(self.device) for name, value in batch.items()}).mean())

    def sheet(self, path: Path, step: int) -> dict[str, float]:
        """Generate one picture of every class, always from the same noise. Returns the loss on held-out pictures."""
        draw_classes(self.pipeline(), path, self.settings.data.steps, self.settings.data.guidance)
        return {"held_out_loss": self.held_out_loss()}

    def export(self, folder: Path) -> None:
        """Write the pipeline: network, scheduler and index."""
        self.model.register_to_config(_name_or_path="")  # not a folder of this machine
        self.pipeline().save_pretrained(folder)
