"""Stage "transformer": a denoiser learns to generate what captions describe, in the latents of the frozen VAE.

Rectified flow as in the official training: logit-normal times, shifted by resolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from einops import rearrange
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from ptdit_diffusers.core.devices import check_compiler
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.pipelines.ptdit_base import PTDiTPipelineOutput
from ptdit_diffusers.training.objective import flow_matching, sample_times
from ptdit_diffusers.training.processes import attention_kernels
from ptdit_diffusers.training.randomness import Stream, numpy_generator, torch_generator
from ptdit_diffusers.training.settings import LoopSettings
from ptdit_diffusers.training.task import Task
from scripts.datasets.registry import find_data_set
from scripts.embedded_models.denoisers import DenoiserSettings, make_denoiser
from scripts.embedded_models.latents import EncodedPart, PartSettings
from scripts.embedded_models.layout_head import LayoutHead
from scripts.embedded_models.vae_stage import save_sheet

FROZEN = ("tokenizer", "text_encoder", "vae")  # components from the stages before


@dataclass(kw_only=True)
class TransformerDataSettings:
    """Training data, captions and times."""

    components: str  # diffusers folder with text_encoder/, tokenizer/ and vae/ from the stages before
    parts: tuple[PartSettings, ...] = (PartSettings(),)
    caption_dropout: float = 0.1  # share of samples trained with an empty caption, for guidance
    base_tokens: int = 28  # tokens at which the time shift is 1; fewer give more steps to high noise, which lays out
    caption_tokens: int = 48  # captions are padded to this many tokens: one shape, compiled once
    layout_weight: float = 0.0  # of the layout loss: a middle block predicts what stands at each token
    steps: int = 30  # of the sample sheets
    guidance: float = 4.0  # of the sample sheets


@dataclass(kw_only=True)
class TransformerStageSettings(LoopSettings):
    """Settings of the stage."""

    compile: bool = False  # torch.compile the blocks: slow to begin, then twice as fast on a CPU
    model: DenoiserSettings = field(default_factory=DenoiserSettings)
    data: TransformerDataSettings


class TransformerStage(Task):
    """Flow matching on encoded samples with captions that are written anew each time."""

    settings_type = TransformerStageSettings

    def __init__(self, settings: TransformerStageSettings, device: torch.device) -> None:
        self.settings, self.device, data = settings, device, settings.data
        if settings.compile:
            check_compiler(device)
        folder = Path(data.components)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.text_encoder = T5EncoderModel.from_pretrained(folder / "text_encoder").eval().requires_grad_(False)
        self.text_encoder.to(device)
        self.vae = AutoencoderKLOpenSoraPlan.from_pretrained(folder / "vae").eval().requires_grad_(False).to(device)
        kinds, numbers = layout_of(data.parts)
        output = Path(settings.output_dir)
        self.parts = [EncodedPart(part, settings.seed, self.vae, output, data.base_tokens) for part in data.parts]
        self.denoiser = make_denoiser(
            settings.model,
            latent=data.parts[0].size // 8,
            frames=max(part.frames for part in self.parts),
            caption_channels=self.text_encoder.config.d_model,
        )
        self.transformer = self.denoiser.network
        self.layout = LayoutHead(self.denoiser.middle, self.denoiser.width, len(kinds), numbers)
        self.model = torch.nn.ModuleDict({"transformer": self.transformer, "layout": self.layout}).to(device)
        if settings.compile:
            self.transformer.compile_repeated_blocks(dynamic=False)
        self.scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=data.base_tokens
        )

    def batch(self, step: int, rank: int, batch_size: int) -> dict[str, Tensor]:
        seed, data = self.settings.seed, self.settings.data
        shares = np.array([part.share for part in data.parts])
        choice = numpy_generator(seed, Stream.PART, step)  # without the rank: all processes take the same part
        which = choice.choice(len(shares), p=shares / shares.sum())
        part, size = self.parts[which], data.parts[which].batch_size or batch_size
        choice = numpy_generator(seed, Stream.SAMPLES, rank, step)
        latents, captions, layouts = part.random_batch(choice, size, data.caption_dropout)
        generator = torch_generator(seed, Stream.NOISE, rank, step)
        return {**self.noise_batch(part, latents, captions, generator), "layout": layouts}

    def noise_batch(
        self, part: EncodedPart, latents: Tensor, captions: list[str], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return latents, their captions as ids and mask, and random noise and times."""
        length = self.settings.data.caption_tokens
        tokens = self.tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt")
        time = sample_times((len(latents),), generator, mean=part.log_shift, stratified=True)
        return {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),
            "time": time,
            "input_ids": tokens.input_ids,
            "mask": tokens.attention_mask.bool(),
        }

    def flow_error(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean square error of the flow of each sample (B,)."""
        mask = batch["mask"]
        with torch.no_grad():
            text = self.text_encoder(batch["input_ids"], attention_mask=mask).last_hidden_state

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            return self.denoiser.predict(noisy, timestep, text, mask)

        with attention_kernels(self.device):
            return flow_matching(predict, batch["latents"], batch["noise"], batch["time"])

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        error = self.flow_error(batch)
        early = batch["time"] > 0.7
        numbers = {"loss_flow": error.mean().detach()}
        numbers["loss_noisy"] = (error * early).sum().detach() / early.sum().clamp(min=1)
        layout, kinds_right = self.layout.loss(batch["layout"])
        numbers |= {"loss_layout": layout.detach(), "layout_shapes": kinds_right}
        return error.mean() + self.settings.data.layout_weight * layout, numbers

    def pipeline(self) -> DiffusionPipeline:
        """Return the pipeline of the present weights."""
        return self.denoiser.pipeline(**{name: getattr(self, name) for name in (*FROZEN, "scheduler")})

    def held_out_loss(self, part: EncodedPart) -> float:
        """Return the mean error of the flow on samples that training never sees, always with the same noise."""
        held_out = self.noise_batch(part, *part.held_out, torch_generator(self.settings.seed, Stream.HELD_OUT_NOISE))
        size = part.settings.batch_size or self.settings.batch_size
        batches = zip(*(value.to(self.device).split(size) for value in held_out.values()), strict=True)
        errors = [self.flow_error(dict(zip(held_out, batch, strict=True))) for batch in batches]
        return float(torch.cat(errors).mean())

    def sheet(self, path: Path, step: int) -> dict[str, float]:
        """Generate 32 pictures or 8 series for held-out prompts of each part, always the same; prompts go to a file.

        Returns the loss on held-out samples of each part: where it rises while the other falls, samples are memorized.
        """
        data, losses = self.settings.data, {}
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        for settings, part in zip(data.parts, self.parts, strict=True):
            choice = numpy_generator(self.settings.seed, Stream.SHEET)
            count = 32 if part.length == 1 else 8
            held_out = [part.data_set.sample(choice, held_out=True) for _ in range(count)]
            prompts = [part.data_set.describe(sample, choice)[0] for sample in held_out]
            result = pipeline(
                prompts,
                height=settings.size,
                width=settings.size,
                **part.pipeline_arguments,
                num_inference_steps=data.steps,
                guidance_scale=data.guidance,
                generator=[torch_generator(i) for i in range(count)],
                output_type="pt",
            )
            label = f"{settings.world}-{settings.size}" + (f"-{settings.length}" if settings.length else "")
            losses[f"held_out_loss_{label}"] = self.held_out_loss(part)
            name = path.with_name(f"{path.name}-{label}")
            pictures, columns = pictures_of(result)
            save_sheet(pictures * 2 - 1, name.with_suffix(".png"), columns)
            name.with_suffix(".txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        return losses

    def export(self, folder: Path) -> None:
        """Write transformer, scheduler and index; the other components only where the folder lacks them.

        So a decoder that was trained further in the meantime stays.
        """
        pipeline = self.pipeline()
        for name in FROZEN:
            if not (folder / name).exists():
                getattr(self, name).save_pretrained(folder / name)
        self.transformer.register_to_config(_name_or_path="")  # not a folder of this machine
        self.transformer.save_pretrained(folder / "transformer")
        self.scheduler.save_pretrained(folder / "scheduler")
        pipeline.save_config(folder)


def pictures_of(result: PTDiTPipelineOutput) -> tuple[Tensor, int]:
    """Return the pictures (B F, 3, H, W) of a result of tensors, row by row, and how many stand in a row."""
    if result.images is not None:
        return result.images, 8
    series = result.views if result.frames is None else result.frames[:, ::2]
    return rearrange(series, "b f c h w -> (b f) c h w"), series.shape[1]


def layout_of(parts: Sequence[PartSettings]) -> tuple[tuple[str, ...], int]:
    """Return what may stand at a token in all parts, and how many numbers the layout has of each token.

    Raises:
        ValueError: The data sets of the parts show different kinds of objects.
    """
    data_sets = [find_data_set(part.world) for part in parts]
    if len({data_set.layout_kinds for data_set in data_sets}) > 1:
        names = ", ".join(sorted({part.world for part in parts}))
        raise ValueError(
            f"data.parts are of the data sets {names}, which show different things; train them one after another."
        )
    return data_sets[0].layout_kinds, data_sets[0].layout_numbers
