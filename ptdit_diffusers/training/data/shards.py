"""Encoded data on disk: shards of latents, an index that is mapped into memory, captions, and a manifest.

    FOLDER/MAKER/FxHxW/NAME.safetensors   mean, std (S, C, F, H/8, W/8) float16, the same of `variant`s,
                                          and where transparency is a mask, area (S, 1, F, H/8, W/8)
    FOLDER/MAKER/FxHxW/NAME.json          the keys of the rows, length and checksum of the shard
    FOLDER/MAKER/parts/...jsonl           what each part of an encoding found: `Found` as lines
    FOLDER/MAKER/index-VERSION/           index-RESOLUTION.npy, captions.jsonl, manifest.json

MAKER stands for the encoder. Shards never change: new pictures go into new ones, and get a new version of the index.
A shard counts when its .json is there, which is written last.
"""

import hashlib
import json
import logging
import re
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ptdit_diffusers.core.documents import read_mapping
from ptdit_diffusers.core.files import new_file, replace_json
from ptdit_diffusers.core.folder_files import new_folder
from ptdit_diffusers.training.data.duplicates import grouped, joined, scrambled
from ptdit_diffusers.training.latents import write_tensors

logger = logging.getLogger(__name__)

FORMAT = 1  # changes when the same file gives other shards
SHARD = 4096  # rows of a shard at most
INDEX = np.dtype(
    [
        ("shard", "<u4"),
        ("row", "<u4"),
        ("bucket", "<u2"),  # of the manifest's list
        ("captions", "<u2"),  # how many the sample has
        ("caption", "<u8"),  # where its line begins in captions.jsonl
        ("text", "<u8"),  # number of its first caption, all captions of the version counted
        ("group", "<u8"),  # near-duplicates share one, and what has the same name of a group
        ("quality", "<f4"),  # NaN = not given
    ]
)
Bucket = tuple[int, int, int]  # frames, height, width in pixels


class BadShardError(OSError):
    """A shard that is missing or not what was written."""


@dataclass(frozen=True)
class Found:
    """A picture or clip that was encoded: what the index needs to know of it."""

    name: str
    key: str  # of its content
    captions: tuple[str, ...]
    weights: tuple[float, ...]
    quality: float | None
    hashes: tuple[int, int, int]  # for near-duplicates
    at: dict[str, tuple[str, str, int]]  # resolution -> bucket as text, shard, row
    licence: str = ""
    group: str = ""  # samples of one name are held out together


def variant(crop: int = 0, mirrored: bool = False) -> str:
    """Return the beginning of the names of tensors of another crop, or of a mirrored copy; "" of the first one."""
    return (f"crop{crop}_" if crop else "") + ("mirrored_" if mirrored else "")


def bucket_text(bucket: Bucket) -> str:
    """Return the name of a bucket's folder."""
    return "x".join(map(str, bucket))


# --- writing ---------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Collects rows of latents by bucket and writes them as shards; rows that are there already are known by key.

    Args:
        folder: FOLDER/MAKER.
        prefix: Beginning of the names of new shards; several writers never share a name.
        only: Look at earlier shards of this prefix only, as parts of a large encoding do.
    """

    def __init__(self, folder: Path, prefix: str = "", only: bool = False) -> None:
        self.folder, self.prefix = folder, prefix
        self.rows: dict[str, list[tuple[str, dict[str, Tensor]]]] = {}
        self.known: dict[tuple[str, str], tuple[str, int]] = {}  # bucket, key -> shard, row
        self.names: dict[str, str] = {}  # bucket -> name of the shard that is being collected
        self.bad: list[str] = []
        for facts in sorted(folder.glob(f"*x*x*/{prefix if only else ''}*.json")):
            try:
                content = read_mapping(facts)
                size = facts.with_suffix(".safetensors").stat().st_size
                if size != content["bytes"]:
                    raise ValueError(f"has {size} bytes, not {content['bytes']}")
            except (OSError, ValueError, KeyError) as error:
                self.bad.append(f"{facts.with_suffix('.safetensors')}: {error}")
                facts.unlink(missing_ok=True)
                continue
            bucket = facts.parent.name
            self.known |= {(bucket, key): (facts.stem, row) for row, key in enumerate(content["keys"])}

    def find(self, bucket: str, key: str) -> tuple[str, int] | None:
        """Return shard and row of a content in a bucket, if it is encoded."""
        return self.known.get((bucket, key))

    def add(self, bucket: str, key: str, tensors: dict[str, Tensor]) -> tuple[str, int]:
        """Add a row, and return the shard and row that it gets."""
        rows = self.rows.setdefault(bucket, [])
        if not rows:
            self.names[bucket] = f"{self.prefix}{uuid.uuid4().hex[:12]}"
        place = self.names[bucket], len(rows)
        self.known[bucket, key] = place
        rows.append((key, tensors))
        if len(rows) == SHARD:
            self._write(bucket)
        return place

    def flush(self) -> None:
        """Write what was collected, shards that are not full, too."""
        for bucket in list(self.rows):
            self._write(bucket)

    def _write(self, bucket: str) -> None:
        rows = self.rows.pop(bucket, [])
        if not rows:
            return
        path = self.folder / bucket / f"{self.names.pop(bucket)}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: torch.stack([row[name] for _, row in rows]).half() for name in rows[0][1]}
        write_tensors(path, tensors)
        content = path.read_bytes()
        facts = {"bytes": len(content), "crc32": zlib.crc32(content), "keys": [key for key, _ in rows]}
        with new_file(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(facts), encoding="utf-8")


def part_path(folder: Path, data: str, part: int, parts: int) -> Path:
    """Return where part `part` of `parts` of an encoding writes down what it found."""
    return folder / "parts" / f"{data}-{part:05d}-of-{parts:05d}.jsonl"


def write_part(path: Path, found: Sequence[Found], skipped: Sequence[tuple[str, str]]) -> None:
    """Write what a part found, and what it left out with the reasons."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for each in found:
            file.write(json.dumps(vars(each), ensure_ascii=True) + "\n")
        file.write(json.dumps({"skipped": list(skipped), "found": len(found)}) + "\n")


def read_part(path: Path) -> tuple[Iterator[dict[str, Any]], dict[str, Any]]:
    """Return the lines of a part one by one, and its last line.

    Raises:
        ValueError: It is not whole.
    """
    with open(path, "rb") as file:
        file.seek(0, 2)
        size = file.tell()
        file.seek(max(0, size - 2**20))
        tail = file.read().splitlines()
    last = json.loads(tail[-1]) if tail else {}
    if "found" not in last:
        raise ValueError(f"{path} is not whole; encode this part again.")

    def lines() -> Iterator[dict[str, Any]]:
        with open(path, encoding="utf-8") as file:
            for line, _ in zip(file, range(last["found"]), strict=False):
                yield json.loads(line)

    return lines(), last


def merge(folder: Path, data: str, parts: int, about: dict[str, Any]) -> Path:
    """Write the index of all parts of an encoding and return its folder.

    Args:
        folder: FOLDER/MAKER.
        data: Names the encoding.
        parts: How many parts it has.
        about: Goes into the manifest.

    Raises:
        ValueError: Parts are missing, or nothing was encoded.
    """
    paths = [part_path(folder, data, part, parts) for part in range(parts)]
    if missing := [str(part) for part, path in enumerate(paths) if not path.is_file()]:
        raise ValueError(f"{len(missing)} of {parts} parts are not encoded yet: {', '.join(missing[:5])}; run them.")
    read = [read_part(path) for path in paths]
    count, skipped = sum(last["found"] for _, last in read), [each for _, last in read for each in last["skipped"]]
    if not count:
        raise ValueError("nothing was encoded: " + "; ".join(f"{name} {reason}" for name, reason in skipped[:5]))
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for path in paths:
        digest.update(path.read_bytes() if parts == 1 else str(path.stat().st_size).encode() + path.name.encode())
    target = folder / f"index-{digest.hexdigest()[:16]}"
    if (target / "manifest.json").is_file():
        return target
    with new_folder(target) as made:
        tables = _Tables(made, count)
        for lines, _ in read:
            for line in lines:
                tables.add(line)
        licences = dict(tables.licences.most_common())
        tables.finish({**about, "skipped": skipped, "count": count, "licences": licences}, folder)
    return target


@dataclass
class _Tables:
    """Builds index, captions and manifest from the lines of the parts."""

    folder: Path
    count: int
    row: int = 0
    texts: int = 0
    offset: int = 0
    indices: dict[str, np.ndarray] = field(default_factory=dict)
    shards: dict[str, dict[tuple[str, str], int]] = field(default_factory=dict)
    buckets: dict[str, dict[str, int]] = field(default_factory=dict)
    licences: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)  # of groups

    def __post_init__(self) -> None:
        self.captions = open(self.folder / "captions.jsonl", "wb")  # noqa: SIM115 (closed by `finish`)
        self.hashes = np.zeros((self.count, 3), np.uint64)

    def add(self, line: dict[str, Any]) -> None:
        """Add one sample to the index of every resolution."""
        text = {"name": line["name"], "captions": line["captions"], "weights": line["weights"]}
        written = self.captions.write(json.dumps(text).encode() + b"\n")
        for resolution, (bucket, shard, row) in line["at"].items():
            index = self.indices.setdefault(resolution, np.zeros(self.count, INDEX))
            shards, buckets = self.shards.setdefault(resolution, {}), self.buckets.setdefault(resolution, {})
            index[self.row] = (
                shards.setdefault((bucket, shard), len(shards)),
                row,
                buckets.setdefault(bucket, len(buckets)),
                len(line["captions"]),
                self.offset,
                self.texts,
                0,
                np.nan if line["quality"] is None else line["quality"],
            )
        self.hashes[self.row] = line["hashes"]
        self.licences[line.get("licence", "")] += 1
        self.names.append(line.get("group", ""))
        self.offset += written
        self.texts += len(line["captions"])
        self.row += 1

    def finish(self, about: dict[str, Any], shards: Path) -> None:
        """Write what was collected."""
        self.captions.close()
        groups = joined(grouped(self.hashes), self.names)
        for resolution, index in self.indices.items():
            index["group"] = groups
            np.save(self.folder / f"index-{resolution}.npy", index)
        facts = {
            resolution: [
                [bucket, name, *(read_mapping(shards / bucket / f"{name}.json")[what] for what in ("bytes", "crc32"))]
                for bucket, name in names
            ]
            for resolution, names in self.shards.items()
        }
        manifest = {"format": FORMAT, **about, "texts": self.texts, "shards": facts}
        manifest["buckets"] = {name: list(buckets) for name, buckets in self.buckets.items()}
        replace_json(self.folder / "manifest.json", manifest)


# --- reading ---------------------------------------------------------------------------------------------------------


class Encoded:
    """One version of the encoded data at one resolution; every process reads only what it trains on.

    Args:
        version: Folder FOLDER/MAKER/index-VERSION.
        resolution: In pixels.

    Raises:
        ValueError: There is no such index, or it is of another format.
    """

    def __init__(self, version: Path, resolution: int) -> None:
        self.version, self.resolution = version, resolution
        try:
            self.manifest = read_mapping(version / "manifest.json")
            self.shards = self.manifest["shards"][str(resolution)]
        except (OSError, KeyError) as error:
            raise ValueError(f"{version} has no index for resolution {resolution}; encode the data.") from error
        if self.manifest["format"] != FORMAT:
            raise ValueError(f"{version} is of format {self.manifest['format']}, not {FORMAT}; encode the data again.")
        self.index = np.load(version / f"index-{resolution}.npy", mmap_mode="r")
        self.buckets = [tuple(map(int, text.split("x"))) for text in self.manifest["buckets"][str(resolution)]]
        self.files: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}  # worker processes open the files themselves

    def caption_lines(self, number: int) -> dict[str, Any]:
        """Return name, captions and weights of a sample."""
        with open(self.version / "captions.jsonl", "rb") as file:
            file.seek(int(self.index["caption"][number]))
            return json.loads(file.readline())

    def all_captions(self) -> Iterator[str]:
        """Yield every caption of every sample, in the order of their numbers."""
        with open(self.version / "captions.jsonl", encoding="utf-8") as file:
            for line in file:
                yield from json.loads(line)["captions"]

    def shard_path(self, shard: int) -> Path:
        """Return the file of a shard."""
        bucket, name, _, _ = self.shards[shard]
        return self.version.parent / bucket / f"{name}.safetensors"

    def latents(self, number: int, mirrored: bool = False, crop: int = 0) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (C, F, H/8, W/8) of a sample, float32.

        Raises:
            BadShardError: Its shard is not what was written.
        """
        prefix = variant(crop, mirrored)
        return self._read(number, f"{prefix}mean"), self._read(number, f"{prefix}std")

    def area(self, number: int, mirrored: bool = False, crop: int = 0) -> Tensor:
        """Return how opaque each place of a sample is (1, F, H/8, W/8), 0..1, float32.

        Raises:
            BadShardError: Its shard is not what was written.
        """
        return self._read(number, f"{variant(crop, mirrored)}area")

    def _read(self, number: int, name: str) -> Tensor:
        shard, row = int(self.index["shard"][number]), int(self.index["row"][number])
        if shard not in self.files:
            self.files[shard] = self._checked(shard)
        return self.files[shard].get_slice(name)[row].float()

    def _checked(self, shard: int) -> Any:
        path, (_, _, length, checksum) = self.shard_path(shard), self.shards[shard]
        try:
            content = path.read_bytes()
            if len(content) != length:
                raise BadShardError(f"{path} has {len(content)} bytes, {length} were written")
            if zlib.crc32(content) != checksum:
                raise BadShardError(f"{path} holds other values than were written")
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            if isinstance(error, BadShardError):
                raise
            raise BadShardError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error


# --- choosing --------------------------------------------------------------------------------------------------------


def members_by_bucket(index: np.ndarray, chosen: np.ndarray) -> dict[int, np.ndarray]:
    """Return the chosen samples (a mask) of each bucket, in the order in which they are stored."""
    numbers = np.flatnonzero(chosen)
    stored = index["shard"][numbers].astype(np.uint64) << np.uint64(32) | index["row"][numbers]
    if (stored[1:] < stored[:-1]).any():
        numbers = numbers[np.argsort(stored, kind="stable")]
    buckets = index["bucket"][numbers]
    return {int(name): numbers[buckets == name] for name in np.flatnonzero(np.bincount(buckets))}


def held_out(groups: np.ndarray, wanted: float, seed: int) -> np.ndarray:
    """Return a mask of samples that training never sees: whole groups of near-duplicates, chosen by the seed.

    A single group may be more than what is wanted; more than twice as many are said in the log.

    Args:
        groups: (N,) the group of each sample.
        wanted: Below 1 a share of the samples, else their number.
        seed: Chooses the groups.
    """
    count = int(wanted if wanted >= 1 else np.ceil(wanted * len(groups)))
    if not 0 < count < len(groups):
        return np.zeros(len(groups), bool)
    scores = scrambled(np.asarray(groups) ^ np.uint64(seed))  # one of each group
    last = np.partition(scores, count - 1)[count - 1]
    chosen = scores <= last
    if chosen.sum() > count and (scores < last).any():
        chosen = scores < last
    if chosen.all():
        return np.zeros(len(groups), bool)
    if (number := chosen.sum()) > 2 * count:
        logger.warning("%d samples are held out instead of %d: they are one group of near-duplicates", number, count)
    return chosen


CONDITION = re.compile(r"\s*quality\s*(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?)\s*")


def where(index: np.ndarray, condition: str) -> np.ndarray:
    """Return a mask of the samples that fulfil a condition such as "quality >= 5.5"; "" = all.

    Raises:
        ValueError: It is no such condition.
    """
    if not condition:
        return np.ones(len(index), bool)
    if not (match := CONDITION.fullmatch(condition)):
        raise ValueError(f"where={condition!r} is no condition on quality; nearest: 'quality >= 5'.")
    compare = {">=": np.greater_equal, "<=": np.less_equal, ">": np.greater, "<": np.less}[match[1]]
    return compare(np.asarray(index["quality"]), float(match[2]))
