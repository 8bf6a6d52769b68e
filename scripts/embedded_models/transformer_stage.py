"""Stage "transformer": PT-DiT learns to draw what captions say, in the latents of the frozen VAE.

Rectified flow as the official training: logit-normal time, resolution-dependent shift, target x0 - noise on the first
half of the output channels. Must not know the verifier.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from ptdit_diffusers.core.sampling import choose_windows
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.pipelines.ptdit_base import PTDiTPipelineOutput
from ptdit_diffusers.training.parts import attention_kernels
from ptdit_diffusers.training.settings import LoopSettings
from ptdit_diffusers.training.stage import numpy_generator, torch_generator
from scripts.datasets.registry import find_data_set
from scripts.embedded_models.latents import EncodedPart, PartSettings
from scripts.embedded_models.layout_head import LayoutHead
from scripts.embedded_models.vae_stage import save_sheet


@dataclass(kw_only=True)
class ModelSettings:
    """Sizes of the transformer; the other fields of its configuration keep their defaults."""

    num_attention_heads: int = 3
    attention_head_dim: int = 64
    num_layers: int = 6
    window_size: tuple[int, int, int] = (1, 2, 2)
    proxy_ratio: tuple[int, int, int] = (1, 2, 2)
    start: str = ""  # transformer folder to go on from; "" = new weights


@dataclass(kw_only=True)
class DataSettings:
    """What is learnt from, captions and time."""

    components: str  # diffusers folder with text_encoder/, tokenizer/ and vae/ from the stages before
    parts: tuple[PartSettings, ...] = (PartSettings(),)
    caption_dropout: float = 0.1  # share of samples trained with an empty caption, for guidance
    base_tokens: int = 28  # tokens at which the time shift is 1; fewer give more steps to high noise, which lays out
    caption_tokens: int = 48  # captions are padded to this many tokens: one shape, compiled once
    layout_weight: float = 0.0  # of the layout loss: what stands at each token, read off a middle block
    steps: int = 30  # of the sample sheets
    guidance: float = 4.0  # of the sample sheets


@dataclass(kw_only=True)
class Settings(LoopSettings):
    """Settings of the stage."""

    compile: bool = False  # torch.compile the blocks: slow to begin, then twice as fast on a CPU
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings


class TransformerStage:
    """Flow matching on encoded scenes with captions that are written anew for each sample."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        folder = Path(settings.data.components)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.text_encoder = T5EncoderModel.from_pretrained(folder / "text_encoder").eval().requires_grad_(False)
        self.text_encoder.to(device)
        self.vae = AutoencoderKLOpenSoraPlan.from_pretrained(folder / "vae").eval().requires_grad_(False).to(device)
        latent, window = settings.data.parts[0].size // 8, settings.model.window_size
        size = {"sample_size": latent, "num_windows": (latent // 2) ** 2 // (window[1] * window[2])}
        windows = {"window_size": window, "proxy_ratio": settings.model.proxy_ratio}
        if settings.model.start:  # size and windows are no weights: a model of pictures may go on with windows in time
            transformer = PTDiTTransformer3DModel.from_pretrained(settings.model.start, **windows, **size)
            check_sizes(settings.model, transformer)
        else:
            sizes = {name: value for name, value in asdict(settings.model).items() if name != "start"}
            transformer = PTDiTTransformer3DModel(**sizes, **size, caption_channels=self.text_encoder.config.d_model)
        shown = kinds(settings.data.parts)
        numbers = find_data_set(settings.data.parts[0].world).layout_numbers  # the same for the same kinds
        self.transformer, self.layout = transformer, LayoutHead(transformer, len(shown), numbers)
        self.model = torch.nn.ModuleDict({"transformer": transformer, "layout": self.layout}).to(device)
        if settings.compile:
            transformer.compile_repeated_blocks(dynamic=False)
        self.scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=settings.data.base_tokens
        )
        self.parts = [
            EncodedPart(part, settings.seed, self.vae, Path(settings.output_dir), settings.data.base_tokens)
            for part in settings.data.parts
        ]
        transformer.register_to_config(sample_frames=max(part.frames for part in self.parts))

    def batch(self, step: int, rank: int, batch_size: int) -> dict[str, Tensor]:
        data = self.settings.data
        shares = numpy.array([part.share for part in data.parts])
        which = numpy_generator(self.settings.seed, 6, step).choice(len(shares), p=shares / shares.sum())
        choice = numpy_generator(self.settings.seed, 7, rank, step)  # all processes take the same part
        generator = torch_generator(self.settings.seed, 8, rank, step)
        part, size = self.parts[which], data.parts[which].batch_size or batch_size
        latents, captions, layouts = part.draw(choice, size, data.caption_dropout)
        return {**self.task(part, latents, captions, generator), "layout": layouts}

    def task(
        self, part: EncodedPart, latents: Tensor, captions: list[str], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Latents, their captions as ids and mask, and random noise and time."""
        length = self.settings.data.caption_tokens
        tokens = self.tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt")
        count = len(latents)  # one time in each of as many equal shares of the distribution: less noise than at random
        shares = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        normal = torch.special.ndtri(shares)
        return {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),
            "time": torch.sigmoid(normal + part.log_shift),  # logit-normal; the shift by r adds ln r to the logit
            "input_ids": tokens.input_ids,
            "mask": tokens.attention_mask.bool(),
        }

    def flow_error(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean square error of the flow of each sample (B,)."""
        with torch.no_grad():
            text = self.text_encoder(batch["input_ids"], attention_mask=batch["mask"]).last_hidden_state
        time = batch["time"][:, None, None, None, None]
        noisy = (1 - time) * batch["latents"] + time * batch["noise"]
        windows = choose_windows(self.transformer, "auto", "auto", *noisy.shape[-2:])
        with attention_kernels(self.device):
            sample = self.transformer(noisy, text, batch["time"] * 1000, batch["mask"], **windows).sample
        flow = self.transformer.flow(sample)
        return F.mse_loss(flow, batch["noise"] - batch["latents"], reduction="none").mean((1, 2, 3, 4))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        error = self.flow_error(batch)
        early = batch["time"] > 0.7
        numbers = {"loss_flow": error.mean().detach()}
        numbers["loss_noisy"] = (error * early).sum().detach() / early.sum().clamp(min=1)
        layout, shapes_right = self.layout.loss(batch["layout"])
        numbers |= {"loss_layout": layout.detach(), "layout_shapes": shapes_right}
        return error.mean() + self.settings.data.layout_weight * layout, numbers

    def pipeline(self) -> PTDiTPipeline:
        """The pipeline of the components at hand."""
        return PTDiTPipeline(self.tokenizer, self.text_encoder, self.vae, self.transformer, self.scheduler)

    def held_out_loss(self, part: EncodedPart) -> float:
        """Mean error of the flow on things that training never sees, with always the same noise and times."""
        task = self.task(part, *part.held_out, torch_generator(self.settings.seed, 10))
        size = part.settings.batch_size or self.settings.batch_size
        batches = zip(*(value.to(self.device).split(size) for value in task.values()), strict=True)
        errors = [self.flow_error(dict(zip(task, batch, strict=True))) for batch in batches]
        return float(torch.cat(errors).mean())

    def sheet(self, path: Path) -> dict[str, float]:
        """Held-out prompts of each part, always the same, with their texts beside: 32 pictures, 8 series as strips.

        Returns the loss on held-out things of each part: when it rises while the other falls, samples are learnt by
        heart.
        """
        data, losses = self.settings.data, {}
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        for settings, part in zip(data.parts, self.parts, strict=True):
            choice = numpy_generator(self.settings.seed, 9)
            count = 32 if part.length == 1 else 8
            held_out = [part.world.sample(choice, held_out=True) for _ in range(count)]
            prompts = [part.world.describe(thing, choice)[0] for thing in held_out]
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
            rows, columns = strips(result)
            save_sheet(rows[:, :, None] * 2 - 1, name.with_suffix(".png"), columns)
            name.with_suffix(".txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        return losses

    def export(self, folder: Path) -> None:
        """Write transformer, scheduler and index; the other components only where the folder lacks them.

        A decoder that was trained further in the meantime stays.
        """
        pipeline = self.pipeline()
        for name in ("tokenizer", "text_encoder", "vae"):
            if not (folder / name).exists():
                getattr(self, name).save_pretrained(folder / name)
        self.transformer.register_to_config(_name_or_path="")  # not where this machine keeps what it started from
        self.transformer.save_pretrained(folder / "transformer")
        self.scheduler.save_pretrained(folder / "scheduler")
        pipeline.save_config(folder)


def strips(result: PTDiTPipelineOutput) -> tuple[Tensor, int]:
    """Pictures (B F, 3, H, W) of a result of tensors, row by row, and how many stand in a row."""
    if result.images is not None:
        return result.images, 8
    series = result.views if result.frames is None else result.frames[:, ::2]
    return series.flatten(0, 1), series.shape[1]


def kinds(parts: Sequence[PartSettings]) -> tuple[str, ...]:
    """What may stand at a token in all parts.

    Raises:
        ValueError: the parts are of worlds that do not show the same kinds of things.
    """
    found = {find_data_set(part.world).layout_kinds for part in parts}
    if len(found) > 1:
        names = ", ".join(sorted({part.world for part in parts}))
        raise ValueError(
            f"data.parts are of the worlds {names}, which show different things; train them one after another."
        )
    return found.pop()


def check_sizes(asked: ModelSettings, transformer: PTDiTTransformer3DModel) -> None:
    """Raise ValueError where a transformer to go on from has other sizes than the settings say."""
    for name, value in asdict(asked).items():
        if name != "start" and (found := getattr(transformer.config, name)) not in (
            value,
            list(value) if isinstance(value, tuple) else value,
        ):
            raise ValueError(f"model.{name}={value} but {asked.start} has {name}={found}; set it to that.")


def build(settings: Settings, device: torch.device) -> TransformerStage:
    """Make the stage."""
    return TransformerStage(settings, device)
