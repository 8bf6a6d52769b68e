"""What `ptdit train` reads: tar shards of pictures on grounds with captions, or a folder of a few hundred pictures."""

import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.datasets.emoji.captions import captions
from scripts.datasets.emoji.drawing import COLORS, GROUNDS, WHITE, on_ground, visibility
from scripts.datasets.emoji.packages import PACKAGES
from scripts.datasets.emoji.pictures import Picture, load
from scripts.datasets.emoji.split import Split, place

GROUNDS_EACH = 4  # of a picture; it is on white as often as on all of them
VISIBLE = 0.1  # RMS contrast, 0 to 1, under which a picture is not shown on a ground
TAR_SAMPLES = 4096


@dataclass(frozen=True)
class Sample:
    """A picture on a ground with its captions."""

    key: str
    content: bytes  # PNG
    captions: list[tuple[str, float]]
    licence: str  # of the picture
    picture: str  # its name, on any ground


def samples(folder: Path, pictures: Iterable[Picture], split: Split) -> Iterator[Sample]:
    """Yield what the transformer trains on: every picture that is not held out, half of the times on white."""
    for picture in pictures:
        if not picture.selected or split.kind(picture):
            continue
        pixels = load(folder, picture)
        chosen = grounds(picture, pixels, split)
        contents = {ground: png(on_ground(pixels, COLORS[ground])) for ground in dict.fromkeys(chosen)}
        for number, ground in enumerate(chosen):
            yield make_sample(picture, contents[ground], ground, number)


def vae_samples(folder: Path, pictures: Iterable[Picture], split: Split) -> Iterator[Sample]:
    """Yield what the VAE trains on: every picture of the sets that is not held out once, half of them on white."""
    for picture in pictures:
        if split.kind(picture):
            continue
        pixels = load(folder, picture)
        number = place("vae", picture.file)
        visible = [name for name in COLORS if visibility(pixels, COLORS[name]) >= VISIBLE]
        ground = WHITE if number % 2 and WHITE in visible else visible[number // 2 % len(visible)]
        yield make_sample(picture, png(on_ground(pixels, COLORS[ground])), ground, 0)


def some_samples(folder: Path, pictures: Iterable[Picture], split: Split, number: int) -> Iterator[Sample]:
    """Yield so many pictures without a tone of skin, on white, none of them held out."""
    known = [each for each in pictures if each.selected and not split.kind(each) and not each.emoji.tone]
    for picture in sorted(known, key=lambda each: place("folder", each.file))[:number]:
        yield make_sample(picture, png(on_ground(load(folder, picture), COLORS[WHITE])), WHITE, 0)


def grounds(picture: Picture, pixels: np.ndarray, split: Split) -> list[str]:
    """Return on which grounds a picture is shown: as often on white as on others; not where it cannot be seen."""
    names = [
        name
        for name in GROUNDS
        if (picture.style, name) not in split.grounds and visibility(pixels, GROUNDS[name]) >= VISIBLE
    ]
    names = sorted(names, key=lambda name: place(name, picture.file))[:GROUNDS_EACH]
    white = [WHITE] * GROUNDS_EACH if visibility(pixels, COLORS[WHITE]) >= VISIBLE else names
    return [*white, *names]


def make_sample(picture: Picture, content: bytes, ground: str, number: int) -> Sample:
    """Return a picture on a ground; captions differ by the number."""
    key = f"{picture.style}-{picture.emoji.code}-{number}-{ground}"
    choice = np.random.default_rng(place("captions", key))
    texts = captions(picture.emoji, picture.style, ground, choice)
    return Sample(key, content, texts, PACKAGES[picture.style].licence, f"{picture.style}-{picture.emoji.code}")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder that gets its name at the end. What an error or a killed call leaves of it is removed.

    Raises:
        ValueError: The folder exists.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; remove it, or give another folder.")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_tars(folder: Path, found: Iterable[Sample]) -> int:
    """Write samples into 000000.tar and so on, KEY.png beside KEY.json, and return how many there are.

    Args:
        folder: New; it appears when all of it is written.
        found: The samples.

    Raises:
        ValueError: The folder exists.
    """
    count, tar = 0, None
    with new_folder(folder) as part:
        try:
            for sample in found:
                if count % TAR_SAMPLES == 0:
                    if tar:
                        tar.close()
                    tar = tarfile.open(part / f"{count // TAR_SAMPLES:06d}.tar", "w")  # noqa: SIM115 (closed below)
                add_sample(tar, sample)
                count += 1
        finally:
            if tar:
                tar.close()
    return count


def add_sample(tar: tarfile.TarFile, sample: Sample) -> None:
    """Add a sample to a tar."""
    texts, weights = zip(*sample.captions, strict=True)
    facts = {"caption": texts, "weights": weights, "licence": sample.licence, "picture": sample.picture}
    for ending, content in (("png", sample.content), ("json", json.dumps(facts, ensure_ascii=False).encode())):
        info = tarfile.TarInfo(f"{sample.key}.{ending}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def write_folder(folder: Path, found: Iterable[Sample]) -> int:
    """Write samples as files with metadata.jsonl, and return how many there are.

    Args:
        folder: New.
        found: The samples; their plainest captions are taken.

    Raises:
        ValueError: The folder exists.
    """
    lines = []
    with new_folder(folder) as part:
        for sample in found:
            (part / f"{sample.key}.png").write_bytes(sample.content)
            facts = {"file_name": f"{sample.key}.png", "text": sample.captions[0][0], "licence": sample.licence}
            lines.append(json.dumps(facts, ensure_ascii=False))
        (part / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def png(pixels: np.ndarray) -> bytes:
    """Return RGB bytes as a PNG file."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG", compress_level=1)
    return content.getvalue()
