"""Pictures that show how far a run is: fixed prompts and seeds, PNG files with their settings, one sheet of all.

Text embeddings come from the cache; the VAE is loaded for each call and freed.
"""

import hashlib
import json
import logging
from pathlib import Path

import torch
from diffusers.training_utils import free_memory
from PIL import Image, ImageDraw, PngImagePlugin

from ptdit_diffusers.core.files import new_file
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.pipelines.ptdit_text import join_text
from ptdit_diffusers.training.base_model import BaseModel, gpu_dtype
from ptdit_diffusers.training.data.media import UnreadableError, read_frames

from .cache import Cache
from .config import LoRASettings
from .export import public_name

logger = logging.getLogger(__name__)


@torch.no_grad()
def generate_validation(
    transformer: PTDiTTransformer3DModel, base: BaseModel, cache: Cache, settings: LoRASettings, device: torch.device
) -> list[Image.Image]:
    """Return one picture per validation prompt; picture i has the seed `validation_seed` + i."""
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
        pictures += pipe(
            prompt_embeds=text,
            prompt_attention_mask=mask,
            negative_prompt_embeds=empty if settings.validation_guidance > 1 else None,
            height=side,
            width=side,
            num_inference_steps=settings.validation_steps,
            guidance_scale=settings.validation_guidance,
            generator=torch.Generator().manual_seed(settings.validation_seed + index),
        ).images
    transformer.set_windows(proxy_mode=mode)
    del pipe, vae
    free_memory()
    return pictures


def save_validation(pictures: list[Image.Image], path: Path, step: int, settings: LoRASettings) -> None:
    """Write pictures as `path`-INDEX.png, each with prompt, seed and step in its metadata."""
    for index, picture in enumerate(pictures):
        info = PngImagePlugin.PngInfo()
        facts = {"prompt": settings.validation_prompts[index], "seed": settings.validation_seed + index, "step": step}
        facts |= {
            "base": public_name(settings.base),
            "steps": settings.validation_steps,
            "guidance": settings.validation_guidance,
        }
        for name, value in facts.items():
            info.add_text(name, str(value))
        with new_file(path.with_name(f"{path.name}-{index}.png")) as temporary:
            picture.save(temporary, format="PNG", pnginfo=info)


def quarter_steps(max_steps: int) -> list[int]:
    """Return the steps at 0, 25, 50 and 100 % of a run, each once."""
    return sorted({0, max_steps // 4, max_steps // 2, max_steps})


def write_sheet(folder: Path, target: Path, steps: list[int], settings: LoRASettings) -> None:
    """Write one picture of all: a row per prompt, a column per step; steps without pictures are left out."""
    columns = [step for step in steps if (folder / f"step-{step:08d}-0.png").is_file()]
    rows = len(settings.validation_prompts)
    if not columns or not rows:
        return
    pictures = [[Image.open(folder / f"step-{step:08d}-{row}.png") for step in columns] for row in range(rows)]
    side = max(pictures[0][0].size)
    sheet = Image.new("RGB", (len(columns) * (side + 4), rows * (side + 18) + 16), "white")
    pen = ImageDraw.Draw(sheet)
    for column, step in enumerate(columns):
        pen.text((column * (side + 4) + 2, 2), f"step {step}", fill="black")
        for row in range(rows):
            sheet.paste(pictures[row][column], (column * (side + 4), 16 + row * (side + 18)))
    for row, prompt in enumerate(settings.validation_prompts):
        pen.text((2, 16 + row * (side + 18) + side + 2), prompt, fill="black")
    with new_file(target) as temporary:
        sheet.save(temporary, format="PNG")


def read_prior_prompts(path: str) -> list[str]:
    """Return the prompts of the file `prior_prompts`, one in each line; none for "".

    Raises:
        ValueError: The file is empty or not UTF-8.
        OSError: It cannot be read.
    """
    if not path:
        return []
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prior_prompts {path} is not UTF-8: {error}.") from error
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"prior_prompts {path} holds no prompts.")
    return prompts


def generate_prior(base: BaseModel, settings: LoRASettings, device: torch.device) -> list[tuple[Path, str]]:
    """Let the base model generate a picture of each prompt of `prior_prompts`; pictures that exist stay.

    The name of a picture holds everything that it depends on: prompt, seed, size, and the weights of the base model.

    Returns:
        The pictures with their prompts.

    Raises:
        ValueError: The file of prompts is empty or not UTF-8.
    """
    prompts = read_prior_prompts(settings.prior_prompts)
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
