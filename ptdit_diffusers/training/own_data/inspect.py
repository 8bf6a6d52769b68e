"""What a training would find in one's own data, and what it would cost here: counts, words, VAE, time."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from accelerate import PartialState
from diffusers.training_utils import free_memory
from PIL import Image
from torch import Tensor

from ptdit_diffusers.core.captions import prepare_prompts
from ptdit_diffusers.pipelines.ptdit_text import lost_part
from ptdit_diffusers.pipelines.ptdit_text import unknown_words as unknown_in
from ptdit_diffusers.training.base_model import BaseModel
from ptdit_diffusers.training.data.buckets import nearest_size
from ptdit_diffusers.training.data.duplicates import average_hash, grouped, joined
from ptdit_diffusers.training.data.encode import video
from ptdit_diffusers.training.data.media import clip_length, fit
from ptdit_diffusers.training.data.sources import Picture
from ptdit_diffusers.training.own_data.model import make_base, make_transformer, stage_sizes
from ptdit_diffusers.training.own_data.prepare import source_of
from ptdit_diffusers.training.own_data.settings import TRAINED, DataSettings, OwnDataSettings, by_source
from ptdit_diffusers.training.own_data.vae import POOR_PSNR, reconstructions
from ptdit_diffusers.training.own_data.words import has_word_list, report, unknown_words
from ptdit_diffusers.training.processes import attention_kernels
from ptdit_diffusers.training.record import hardware, human_time
from ptdit_diffusers.training.task import trained_parameters

SHOWN = 5  # names in a line
RECONSTRUCTED = 16  # pictures whose reconstruction is measured
MEASURED_BATCH = 4  # samples of a measured step
MOST_VALUES = 200_000_000  # of a model that is measured on a CPU


@dataclass
class Looked:
    """What was seen of the files."""

    captions: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    hashes: list[tuple[int, int, int]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)  # names of what is held out together
    sides: list[tuple[int, int]] = field(default_factory=list)  # height, width
    skipped: list[tuple[str, str]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    buckets: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    without: list[str] = field(default_factory=list)
    enlarged: int = 0
    pictures: list[Tensor] = field(default_factory=list)  # (3, 1, H, W), some

    def skip(self, name: str, reason: str) -> None:
        """Note a file that is left out."""
        self.skipped.append((name, reason))

    def add(
        self, picture: Picture, frames: list[Image.Image], data: DataSettings, sizes: Sequence[tuple[int, int]]
    ) -> None:
        """Note a sample that would be trained on, in the nearest of the `sizes` (height, width)."""
        height, width = frames[0].height, frames[0].width
        best, length = nearest_size(height, width, sizes), clip_length(picture.file, len(frames))
        self.names.append(picture.name)
        self.captions += picture.facts.captions
        self.without += [] if picture.has_caption else [picture.name]
        self.hashes.append(average_hash(frames[0]))
        self.groups.append(picture.group(data.all_pieces and length > 1))
        self.sides.append((height, width))
        self.kinds[picture.file.suffix.lower()] += 1
        self.buckets[(length, *best)] += 1
        self.enlarged += height < best[0] or width < best[1]
        if len(self.pictures) < RECONSTRUCTED:
            self.pictures.append(video([fit(frames[0], best[1], best[0])]))


def inspect(settings: OwnDataSettings, tars: int = 0) -> Iterator[str]:
    """Yield lines about the data of a run and its costs.

    Args:
        settings: Of the run.
        tars: Look only into so many tar shards, spread evenly; 0 = all.

    Raises:
        ValueError: There is no data, or a resolution is not possible.
    """
    sources = by_source(settings)
    for source, each in sources.items():
        if len(sources) > 1:
            yield f"data {source}"
        yield from inspect_source(each, tars)


def inspect_source(settings: OwnDataSettings, tars: int) -> Iterator[str]:
    """Yield lines about one source, as `inspect`."""
    base, device = make_base(settings), PartialState().device
    looked = look(settings, base, tars)
    if not looked.names:
        reasons = "; ".join(f"{name} {reason}" for name, reason in looked.skipped[:SHOWN])
        raise ValueError(
            f"data {settings.data.source!r} has nothing to train on: {reasons or 'no pictures or clips'}."
        )
    yield from about_files(settings, looked, tars)
    yield from about_captions(base, looked, settings.text.tokens)
    seconds, lines = about_vae(base, looked, device)
    yield from lines
    yield from about_cost(settings, base, looked, seconds, device)


def look(settings: OwnDataSettings, base: BaseModel, tars: int) -> Looked:
    """Read every file once."""
    sizes, looked = stage_sizes(settings, base)[settings.stages[-1].resolution], Looked()
    for picture in source_of(settings).pictures(tars=tars):
        for _, frames, _ in picture.samples(settings.data, looked.skip):
            looked.add(picture, frames, settings.data, sizes)
    return looked


def about_files(settings: OwnDataSettings, looked: Looked, tars: int) -> Iterator[str]:
    """Yield lines about files, sizes, buckets and near-duplicates."""
    count, areas = len(looked.names), sorted(looked.sides, key=lambda side: side[0] * side[1])
    kinds = ", ".join(f"{number} {kind}" for kind, number in looked.kinds.most_common())
    yield f"{count} pictures and clips ({kinds}), {len(looked.skipped)} left out" + (f", of {tars} tars" * bool(tars))
    for name, reason in looked.skipped:
        yield f"left out {name}: {reason}"
    low, middle, high = ("x".join(map(str, areas[i])) for i in (0, count // 2, -1))
    yield f"sizes (height x width): smallest {low}, middle {middle}, largest {high}"
    for (frames, height, width), number in sorted(looked.buckets.items()):
        yield f"bucket {height}x{width}{f', {frames} frames' if frames > 1 else ''}: {number}"
    if looked.enlarged:
        yield f"{looked.enlarged} are smaller than their bucket and would be enlarged"
    if looked.without:
        yield f"{len(looked.without)} have no caption and get data.default_caption: {_some(looked.without)}"
    groups = joined(grouped(np.array(looked.hashes, np.uint64)), looked.groups)
    numbers = Counter(groups.tolist())
    alike = [group for group, number in numbers.items() if number > 1]
    if alike:
        first = [name for name, group in zip(looked.names, groups.tolist(), strict=True) if group == alike[0]]
        what = "near-duplicates or of one clip or data.group_column" if any(looked.groups) else "near-duplicates"
        yield (
            f"{sum(numbers[group] for group in alike)} are {what}, in {len(alike)} groups, for example "
            f"{_some(first)}; a group is held out as a whole"
        )
    if count < 1000 and settings.train == "all":
        yield f"{count} pictures are few for train: all, which learns them by heart; train: lora is the safe choice"


def about_captions(base: BaseModel, looked: Looked, tokens: int) -> Iterator[str]:
    """Yield lines about words that the text encoder does not know, and captions that it cuts."""
    captions = [caption for caption in looked.captions if caption]
    words = [len(caption.split()) for caption in captions] or [0]
    yield f"{len(captions)} captions, {min(words)} to {max(words)} words, {len(set(captions))} different ones"
    tokenizer = base.load_tokenizer()
    if has_word_list(base.part("tokenizer")):
        if unknown := unknown_words(tokenizer, captions):
            words = f"{len(unknown)} words: {report(unknown)}"
            yield f"the text encoder does not know {words}; text: {{grow: true}} adds them"
    else:
        unknown = Counter(
            word for text in prepare_prompts(captions, clean=True) for word in unknown_in(tokenizer, text)
        )
        if unknown:
            yield f"the text encoder does not know {len(unknown)} words: {report(unknown)}"
    cut = sum(bool(lost_part(tokenizer, text, tokens)[1]) for text in prepare_prompts(captions, clean=True))
    if cut:
        yield f"{cut} captions are longer than {tokens} tokens and are cut"


def about_vae(base: BaseModel, looked: Looked, device: torch.device) -> tuple[float, list[str]]:
    """Return the seconds that a picture takes to encode, and a line about reconstructions with advice."""
    vae = base.load_vae(torch.float32, device)
    with torch.no_grad():
        vae.encode(looked.pictures[0][None].to(device))
        began = time.perf_counter()
        for pixels in looked.pictures[:4]:
            vae.encode(pixels[None].to(device)).latent_dist.mode().cpu()
        seconds = (time.perf_counter() - began) / len(looked.pictures[:4])
    found = reconstructions(vae, looked.pictures)
    mean = sum(found) / len(found)
    line = f"the VAE reconstructs {len(found)} pictures with {mean:.1f} dB (PSNR; worst {min(found):.1f})"
    if mean < POOR_PSNR:
        line += (
            f": under {POOR_PSNR:.0f} dB, details are lost; vae: {{train: decoder}} mends a part of it, and with "
            "start: new, vae: {train: new} makes one for these pictures"
        )
    del vae
    free_memory()
    return seconds, [line]


def about_cost(
    settings: OwnDataSettings, base: BaseModel, looked: Looked, seconds: float, device: torch.device
) -> Iterator[str]:
    """Yield lines about the time that encoding and training would take here."""
    copies = settings.data.copies * len(stage_sizes(settings, base))
    yield f"here ({hardware()}): encoding takes about {human_time(seconds * len(looked.names) * copies)}"
    stage = settings.stages[-1]
    for kind in TRAINED if settings.start != "new" else ("all",):
        transformer = make_transformer(replace(settings, train=kind), base)
        values = sum(p.numel() for p in transformer.parameters())
        trained = sum(p.numel() for p in trained_parameters(transformer).values())
        line = f"train: {kind} trains {trained / 1e6:.1f} million values"
        if device.type == "cpu" and values > MOST_VALUES:
            yield f"{line}; the time was not measured, the model is large for a CPU"
            continue
        each = step_seconds(transformer.to(device), base, stage.resolution, device)
        total = each * stage.batch * settings.stages[-1].steps
        yield (
            f"{line}; a step of {stage.batch} at {stage.resolution} px takes about {each * stage.batch:.1f} s, "
            f"{stage.steps} steps {human_time(total)}"
        )
        del transformer
        free_memory()


def step_seconds(transformer: torch.nn.Module, base: BaseModel, resolution: int, device: torch.device) -> float:
    """Return the seconds that a sample takes to train, measured on the second of two steps."""
    side, config = resolution // 8, transformer.config
    latents = torch.randn(MEASURED_BATCH, config["in_channels"], 1, side, side, device=device)
    text = torch.randn(MEASURED_BATCH, 16, config["caption_channels"], device=device)
    times = torch.rand(MEASURED_BATCH, device=device) * 1000
    from ptdit_diffusers.core.sampling import choose_windows, size_conditions

    options = {
        **choose_windows(transformer, "auto", "auto", side, side),
        **size_conditions(transformer, resolution, resolution),
    }
    for _ in range(2):
        began = time.perf_counter()
        with attention_kernels(device):
            loss = transformer(latents, text, times, return_dict=False, **options)[0].float().square().mean()
            loss.backward()
        loss.item()  # waits for the device
    return (time.perf_counter() - began) / MEASURED_BATCH


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
