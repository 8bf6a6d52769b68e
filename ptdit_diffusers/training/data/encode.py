"""What the VAE makes of pictures and videos, and the text encoder of captions, one by one or in batches."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ptdit_diffusers.core.captions import prepare_prompts
from ptdit_diffusers.pipelines.ptdit_text import lost_part, tokenize, unknown_words
from ptdit_diffusers.training.base_model import BaseModel, gpu_dtype
from ptdit_diffusers.training.data.buckets import nearest_size
from ptdit_diffusers.training.data.duplicates import average_hash
from ptdit_diffusers.training.data.find import PROGRESS_SECONDS, SHOWN, Item, crop_places, loose_sides
from ptdit_diffusers.training.data.media import (
    EVEN,
    UnreadableError,
    clip_length,
    fit,
    is_views,
    read_alpha,
    read_frames,
)
from ptdit_diffusers.training.data.shards import Found, ShardWriter, bucket_text, variant
from ptdit_diffusers.training.data.sources import Picture
from ptdit_diffusers.training.latents import to_pixels
from ptdit_diffusers.training.randomness import Stream, numpy_generator

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
    """Yield posterior `mean` and `std` (C, F, H/8, W/8) of each picture or video, float32, and of masked ones `area`.

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
            size, which = (item.width, item.height), (item.path, item.frames, item.begin, item.fps)
            frames = [fit(frame, *size, item.crop) for frame in read_frames(*which)]
            alpha = [fit(each, *size, item.crop) for each in read_alpha(*which)] if item.masked else []
        except UnreadableError as error:
            raise ValueError(f"{item.path} changed while it was encoded: it {error}.") from error
        posterior = vae.encode(video(frames, mirror)[None].to(device)).latent_dist
        if not key.startswith(key_of(item)):
            raise ValueError(f"{item.path} changed while it was encoded; start again when nothing writes it.")
        found = {"mean": posterior.mean[0].cpu(), "std": posterior.std[0].cpu()}
        found |= {"area": latent_area(alpha, mirror)} if alpha else {}
        if not all(bool(value.isfinite().all()) for value in found.values()):
            raise ValueError(f"{item.path}: the VAE of base {base.name!r} makes values of it that are not finite.")
        yield key, found


def latent_area(alpha: list[Image.Image], mirror: bool = False, views: bool = False) -> Tensor:
    """Return which share of each latent (1, F, H/8, W/8) is opaque, 0..1.

    A latent frame of a clip has four frames after the first one; each of `views` is one.
    """
    planes = np.stack([np.asarray(ImageOps.mirror(each) if mirror else each) for each in alpha])
    shares = F.avg_pool2d(torch.from_numpy(planes)[:, None].float() / 255, 8)[:, 0]
    later = shares[1:].unflatten(0, (-1, 4)).mean(1) if len(shares) > 1 and not views else shares[1:]
    return torch.cat([shares[:1], later])[None]


def video(frames: list[Image.Image], mirror: bool = False) -> Tensor:
    """Return frames of one size as the VAE takes them: float32 (3, F, H, W) in -1..1."""
    return to_pixels(np.stack([np.asarray(ImageOps.mirror(frame) if mirror else frame) for frame in frames]))


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


def tokenize_captions(base: BaseModel, texts: dict[str, tuple[str, str]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the token ids (L,), int64, of each caption, cleaned as the pipeline cleans prompts.

    Args:
        base: The model whose tokenizer is used.
        texts: Key -> the caption, and the name of a file that has it or "".
    """
    tokenizer = base.load_tokenizer()
    say_what_is_lost(tokenizer, texts.values())
    for key, (caption, _) in texts.items():
        with warnings.catch_warnings():  # a line about all of them was written
            warnings.simplefilter("ignore", UserWarning)
            yield key, {"ids": tokenize(tokenizer, prepare_prompts([caption], clean=True), TEXT_TOKENS)[0][0]}


def say_what_is_lost(tokenizer: Any, texts: Any, tokens: int = TEXT_TOKENS) -> None:
    """Log a line about the words that the text encoder does not know, and one about captions that it cuts.

    Args:
        tokenizer: Of the text encoder.
        texts: Pairs of a caption and the name of a file that has it.
        tokens: Longest caption.
    """
    unknown: dict[str, list[str]] = {}
    cut = []
    for caption, name in texts:
        (prompt,) = prepare_prompts([caption], clean=True)
        for word in dict.fromkeys(unknown_words(tokenizer, prompt)):
            names = unknown.setdefault(word, [])
            names += [name or "a prompt"] if (name or "a prompt") not in names[-1:] else []  # forms of one caption
        cut += [name or "a prompt"] if lost_part(tokenizer, prompt, tokens)[1] else []
    if unknown:
        most = sorted(unknown.items(), key=lambda each: -len(each[1]))
        words = ", ".join(f"{word!r} ({len(names)}: {_some(names)})" for word, names in most[:WORDS_SHOWN])
        more = f", and {len(most) - WORDS_SHOWN} more" if len(most) > WORDS_SHOWN else ""
        logger.warning(
            "the text encoder does not know %d words, and reads them all alike: %s%s", len(most), words, more
        )
    if cut:
        logger.warning("%d captions are longer than %d tokens and are cut: %s", len(cut), tokens, _some(cut))


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


# --- encoding to shards ----------------------------------------------------------------------------------------------

BATCH = 8  # pictures of one size that the VAE encodes together
FLUSH_SECONDS = 300.0  # what was encoded is on the disk after this long, even if the process is killed
MOST_SKIPS = 10  # files that may always be skipped, whatever the share


@dataclass
class Waiting:
    """Pictures of one bucket that the VAE will encode together."""

    keys: list[str] = field(default_factory=list)
    videos: list[dict[str, Tensor]] = field(default_factory=list)  # `variant` -> pixels; equal crops only once
    areas: list[dict[str, Tensor]] = field(default_factory=list)  # `variant` -> what is opaque
    wanted: dict[str, list[tuple[Found, str]]] = field(default_factory=dict)  # key -> samples, resolution
    views: bool = False  # each frame is a picture of its own


class PictureEncoder:
    """Encodes pictures into shards; what is there already is not encoded again.

    Args:
        vae: Frozen.
        writer: Of the shards.
        sizes: Resolution -> legal (height, width).
        num_frames: Taken from each clip.
        num_views: Taken from each folder of views; 0 = they are left out.
        fps: Frames a second that are taken of a clip; 0 = all.
        all_pieces: Take every piece of `num_frames` of a clip, which are held out together; not only the first.
        flip: Encode mirrored copies, too.
        crops: Of each picture, at random places that depend on nothing but its content; 0 = one, cut evenly.
        alpha_mask: Encode also what is opaque.
        max_skips: Share of the files that may be skipped, beyond the first MOST_SKIPS; 1 = all.
    """

    def __init__(
        self,
        vae: Any,
        writer: ShardWriter,
        sizes: Mapping[int, list[tuple[int, int]]],
        num_frames: int = 1,
        num_views: int = 0,
        fps: float = 0.0,
        all_pieces: bool = False,
        flip: bool = False,
        crops: int = 0,
        alpha_mask: bool = False,
        max_skips: float = 1.0,
    ) -> None:
        self.vae, self.writer, self.sizes = vae, writer, sizes
        self.num_frames, self.num_views, self.fps, self.all_pieces = num_frames, num_views, fps, all_pieces
        self.crops, self.alpha_mask, self.max_skips = crops, alpha_mask, max_skips
        self.copies = (False, True)[: 1 + flip]  # mirrored or not
        self.found: list[Found] = []
        self.skipped: list[tuple[str, str]] = []
        self.waiting: dict[tuple[str, bool], Waiting] = {}  # bucket, whether they are views
        self.encoded = self.without_caption = 0

    def encode(self, pictures: Iterator[Picture]) -> None:
        """Encode pictures, and note which were found and which were left out; after Ctrl-C, finished ones are kept.

        Raises:
            ValueError: Too many cannot be read.
            OSError: The disk is full.
        """
        said = flushed = time.monotonic()
        try:
            for picture in pictures:
                self.add(picture)
                now = time.monotonic()
                if now - said > PROGRESS_SECONDS:
                    said = now
                    logger.info("encoded %d pictures, skipped %d files", len(self.found), len(self.skipped))
                if now - flushed > FLUSH_SECONDS:
                    self.finish()
                    flushed = now
        finally:
            self.finish()
        for name in [each for each in self.found if len(each.at) < len(self.sizes)]:
            self.skip(name.name, "gives values in the VAE that are not finite")
        self.found = [each for each in self.found if len(each.at) == len(self.sizes)]

    def skip(self, name: str, reason: str) -> None:
        """Note a file that is left out.

        Raises:
            ValueError: They are too many.
        """
        self.skipped.append((name, reason))
        logger.warning("skipped %s: %s", name, reason)
        seen = len(self.found) + len(self.skipped)
        if len(self.skipped) > max(MOST_SKIPS, self.max_skips * max(seen, 1000)):
            raise ValueError(
                f"{len(self.skipped)} of {seen} files cannot be used, more than max_skips={self.max_skips}; the last: "
                f"{name} {reason}."
            )

    def add(self, picture: Picture) -> None:
        """Read a picture or clip, and encode what is trained on of it."""
        try:
            key = "" if picture.problem else picture.key()
        except OSError as error:
            self.skip(picture.name, str(error.strerror or error))
            return
        for begin, frames, opacity in picture.samples(self, self.skip):
            self.add_sample(picture, key, begin, frames, opacity)

    def add_sample(
        self, picture: Picture, key: str, begin: int, frames: list[Image.Image], opacity: list[Image.Image]
    ) -> None:
        """Note a sample of a file, and encode it when enough of its size wait; `key` is the file's."""
        facts, views = picture.facts, is_views(picture.file)
        moves = len(frames) > 1 and not views
        key += (f"-fps{self.fps:g}" if self.fps and moves else "") + (f"-from{begin}" if begin else "")
        group = picture.group(self.all_pieces and moves)
        texts, of_all = (facts.captions, facts.weights, facts.quality), (facts.licence, group)
        self.without_caption += not picture.has_caption
        self.found.append(found := Found(picture.name, key, *texts, average_hash(frames[0]), {}, *of_all))
        for resolution, sizes in self.sizes.items():
            height, width = nearest_size(frames[0].height, frames[0].width, sizes)
            bucket = bucket_text((clip_length(picture.file, len(frames)), height, width))
            if place := self.writer.find(bucket, key):
                found.at[str(resolution)] = (bucket, *place)
                continue
            waiting = self.waiting.setdefault((bucket, views), Waiting(views=views))
            waiting.wanted.setdefault(key, []).append((found, str(resolution)))
            if key not in waiting.keys:
                waiting.keys.append(key)
                places = self.places(key, frames[0], (height, width))
                waiting.videos.append(self.variants(frames, (width, height), places, video, views))
                area = partial(latent_area, views=views)
                waiting.areas.append(self.variants(opacity, (width, height), places, area, views) if opacity else {})
            if len(waiting.keys) == BATCH:
                self.encode_bucket(bucket, views)

    def places(self, key: str, first: Image.Image, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the places of the crops of a picture, each once; `size` is (height, width)."""
        if not self.crops:
            return [EVEN]
        choice = numpy_generator(Stream.CROP, int(key[:15], 16))
        return list(dict.fromkeys(crop_places(loose_sides(first, size), self.crops, choice)))

    def variants(
        self,
        images: list[Image.Image],
        size: tuple[int, int],
        places: list[tuple[int, int]],
        convert: Callable[[list[Image.Image], bool], Tensor],
        views: bool,
    ) -> dict[str, Tensor]:
        """Return what `convert` makes of the crops and mirrored copies of a sample; `size` is (width, height)."""
        found = {}
        for number, crop in enumerate(places):
            fitted = [fit(image, *size, crop) for image in images]
            for mirrored in self.copies:
                back = views and mirrored  # the other way round the object
                shown = [*fitted[:1], *fitted[:0:-1]] if back else fitted
                found[variant(number, mirrored)] = convert(shown, mirrored)
        return found

    def finish(self) -> None:
        """Encode what still waits, and write it."""
        for bucket, views in list(self.waiting):
            self.encode_bucket(bucket, views)
        self.writer.flush()

    def completed(self, row: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a row with as many crops as all rows of a shard have; those that it has are repeated."""
        count = max(1, self.crops)
        kinds = [f"{variant(0, mirrored)}{name}" for mirrored in self.copies for name in ("mean", "std", "area")]
        kinds = [kind for kind in kinds if kind in row]
        has = sum(variant(crop) + "mean" in row for crop in range(count))
        return {
            f"{variant(crop)}{kind}": row[f"{variant(crop % has)}{kind}"] for crop in range(count) for kind in kinds
        }

    @torch.no_grad()
    def encode_bucket(self, bucket: str, views: bool) -> None:
        """Encode the pictures of a bucket that wait, or the views of it."""
        waiting = self.waiting.pop((bucket, views))
        rows = [{f"{prefix}area": value for prefix, value in each.items()} for each in waiting.areas]
        for prefix in dict.fromkeys(prefix for each in waiting.videos for prefix in each):
            having = [number for number, each in enumerate(waiting.videos) if prefix in each]
            pixels = torch.stack([waiting.videos[number][prefix] for number in having])
            parts = pixels.to(self.vae.device).split(1, dim=2) if views else [pixels.to(self.vae.device)]
            posteriors = [self.vae.encode(part).latent_dist for part in parts]
            for name in ("mean", "std"):
                values = torch.cat([getattr(posterior, name) for posterior in posteriors], dim=2)
                for number, value in zip(having, values.cpu(), strict=True):
                    rows[number][prefix + name] = value
        for key, row in zip(waiting.keys, map(self.completed, rows), strict=True):
            if not all(bool(value.isfinite().all()) for value in row.values()):
                continue  # `encode` says so
            place = self.writer.add(bucket, key, row)
            self.encoded += 1
            for found, resolution in waiting.wanted[key]:
                found.at[resolution] = (bucket, *place)
