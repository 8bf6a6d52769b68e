"""Stages "dit" and "diffit": a class-conditional transformer learns single figures, in the latents of the frozen VAE.

Two objectives: the noise with a learned variance, as DiT was trained, and rectified flow, as SiT (arXiv 2401.08740).
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from ptdit_diffusers.core.class_configuration import class_folder_config
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.class_transformer import ClassTransformer2DModel
from ptdit_diffusers.models.transformer_diffit import DiffiT2DModel
from ptdit_diffusers.models.transformer_dit import DiT2DModel
from ptdit_diffusers.pipelines.class_sampling import official_scheduler
from ptdit_diffusers.pipelines.pipeline_class_to_image import ClassToImagePipeline
from ptdit_diffusers.pipelines.pipeline_diffit_image import DiffiTImagePipeline
from ptdit_diffusers.training.latents import write_tensors
from ptdit_diffusers.training.objective import flow_matching, sample_times
from ptdit_diffusers.training.objective_dit import NoiseProcess, diffusion_loss
from ptdit_diffusers.training.processes import attention_kernels
from ptdit_diffusers.training.randomness import Stream, numpy_generator, torch_generator
from ptdit_diffusers.training.settings import LoopSettings, one_of
from ptdit_diffusers.training.task import Task
from scripts.datasets.shapes import CLASSES, class_name
from scripts.embedded_models.latents import EncodedPart, PartSettings
from scripts.embedded_models.vae_stage import save_sheet

CLASS_MODELS: dict[str, type[ClassTransformer2DModel]] = {"dit": DiT2DModel, "diffit": DiffiT2DModel}


@dataclass(kw_only=True)
class ClassModelSettings:
    """Backbone and sizes; the other fields of its configuration keep their defaults."""

    backbone: str = "dit"  # a name of CLASS_MODELS
    num_attention_heads: int = 3
    attention_head_dim: int = 64
    num_layers: int = 10
    patch_size: int = 2
    class_dropout_prob: float = 0.1  # share of samples trained as the null class, for guidance
    start: str = ""  # transformer folder to go on from, with the sizes above; "" = new weights

    def __post_init__(self) -> None:
        one_of("model.backbone", self.backbone, tuple(CLASS_MODELS))


@dataclass(kw_only=True)
class ClassDataSettings:
    """Training data, objective, and the sheets of samples."""

    components: str  # diffusers folder with vae/
    part: PartSettings  # of data set "figures"
    objective: str = "diffusion"  # "diffusion": noise and learned variance; "flow": rectified flow
    max_weight: float = 1.0  # of the noise's error at a timestep, for "diffusion"; 1: all alike, as DiT was trained
    times: str = "uniform"  # timesteps of "diffusion"; "logit_normal": as SD3's times, two of three in 300 to 750
    base_tokens: int = 28  # of rectified flow, as in stage "transformer"
    steps: int = 25  # of the sample sheets
    guidance: float = 1.5  # of the sample sheets

    def __post_init__(self) -> None:
        one_of("data.objective", self.objective, ("diffusion", "flow"))
        one_of("data.times", self.times, ("uniform", "logit_normal"))
        if self.objective == "flow" and self.times != "uniform":
            raise ValueError(f'data.times={self.times!r} is of "diffusion"; "flow" has its own times: leave it out.')
        one_of("data.part.world", self.part.world, ("figures",))


@dataclass(kw_only=True)
class ClassStageSettings(LoopSettings):
    """Settings of the stage."""

    compile: bool = False  # torch.compile the blocks: slow to begin, then faster
    model: ClassModelSettings = field(default_factory=ClassModelSettings)
    data: ClassDataSettings


class ClassStage(Task):
    """A class-conditional model on encoded pictures of single figures."""

    settings_type = ClassStageSettings

    def __init__(self, settings: ClassStageSettings, device: torch.device) -> None:
        self.settings, self.device, data = settings, device, settings.data
        vae = AutoencoderKLOpenSoraPlan.from_pretrained(Path(data.components) / "vae")
        self.vae = vae.eval().requires_grad_(False).to(device)
        self.part = EncodedPart(data.part, settings.seed, self.vae, Path(settings.output_dir), data.base_tokens)
        self.labels = torch.tensor([label_of(self.part.sample(index)) for index in range(data.part.samples)])
        channels = self.part.latents.shape[1]
        sizes = {name: value for name, value in asdict(settings.model).items() if name not in ("backbone", "start")}
        self.model = CLASS_MODELS[settings.model.backbone](
            **sizes,
            in_channels=channels,
            out_channels=channels * (2 if self.is_diffusion else 1),
            sample_size=data.part.size // 8,
            num_classes=len(CLASSES),
        ).to(device)
        if settings.model.start:
            weights = type(self.model).from_pretrained(settings.model.start, dtype=torch.float32)
            self.model.load_state_dict(weights.state_dict())
        if settings.compile:
            self.model.compile_repeated_blocks(dynamic=False)
        self.process = NoiseProcess()
        self.scheduler = official_scheduler() if self.is_diffusion else FlowMatchEulerDiscreteScheduler()

    @property
    def is_diffusion(self) -> bool:
        """Whether the model predicts noise and variance, not the flow."""
        return self.settings.data.objective == "diffusion"

    def batch(self, step: int, rank: int, batch_size: int) -> dict[str, Tensor]:
        choice = numpy_generator(self.settings.seed, Stream.SAMPLES, rank, step)
        indices = torch.from_numpy(choice.integers(len(self.labels), size=batch_size))
        generator = torch_generator(self.settings.seed, Stream.NOISE, rank, step)
        return self.noise_batch(self.part.latents[indices, :, 0].float(), self.labels[indices], generator)

    def noise_batch(self, latents: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return latents (B, C, H, W), labels (B,), and random noise and times: timesteps 0..999, or t of the flow."""
        count = len(latents)
        if self.is_diffusion and self.settings.data.times == "uniform":
            time = torch.randint(len(self.process), (count,), generator=generator)
        elif self.is_diffusion:
            share = sample_times((count,), generator, stratified=True)  # 1 after rounding, once in a million batches
            time = (share * len(self.process)).long().clamp(max=len(self.process) - 1)
        else:
            time = sample_times((count,), generator, mean=self.part.log_shift, stratified=True)
        noise = torch.randn(latents.shape, generator=generator)
        return {"latents": latents, "labels": labels, "noise": noise, "time": time}

    def errors(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the terms of the loss of each sample (B,), their sum as "loss"."""
        latents, noise, time = batch["latents"], batch["noise"], batch["time"]
        max_weight = self.settings.data.max_weight

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            return self.model(noisy, timestep, batch["labels"]).sample.float()

        with attention_kernels(self.device):
            if not self.is_diffusion:
                return {"loss": flow_matching(predict, latents, noise, time)}
            noisy = self.process.add_noise(latents, noise, time)
            return diffusion_loss(self.process, predict(noisy, time), noise, latents, noisy, time, max_weight)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        errors = {name: error.mean() for name, error in self.errors(batch).items()}
        return errors.pop("loss"), {f"loss_{name}": error.detach() for name, error in errors.items()}

    def pipeline(self) -> ClassToImagePipeline:
        """Return the pipeline of the present weights."""
        names = dict(enumerate(CLASSES))
        parts = self.model, self.vae, self.scheduler, names
        return ClassToImagePipeline(*parts, guidance_channels=None, guidance_scale=self.settings.data.guidance)

    def held_out_loss(self) -> float:
        """Return the mean loss on pictures that training never sees, always with the same noise."""
        latents, names = self.part.held_out
        labels = torch.tensor([CLASSES.index(name) for name in names])
        generator = torch_generator(self.settings.seed, Stream.HELD_OUT_NOISE)
        batch = self.noise_batch(latents[:, :, 0], labels, generator)
        return float(self.errors({name: value.to(self.device) for name, value in batch.items()})["loss"].mean())

    def sheet(self, path: Path, step: int) -> dict[str, float]:
        """Generate one picture of every class, always from the same noise. Returns the loss on held-out pictures."""
        pipeline, data = self.pipeline(), self.settings.data
        if self.is_diffusion:
            pipeline.scheduler = official_scheduler("ddim")
        draw_classes(pipeline, path, data.steps, data.guidance)
        return {"held_out_loss": self.held_out_loss()}

    def export(self, folder: Path) -> None:
        """Write transformer, scheduler and index; the VAE only where the folder lacks it."""
        if not (folder / "vae").exists():
            self.vae.register_to_config(_name_or_path="")
            self.vae.save_pretrained(folder / "vae")
        self.model.register_to_config(_name_or_path="")  # not a folder of this machine
        self.model.save_pretrained(folder / "transformer")
        self.scheduler.save_pretrained(folder / "scheduler")
        self.pipeline().save_config(folder)
        carry_config(folder)


def carry_config(folder: Path) -> None:
    """Write the configuration into the header of the weights, so that ComfyUI can load this file alone.

    The weights do not show the number of heads.
    """
    file = folder / "transformer" / SAFETENSORS_WEIGHTS_NAME
    config = json.dumps({"class_transformer": class_folder_config(folder)})
    write_tensors(file, load_file(file), {"format": "pt", "config": config})


def label_of(scene: object) -> int:
    """Return the class of a scene of one figure."""
    return CLASSES.index(class_name(scene))


def draw_classes(
    pipeline: ClassToImagePipeline | DiffiTImagePipeline, path: Path, steps: int, guidance: float
) -> None:
    """Write a sheet of one picture of every class, always from the same noise, to `path` as a PNG."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        list(range(len(CLASSES))),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch_generator(number) for number in range(len(CLASSES))],
        output_type="pt",
    ).images
    save_sheet(pictures * 2 - 1, path.with_suffix(".png"), columns=8)
