"""What is trained on: files, captions and the bucket of each. Every file that is left out is named with its reason.

Must not know models; it reads pictures only for their size. Sizes are height x width in pixels.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lora.media import PICTURES, VIDEOS, UnreadableError, size_of

CAPTION_KEYS = ("text", "caption", "prompt")
FILE_KEYS = ("file_name", "file", "image", "path")


@dataclass(frozen=True)
class Item:
    """One file: its path, its caption (trigger included), frames, and the size it is brought to."""

    path: Path
    caption: str
    frames: int = 1
    height: int = 0
    width: int = 0
    prior: bool = False  # drawn by the base model, to be kept

    @property
    def bucket(self) -> tuple[int, int, int]:
        """Frames, height, width: what may stand in one batch."""
        return self.frames, self.height, self.width


@dataclass
class Findings:
    """What was found in a data folder."""

    items: list[Item]
    skipped: list[tuple[str, str]]  # name, reason
    without_caption: int
    enlarged: int  # pictures smaller than their bucket


def find_items(
    source: str, default_caption: str, trigger: str, num_frames: int, sizes: list[tuple[int, int]]
) -> Findings:
    """Look at every file of a data set and choose its bucket.

    Args:
        source: Folder (captions in same-name .txt, or a metadata.jsonl / metadata.csv in it), or such a file.
        default_caption: For files without a caption.
        trigger: Word before every caption, or in place of [trigger] in it.
        num_frames: Frames taken from each video.
        sizes: Legal (height, width), from `bucket_sizes`.

    Raises:
        ValueError: There is no such folder, a metadata file is broken, or nothing is left to train on.
    """
    items, skipped, bare, enlarged = [], [], 0, 0
    for path, caption, problem in _listed(source):
        try:
            if problem:
                raise UnreadableError(problem)
            frames = num_frames if path.suffix.lower() in VIDEOS else 1
            width, height = size_of(path, frames)
        except UnreadableError as error:
            skipped.append((str(path), str(error)))
            continue
        bare += not caption
        caption = with_trigger(caption or default_caption, trigger)
        best = nearest_size(height, width, sizes)
        enlarged += height < best[0] or width < best[1]
        items.append(Item(path, caption, frames, *best))
    if not items:
        reasons = "; ".join(f"{name} {reason}" for name, reason in skipped[:5]) or "it holds no pictures or videos"
        raise ValueError(f"data {source!r} has nothing to train on: {reasons}.")
    return Findings(items, skipped, bare, enlarged)


def with_trigger(caption: str, trigger: str) -> str:
    """The caption with the trigger word in place of [trigger], or in front."""
    if "[trigger]" in caption:
        return caption.replace("[trigger]", trigger).strip()
    return f"{trigger}, {caption}" if trigger and caption else trigger or caption


def _listed(source: str) -> Iterator[tuple[Path, str, str]]:
    """Path, caption and what is wrong with it ("" = nothing) of every file."""
    place = Path(source)
    if place.is_file():
        yield from _from_table(place)
    elif not place.is_dir():
        raise ValueError(f"data {source!r} is neither a folder nor a file.")
    else:
        tables = [place / name for name in ("metadata.jsonl", "metadata.csv") if (place / name).is_file()]
        if tables:
            yield from _from_table(tables[0])
        else:
            yield from _from_folder(place)


def _from_folder(folder: Path) -> Iterator[tuple[Path, str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in PICTURES + VIDEOS or any(part.startswith(".") for part in path.parts):
            continue
        text = path.with_suffix(".txt")
        try:
            yield path, text.read_text(encoding="utf-8-sig").strip() if text.is_file() else "", ""
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            yield path, "", f"has a caption that is not UTF-8 ({text.name}, byte 0x{byte:02x} at {error.start})"


def _from_table(table: Path) -> Iterator[tuple[Path, str, str]]:
    try:
        text = table.read_text(encoding="utf-8-sig")
        if table.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines()))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{table} cannot be read: {error}.") from error
    for number, row in enumerate(rows, 1):
        name = next((row[key] for key in FILE_KEYS if row.get(key)), None)
        if name is None:
            raise ValueError(f"{table}, entry {number}: no file name; give one of {', '.join(FILE_KEYS)}.")
        caption = next((row[key] for key in CAPTION_KEYS if row.get(key)), "")
        path = table.parent / name
        kind_is_known = path.suffix.lower() in PICTURES + VIDEOS
        problem = "" if path.is_file() else "does not exist"
        yield path, str(caption).strip(), problem if kind_is_known else "is not a picture or video"


# --- buckets ---------------------------------------------------------------------------------------------------------


def bucket_sizes(resolution: int, step: int, max_aspect: float) -> list[tuple[int, int]]:
    """Legal sizes (height, width): multiples of `step` with about resolution^2 pixels and at most `max_aspect`.

    For every height the width whose area comes nearest, and the same turned by 90 degrees.

    Raises:
        ValueError: The resolution is not a multiple of the step.
    """
    if resolution % step or resolution < step:
        low = max(step, resolution // step * step)
        raise ValueError(
            f"resolution={resolution} is not a multiple of bucket_step={step}; nearest: {low} or {low + step}."
        )
    sizes = {(resolution, resolution)}
    for short in range(step, resolution, step):
        long = round(resolution**2 / short / step) * step
        if long / short <= max_aspect:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest_size(height: int, width: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The size whose aspect ratio is nearest; of equals, the one with most pixels."""
    wanted = math.log(height / width)
    return min(sizes, key=lambda size: (round(abs(math.log(size[0] / size[1]) - wanted), 6), -size[0] * size[1]))


def table(findings: Findings, repeats: int, prior_repeats: int) -> str:
    """Buckets with their counts, then what was left out or changed, as lines of text."""
    counts = Counter((item.bucket, item.prior) for item in findings.items)
    lines = ["frames  height  width  files  repeats"]
    for ((frames, height, width), prior), number in sorted(counts.items()):
        times = prior_repeats if prior else repeats
        lines.append(f"{frames:6}  {height:6}  {width:5}  {number:5}  {times:7}{'  (prior)' if prior else ''}")
    lines.append(f"{len(findings.items)} files, {len(findings.skipped)} skipped")
    lines += [f"skipped {name}: {reason}" for name, reason in findings.skipped]
    if findings.without_caption:
        lines.append(f"{findings.without_caption} files have no caption and get the default one")
    if findings.enlarged:
        lines.append(f"{findings.enlarged} files are smaller than their bucket and are enlarged")
    return "\n".join(lines)


def as_prior(items: list[Item]) -> list[Item]:
    """The items marked as drawn by the base model."""
    return [replace(item, prior=True) for item in items]
