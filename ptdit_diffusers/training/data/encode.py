"""What the VAE makes of pictures and videos, and the text encoder of captions, one by one."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from ptdit_diffusers.core.captions import prepare_prompts
from ptdit_diffusers.pipelines.ptdit_text import lost_part, unknown_words
from ptdit_diffusers.training.base_model import BaseModel, gpu_dtype
from ptdit_diffusers.training.data.find import PROGRESS_SECONDS, SHOWN, Item
from ptdit_diffusers.training.data.media import UnreadableError, fit, read_frames
from ptdit_diffusers.training.latents import to_pixels

logger = logging.getLogger(__name__)

TEXT_TOKENS = 200  # that the pipeline reads
WORDS_SHOWN = 10


@torch.no_grad()
def encode_pictures(
    base: BaseModel,
    sources: dict[str, tuple[Item, bool]],
    device: torch.device,
    key_of: Callable[[Item], str],
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield posterior mean and standard deviation (C, F, H/8, W/8) of each picture or video, float32.

    Args:
        base: The model whose VAE encodes.
        sources: Key -> the item, and whether it is mirrored.
        device: Where to encode.
        key_of: The key of an item as its file is now.

    Raises:
        ValueError: A file changed since it was looked at, or its latents are not finite.
    """
    vae, said = base.load_vae(torch.float32, device), time.monotonic()
    for number, (key, (item, mirror)) in enumerate(sources.items()):
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            logger.info("encoded %d of %d", number, len(sources))
        try:
            frames = [fit(frame, item.width, item.height) for frame in read_frames(item.path, item.frames)]
        except UnreadableError as error:
            raise ValueError(f"{item.path} changed while it was encoded: it {error}.") from error
        pixels = to_pixels(np.stack([np.asarray(ImageOps.mirror(frame) if mirror else frame) for frame in frames]))
        posterior = vae.encode(pixels[None].to(device)).latent_dist
        if not key.startswith(key_of(item)):
            raise ValueError(f"{item.path} changed while it was encoded; start again when nothing writes it.")
        found = {"mean": posterior.mean[0].cpu(), "std": posterior.std[0].cpu()}
        if not all(bool(value.isfinite().all()) for value in found.values()):
            raise ValueError(f"{item.path}: the VAE of base {base.name!r} makes values of it that are not finite.")
        yield key, found


@torch.no_grad()
def encode_captions(
    base: BaseModel, texts: dict[str, tuple[str, str]], device: torch.device
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the embedding (L, D) of each caption without padding, cleaned as the pipeline cleans prompts.

    Args:
        base: The model whose text encoder encodes.
        texts: Key -> the caption, and the name of a file that has it or "".
        device: Where to encode.
    """
    pipe = base.load_text_pipeline(gpu_dtype(device), device)
    say_what_is_lost(pipe.tokenizer, texts.values())
    for key, (caption, _) in texts.items():
        with warnings.catch_warnings():  # a line about all of them was written
            warnings.simplefilter("ignore", UserWarning)
            yield key, {"embeds": pipe.encode_prompt(caption, do_classifier_free_guidance=False)[0][0].cpu()}


def say_what_is_lost(tokenizer: Any, texts: Any) -> None:
    """Log a line about the words that the text encoder does not know, and one about captions that it cuts.

    Args:
        tokenizer: Of the text encoder.
        texts: Pairs of a caption and the name of a file that has it.
    """
    unknown: dict[str, list[str]] = {}
    cut = []
    for caption, name in texts:
        (prompt,) = prepare_prompts([caption], clean=True)
        for word in dict.fromkeys(unknown_words(tokenizer, prompt)):
            unknown.setdefault(word, []).append(name or "a prompt")
        cut += [name or "a prompt"] if lost_part(tokenizer, prompt, TEXT_TOKENS)[1] else []
    if unknown:
        most = sorted(unknown.items(), key=lambda each: -len(each[1]))
        words = ", ".join(f"{word!r} ({len(names)}: {_some(names)})" for word, names in most[:WORDS_SHOWN])
        more = f", and {len(most) - WORDS_SHOWN} more" if len(most) > WORDS_SHOWN else ""
        logger.warning(
            "the text encoder does not know %d words, and reads them all alike: %s%s", len(most), words, more
        )
    if cut:
        logger.warning("%d captions are longer than %d tokens and are cut: %s", len(cut), TEXT_TOKENS, _some(cut))


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
