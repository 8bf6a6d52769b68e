"""Pictures that show how far a run is: fixed prompts and seeds, PNG files with their settings, one sheet of all.

Text embeddings come from the cache; the VAE is loaded for each call and freed.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import free_memory
from PIL import Image, PngImagePlugin

from ptdit_diffusers.core.files import new_file
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.pipelines.ptdit_text import join_text
from ptdit_diffusers.training.base_model import BaseModel, gpu_dtype
from ptdit_diffusers.training.data.media import UnreadableError, read_frames

from .cache import Cache
from .config import LoRASettings, TrainingSettings
from .export import public_name

logger = logging.getLogger(__name__)

SHOWN_FRAMES = 5  # of a video


@dataclass(frozen=True)
class Sampling:
    """How validation pictures are generated."""

    steps: int
    guidance: float
    num_frames: int = 1


@torch.no_grad()
def generate_validation(
    transformer: PTDiTTransformer3DModel,
    base: BaseModel,
    cache: Cache,
    settings: TrainingSettings,
    device: torch.device,
    sampling: Sampling,
) -> list[Image.Image]:
    """Return one picture per validation prompt; picture i has the seed `validation_seed` + i.

    Of videos it is a strip of SHOWN_FRAMES frames.
    """
    vae = base.load_vae(gpu_dtype(device), device)
    pipe = PTDiTPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=base.scheduler)
    pipe.set_progress_bar_config(disable=True)
    empty = cache.text("")[None].to(device)
    side = settings.resolution or base.own_resolution
    mode = transformer.proxy_mode
    transformer.set_windows(proxy_mode="mean")
    pictures = []
    for index, prompt in enumerate(settings.validation_prompts):
        text, mask = join_text([cache.text(prompt)[None].to(device)], [None])
        made = pipe(
            prompt_embeds=text,
            prompt_attention_mask=mask,
            negative_prompt_embeds=empty if sampling.guidance > 1 else None,
            height=side,
            width=side,
            num_frames=sampling.num_frames,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=torch.Generator().manual_seed(settings.validation_seed + index),
        )
        pictures.append(made.images[0] if made.frames is None else strip(made.frames[0]))
    transformer.set_windows(proxy_mode=mode)
    del pipe, vae
    free_memory()
    return pictures


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
    pictures: list[Image.Image], path: Path, step: int, settings: TrainingSettings, sampling: Sampling
) -> None:
    """Write pictures as `path`-INDEX.png, each with prompt, seed and step in its metadata."""
    for index, picture in enumerate(pictures):
        info = PngImagePlugin.PngInfo()
        facts = {"prompt": settings.validation_prompts[index], "seed": settings.validation_seed + index, "step": step}
        facts |= {
            "base": public_name(settings.base),
            "steps": sampling.steps,
            "guidance": sampling.guidance,
        }
        for name, value in facts.items():
            info.add_text(name, str(value))
        with new_file(path.with_name(f"{path.name}-{index}.png")) as temporary:
            picture.save(temporary, format="PNG", pnginfo=info)


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
