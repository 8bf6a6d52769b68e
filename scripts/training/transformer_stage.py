"""Stage "transformer": PT-DiT learns to draw what captions say, in the latents of the frozen VAE.

Rectified flow as the official training: logit-normal time, resolution-dependent shift, target x0 - noise on the first
half of the output channels. Must not know the verifier.
"""

import hashlib
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, T5EncoderModel

from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from scripts.drawn_world import BACKGROUNDS, SHAPES, Scene, describe, render, sample_scene
from scripts.training.config import LoopSettings
from scripts.training.parts import attention_kernels
from scripts.training.stage import numpy_generator, torch_generator
from scripts.training.vae_stage import save_sheet, to_pixels


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
    """Pictures, captions and time."""

    components: str  # diffusers folder with text_encoder/, tokenizer/ and vae/ from the stages before
    size: int = 128  # side of the pictures in pixels
    scenes: int = 32768  # pictures that are drawn and encoded before training; captions are always new
    world: int = 2  # first number of the seeds of the scenes
    caption_dropout: float = 0.1  # share of samples trained with an empty caption, for guidance
    base_tokens: int = 28  # tokens at which the time shift is 1; fewer give more steps to high noise, which lays out
    caption_tokens: int = 48  # captions are padded to this many tokens: one shape, compiled once
    layout_weight: float = 0.0  # of the layout loss: what stands at each token, read off a middle block
    steps: int = 30  # of the sample sheets
    guidance: float = 4.0  # of the sample sheets


@dataclass(kw_only=True)
class Settings(LoopSettings):
    """Settings of the stage."""

    compile: bool = False  # torch.compile the network: slow to begin, then twice as fast on a CPU
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
        latent = settings.data.size // 8
        window = settings.model.window_size
        if settings.model.start:
            transformer = PTDiTTransformer3DModel.from_pretrained(settings.model.start)
            check_sizes(settings.model, transformer)
        else:
            sizes = {name: value for name, value in asdict(settings.model).items() if name != "start"}
            transformer = PTDiTTransformer3DModel(
                **sizes,
                sample_size=latent,
                caption_channels=self.text_encoder.config.d_model,
                num_windows=(latent // 2) ** 2 // (window[1] * window[2]),
            )
        self.transformer, self.layout = transformer, LayoutHead(transformer)
        self.model = torch.nn.ModuleDict({"transformer": transformer, "layout": self.layout}).to(device)
        self.network = torch.compile(transformer, dynamic=False) if settings.compile else transformer
        self.scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=settings.data.base_tokens
        )
        self.log_shift = math.log((latent // 2) ** 2 / settings.data.base_tokens) / 2  # ln r, as the pipeline has it
        self.latents = self.encode_scenes()

    def scene(self, index: int) -> Scene:
        """Scene `index` of the training set."""
        return sample_scene(numpy_generator(self.settings.data.world, self.settings.seed, index), held_out=False)

    def encode_scenes(self) -> Tensor:
        """Latents (scenes, 4, 1, H/8, W/8) of the training set, float16 on the CPU; kept in the run's folder.

        Each process draws and encodes its share; all of them read everything.
        """
        data, state = self.settings.data, PartialState()
        folder = Path(self.settings.output_dir) / f"latents-{self.fingerprint()}"
        folder.mkdir(parents=True, exist_ok=True)
        shares = torch.arange(data.scenes).tensor_split(state.num_processes)
        files = [folder / f"scenes-{int(share[0])}-{int(share[-1])}.safetensors" for share in shares]
        if not files[state.process_index].exists():
            latents = self.encode(shares[state.process_index].tolist())
            temporary = files[state.process_index].with_suffix(".tmp")
            save_file({"latents": latents}, temporary)
            temporary.replace(files[state.process_index])
        state.wait_for_everyone()
        return torch.cat([load_file(file)["latents"] for file in files])

    def fingerprint(self) -> str:
        """Eight digits that change with the VAE's encoder or the scenes, so that stale latents are never read."""
        data = self.settings.data
        digest = hashlib.sha256(f"{data.size} {data.world} {self.settings.seed}".encode())
        for module in (self.vae.encoder, self.vae.quant_conv):
            for value in module.state_dict().values():
                digest.update(value.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:8]

    @torch.no_grad()
    def encode(self, indices: list[int]) -> Tensor:
        """Scaled posterior means of scenes."""
        latents, batch = [], 32
        for start in tqdm(range(0, len(indices), batch), desc="encoding scenes", mininterval=10):
            pictures = [render(self.scene(index), self.settings.data.size) for index in indices[start : start + batch]]
            posterior = self.vae.encode(to_pixels(numpy.stack(pictures)).to(self.device)).latent_dist
            latents.append((posterior.mode() * self.vae.config.scaling_factor).half().cpu())
        return torch.cat(latents)

    def batch(self, step: int, rank: int, batch_size: int) -> dict[str, Tensor]:
        data = self.settings.data
        choice = numpy_generator(self.settings.seed, 7, rank, step)
        generator = torch_generator(self.settings.seed, 8, rank, step)
        indices = choice.integers(0, data.scenes, batch_size)
        captions = [
            "" if choice.random() < data.caption_dropout else describe(self.scene(int(i)), choice)[0] for i in indices
        ]
        layouts = [layout_targets(self.scene(int(i)), data.size // 16) for i in indices]
        tokens = self.tokenizer(captions, padding="max_length", max_length=data.caption_tokens, return_tensors="pt")
        latents = self.latents[torch.from_numpy(indices)].float()
        normal = torch.randn(batch_size, generator=generator)
        return {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),
            "time": torch.sigmoid(normal + self.log_shift),  # logit-normal; the shift by r adds ln r to the logit
            "input_ids": tokens.input_ids,
            "mask": tokens.attention_mask.bool(),
            "layout": torch.from_numpy(numpy.stack(layouts)),
        }

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            text = self.text_encoder(batch["input_ids"], attention_mask=batch["mask"]).last_hidden_state
        time = batch["time"][:, None, None, None, None]
        noisy = (1 - time) * batch["latents"] + time * batch["noise"]
        with attention_kernels(self.device):
            sample = self.network(noisy, text, batch["time"] * 1000, batch["mask"], return_dict=False)[0]
        flow = self.transformer.flow(sample)
        error = F.mse_loss(flow, batch["noise"] - batch["latents"], reduction="none").mean((1, 2, 3, 4))
        early = batch["time"] > 0.7
        numbers = {"loss_flow": error.mean().detach()}
        numbers["loss_noisy"] = (error * early).sum().detach() / early.sum().clamp(min=1)
        layout, shapes_right = self.layout.loss(batch["layout"])
        numbers |= {"loss_layout": layout.detach(), "layout_shapes": shapes_right}
        return error.mean() + self.settings.data.layout_weight * layout, numbers

    def pipeline(self) -> PTDiTPipeline:
        """The pipeline of the components at hand."""
        return PTDiTPipeline(self.tokenizer, self.text_encoder, self.vae, self.transformer, self.scheduler)

    def sheet(self, path: Path) -> dict[str, float]:
        """32 held-out prompts, always the same, with their text beside the picture."""
        choice = numpy_generator(self.settings.seed, 9)
        prompts = [describe(sample_scene(choice, held_out=True), choice)[0] for _ in range(32)]
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        pictures = pipeline(
            prompts,
            height=self.settings.data.size,
            width=self.settings.data.size,
            num_inference_steps=self.settings.data.steps,
            guidance_scale=self.settings.data.guidance,
            generator=[torch_generator(i) for i in range(len(prompts))],
            output_type="pt",
        ).images
        save_sheet(pictures[:, :, None] * 2 - 1, path.with_suffix(".png"), columns=8)
        path.with_suffix(".txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        return {}

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


def check_sizes(asked: ModelSettings, transformer: PTDiTTransformer3DModel) -> None:
    """Raise ValueError where a transformer to go on from has other sizes than the settings say."""
    for name, value in asdict(asked).items():
        if name != "start" and (found := getattr(transformer.config, name)) not in (
            value,
            list(value) if isinstance(value, tuple) else value,
        ):
            raise ValueError(f"model.{name}={value} but {asked.start} has {name}={found}; set it to that.")


class LayoutHead(torch.nn.Module):
    """Reads off a middle block what stands at each token; a training aid that is not part of the exported model.

    It teaches the blocks before it to know figures instead of textures, in the manner of representation alignment
    (arXiv 2410.06940), with the drawn scene in place of another network's features.
    """

    def __init__(self, transformer: PTDiTTransformer3DModel) -> None:
        super().__init__()
        blocks = transformer.transformer_blocks
        width = transformer.proj_out.in_features
        self.read = torch.nn.Sequential(
            torch.nn.LayerNorm(width),
            torch.nn.Linear(width, width),
            torch.nn.GELU(),
            torch.nn.Linear(width, len(SHAPES) + 1 + len(BACKGROUNDS) + 3),
        )
        blocks[(len(blocks) - 1) // 2].register_forward_hook(self.keep)

    def keep(self, block: torch.nn.Module, arguments: tuple, output: Tensor) -> None:
        """Remember the block's output (B, N, D) until `loss`."""
        self.tokens = output

    def loss(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropies of shape and colour plus the distance error, and the share of right shapes on figures.

        Args:
            targets: (B, N, 5) from `layout_targets`.
        """
        shapes, colours, place = self.read(self.tokens).float().split([len(SHAPES) + 1, len(BACKGROUNDS), 3], dim=-1)
        shape, colour = targets[..., 0].long(), targets[..., 1].long()
        figure = shape > 0
        error = F.cross_entropy(shapes.flatten(0, 1), shape.flatten())
        error = error + F.cross_entropy(colours.flatten(0, 1), colour.flatten())
        distance = F.smooth_l1_loss(place, targets[..., 2:], reduction="none").mean(-1)
        right = (shapes.argmax(-1) == shape) & figure
        self.tokens = None
        return error + (distance * figure).sum() / figure.sum().clamp(min=1), right.sum() / figure.sum().clamp(min=1)


def layout_targets(scene: Scene, side: int) -> numpy.ndarray:
    """What stands at each of side x side tokens: float32 (side * side, 5).

    Columns: shape (0 = background, else 1 + index in SHAPES), colour (index in BACKGROUNDS), and for figures the
    centre's distance right and down and the radius, in tokens. A smaller figure hides a larger one around it.
    """
    centres = (numpy.arange(side) + 0.5) / side
    x, y = (axis.ravel() for axis in numpy.meshgrid(centres, centres))
    targets = numpy.zeros((side * side, 5), dtype=numpy.float32)
    targets[:, 1] = BACKGROUNDS.index(scene.background)
    figures = [(thing, group) for group in scene.groups for thing in group.things]
    for thing, group in sorted(figures, key=lambda item: -item[0].radius):
        here = numpy.hypot(x - thing.x, y - thing.y) < thing.radius + 0.25 / side
        targets[here, 0] = 1 + SHAPES.index(group.shape)
        targets[here, 1] = BACKGROUNDS.index(group.colour)
        targets[here, 2] = (thing.x - x[here]) * side
        targets[here, 3] = (thing.y - y[here]) * side
        targets[here, 4] = thing.radius * side
    return targets


def build(settings: Settings, device: torch.device) -> TransformerStage:
    """Make the stage."""
    return TransformerStage(settings, device)
