"""Pictures that show how far a run is: fixed prompts and seeds, PNG files with their settings, one sheet of all.

The VAE is loaded for each call and freed.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import free_memory
from PIL import Image, PngImagePlugin
from torch import Tensor

from ptdit_diffusers.core.files import new_file
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.pipelines.ptdit_text import join_text
from ptdit_diffusers.training.base_model import BaseModel, gpu_dtype
from ptdit_diffusers.training.data.media import UnreadableError, read_frames

from .config import LoRASettings, TrainingSettings
from .export import public_name

logger = logging.getLogger(__name__)

SHOWN_FRAMES = 5  # of a video
FRAME_MS = 125  # of a clip


@dataclass(frozen=True)
class Sampling:
    """How validation pictures are generated whose prompt does not say it."""

    steps: int
    guidance: float
    num_frames: int = 1


@torch.no_grad()
def generate_validation(
    transformer: PTDiTTransformer3DModel,
    base: BaseModel,
    embedding_of: Callable[[str], Tensor],
    settings: TrainingSettings,
    device: torch.device,
    sampling: Sampling,
) -> list[list[Image.Image]]:
    """Return the frames of each validation prompt: one of a picture, several of a clip.

    `embedding_of` gives the embedding (L, D) of a text.
    """
    vae = base.load_vae(gpu_dtype(device), device)
    pipe = PTDiTPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=base.scheduler)
    pipe.set_progress_bar_config(disable=True)
    side = settings.resolution or base.own_resolution
    mode = transformer.proxy_mode
    transformer.set_windows(proxy_mode="mean")
    found = []
    for prompt in settings.shown:
        text, mask = join_text([embedding_of(prompt.text)[None].to(device)], [None])
        guidance = sampling.guidance if prompt.guidance is None else prompt.guidance
        made = pipe(
            prompt_embeds=text,
            prompt_attention_mask=mask,
            negative_prompt_embeds=embedding_of(prompt.negative)[None].to(device) if guidance > 1 else None,
            height=prompt.height or side,
            width=prompt.width or side,
            num_frames=prompt.num_frames or sampling.num_frames,
            num_inference_steps=prompt.steps or sampling.steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(prompt.seed),
        )
        found.append([made.images[0]] if made.frames is None else made.frames[0])
    transformer.set_windows(proxy_mode=mode)
    del pipe, vae
    free_memory()
    return found


def check_prompts(settings: TrainingSettings, base: BaseModel) -> None:
    """Raise ValueError where a validation prompt asks for a size that the model cannot make."""
    token = 8 * base.transformer_config["patch_size"]
    for prompt in settings.shown:
        for option, value in (("w", prompt.width), ("h", prompt.height)):
            if value and value % token:
                low = max(token, value // token * token)
                raise ValueError(
                    f"validation_prompts: --{option} {value} is not a multiple of {token} (VAE 8 x patch "
                    f"{token // 8}); nearest: {low} or {low + token}."
                )


def strip(frames: list[Image.Image]) -> Image.Image:
    """Return some frames of a video, first and last included, side by side."""
    count = min(SHOWN_FRAMES, len(frames))
    shown = [frames[round(index * (len(frames) - 1) / max(1, count - 1))] for index in range(count)]
    width, height = shown[0].size
    found = Image.new("RGB", (count * width, height))
    for index, frame in enumerate(shown):
        found.paste(frame, (index * width, 0))
    return found


def save_validation(
    found: list[list[Image.Image]], path: Path, step: int, settings: TrainingSettings, sampling: Sampling
) -> list[Image.Image]:
    """Write the pictures as `path`-INDEX.png with their settings in the metadata, and return them.

    Of a clip it is a strip of SHOWN_FRAMES frames, and all of them lie beside it as `path`-INDEX.webp.
    """
    pictures = []
    for index, (frames, prompt) in enumerate(zip(found, settings.shown, strict=True)):
        info = PngImagePlugin.PngInfo()
        facts = {"prompt": prompt.text, "seed": prompt.seed, "step": step, "base": public_name(settings.base)}
        facts["steps"] = prompt.steps or sampling.steps
        facts["guidance"] = sampling.guidance if prompt.guidance is None else prompt.guidance
        facts |= {"negative_prompt": prompt.negative} if prompt.negative else {}
        for name, value in facts.items():
            info.add_text(name, str(value))
        pictures.append(strip(frames))
        with new_file(path.with_name(f"{path.name}-{index}.png")) as temporary:
            pictures[-1].save(temporary, format="PNG", pnginfo=info)
        if len(frames) > 1:
            with new_file(path.with_name(f"{path.name}-{index}.webp")) as temporary:
                options = {"save_all": True, "append_images": frames[1:], "duration": FRAME_MS, "loop": 0}
                frames[0].save(temporary, format="WEBP", quality=90, **options)
    return pictures


def quarter_steps(max_steps: int) -> list[int]:
    """Return the steps at 0, 25, 50 and 100 % of a run, each once."""
    return sorted({0, max_steps // 4, max_steps // 2, max_steps})


def read_prompts(path: str, setting: str = "prior_prompts") -> list[str]:
    """Return the prompts of a file, one in each line; none for "". `setting` is its name in messages.

    Raises:
        ValueError: The file is empty or not UTF-8.
        OSError: It cannot be read.
    """
    if not path:
        return []
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{setting} {path} is not UTF-8: {error}.") from error
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{setting} {path} holds no prompts.")
    return prompts


def generate_prior(base: BaseModel, settings: LoRASettings, device: torch.device) -> list[tuple[Path, str]]:
    """Let the base model generate a picture of each prompt of `prior_prompts`; pictures that exist stay.

    The name of a picture holds everything that it depends on: prompt, seed, size, and the weights of the base model.

    Returns:
        The pictures with their prompts.

    Raises:
        ValueError: The file of prompts is empty or not UTF-8.
    """
    prompts = read_prompts(settings.prior_prompts)
    side = settings.resolution or base.own_resolution
    made_by = base.fingerprint("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    folder, pictures, missing = settings.cache_folder / "prior", [], []
    for index, prompt in enumerate(prompts):
        facts = json.dumps([made_by, prompt, settings.seed + index, side])
        path = folder / f"{index:04d}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.png"
        pictures.append((path, prompt))
        missing += [] if is_readable(path) else [index]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        logger.info("the base model generates %d pictures to keep", len(missing))
        pipe = PTDiTPipeline.from_pretrained(base.folder).to(device)
        pipe.set_progress_bar_config(disable=True)
        for index in missing:
            path, prompt = pictures[index]
            generator = torch.Generator().manual_seed(settings.seed + index)
            picture = pipe(prompt, height=side, width=side, generator=generator).images[0]
            info = PngImagePlugin.PngInfo()
            for name, value in {"prompt": prompt, "seed": settings.seed + index}.items():
                info.add_text(name, str(value))
            with new_file(path) as temporary:
                picture.save(temporary, format="PNG", pnginfo=info)
        del pipe
        free_memory()
    return pictures


def is_readable(path: Path) -> bool:
    """Return whether a picture is there and whole."""
    try:
        return path.is_file() and bool(read_frames(path, 1))
    except UnreadableError:
        return False
