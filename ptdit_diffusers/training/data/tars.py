"""Tar shards in the format of webdataset: files of one sample share a KEY, KEY.jpg beside KEY.txt or KEY.json.

Views of one object from all around are KEY.0.png, KEY.1.png and so on, in the place of KEY.jpg.

An index of a tar (key, place, size of each file) gives random access; nothing is unpacked.
"""

import io
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptdit_diffusers.core.documents import parse_json
from ptdit_diffusers.training.data.listing import LONGEST_CAPTION
from ptdit_diffusers.training.data.media import NOT_READ, PICTURES, READ, VIEWS
from ptdit_diffusers.training.data.tables import CAPTION_KEYS, Facts, read_facts

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
VIEW = re.compile(r"\.(\d+)(\.[^.]+)")  # of the name behind the key: number and ending
LONGEST_TEXT = 2**20  # bytes of a .txt or .json


@dataclass(frozen=True)
class TarMember:
    """A file in a tar, which is read as a file on disk is."""

    tar: Path
    name: str
    offset: int
    size: int

    @property
    def suffix(self) -> str:
        """Ending of the name."""
        return Path(self.name).suffix

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"

    def read_bytes(self) -> bytes:
        """Return the content.

        Raises:
            OSError: The tar is shorter than its index says.
        """
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self.tar} ends in the middle of {self.name}")
        return content

    def open(self) -> io.BytesIO:
        """Return the content as a file."""
        return io.BytesIO(self.read_bytes())


@dataclass(frozen=True)
class TarViews:
    """Pictures of one object from all around in a tar, which are read as a folder of views is."""

    name: str  # folder and key
    views: tuple[TarMember, ...]
    suffix: str = VIEWS


@dataclass
class TarSample:
    """A picture, clip or views of a tar with what stands beside it; `problem`: why it cannot be used ("" = it can)."""

    member: TarMember | TarViews
    facts: Facts = field(default_factory=Facts)
    problem: str = ""


@dataclass
class TarListing:
    """What a tar holds."""

    samples: list[TarSample] = field(default_factory=list)
    problem: str = ""  # of the tar itself
    others: int = 0  # files that are neither media nor captions


def tar_names(source: str) -> list[Path]:
    """Return the tars that a source names: one, a folder of them, a pattern, or numbers in braces {000..123}.

    Raises:
        ValueError: It names none.
    """
    if match := BRACES.search(source):
        first, last, width = int(match[1]), int(match[2]), len(match[1])
        names = [f"{source[: match.start()]}{n:0{width}d}{source[match.end() :]}" for n in range(first, last + 1)]
        paths = [Path(name) for name in names]
    elif Path(source).is_dir():
        paths = sorted(Path(source).glob("*.tar"))
    elif "*" in source:
        paths = sorted(Path(source).parent.glob(Path(source).name))
    else:
        paths = [Path(source)]
    if not any(path.is_file() for path in paths):
        raise ValueError(f"data {source!r} names no tar that is there.")
    return paths


def is_tars(source: str) -> bool:
    """Return whether a source is tar shards, and no folder of pictures or table."""
    if source.endswith(".tar"):
        return True
    return Path(source).is_dir() and next(Path(source).glob("*.tar"), None) is not None


def list_tar(path: Path, licence_column: str = "", group_column: str = "") -> TarListing:
    """Return the samples of a tar; what is wrong with it or with them is said in words.

    Args:
        path: Of the tar.
        licence_column, group_column: Names of the licence and of the group in .json files; "" = they are not read.
    """
    listing, found, columns = TarListing(), {}, (licence_column, group_column)
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isfile():
                    member = TarMember(path, info.name, info.offset_data, info.size)
                    key, _, kind = info.name.rpartition("/")[2].partition(".")
                    folder = info.name.rpartition("/")[0]
                    found.setdefault((folder, key), {})[f".{kind.lower()}"] = member
    except (tarfile.TarError, OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        listing.problem = f"is missing ({reason})" if not path.exists() else f"is damaged or ends early ({reason})"
    end = path.stat().st_size if path.exists() else 0
    if path.exists() and not end:
        listing.problem = "is empty"
    elif not found and not listing.problem:
        listing.problem = "holds no files"
    for (folder, key), files in found.items():
        media = [(member, _problem(member, end)) for kind, member in files.items() if kind in READ or kind in NOT_READ]
        if views := _views(files):
            together = TarViews(f"{folder}/{key}".removeprefix("/"), tuple(member for _, member in views))
            media.append((together, _problem_of_views(views, end)))
        others = [kind for kind in files if kind not in (*READ, *NOT_READ, ".txt", ".json", ".cls")]
        listing.others += len(others) - len(views)
        listing.samples += [
            TarSample(member, problem=problem) if problem else _sample(member, files, end, *columns)
            for member, problem in media
        ]
    return listing


def _problem(member: TarMember, end: int) -> str:
    """Return why a file cannot be read from a tar of `end` bytes ("" = it can)."""
    if member.offset + member.size > end:
        return "lies beyond the end of the tar, which is cut off"
    kind = member.suffix.lower()
    return f"is of a kind that is not read ({kind}); save it as {NOT_READ[kind]}" if kind in NOT_READ else ""


def _views(files: dict[str, TarMember]) -> list[tuple[int, TarMember]]:
    """Return the views among the files of a key with their numbers, in this order."""
    matches = [(VIEW.fullmatch(kind), member) for kind, member in files.items()]
    found = [(int(match[1]), member) for match, member in matches if match and match[2] in (*READ, *NOT_READ)]
    return sorted(found, key=lambda each: (each[0], each[1].name))


def _problem_of_views(views: list[tuple[int, TarMember]], end: int) -> str:
    """Return why the views of a key cannot be used ("" = they can)."""
    numbers = [number for number, _ in views]
    if twice := [number for number, after in zip(numbers, numbers[1:], strict=False) if number == after]:
        return f"has view {twice[0]} twice"
    if numbers[-1] >= len(numbers):
        missing = next(number for number, given in enumerate(numbers) if number != given)
        return f"has {len(numbers)} views, of which the last is {numbers[-1]}; {missing} is missing (they begin at 0)"
    for number, member in views:
        if problem := _problem(member, end):
            return f"has a view {number} that {problem}"
        if (kind := member.suffix.lower()) not in PICTURES:
            return f"has a view {number} that is no picture ({kind})"
    return ""


def _sample(member: TarMember | TarViews, files: dict[str, TarMember], end: int, *columns: str) -> TarSample:
    """Return a sample with what its files of captions say."""
    values: dict[str, Any] = {}
    for ending in (".txt", ".json"):
        if (text := files.get(ending)) is None:
            continue
        if text.size > LONGEST_TEXT or text.offset + text.size > end:
            return TarSample(member, problem=f"has a caption file that is too long or cut off ({text.name})")
        try:
            content = text.read_bytes().decode("utf-8-sig")
            read = parse_json(content) if ending == ".json" else {"text": content.strip()}
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            return TarSample(
                member, problem=f"has a caption that is not UTF-8 ({text.name}, byte 0x{byte:02x} at {error.start})"
            )
        except (ValueError, OSError) as error:
            return TarSample(member, problem=f"has a caption file that is not JSON ({text.name}: {error})")
        if not isinstance(read, dict):
            return TarSample(member, problem=f"has a caption file that is no JSON object ({text.name})")
        values |= {key.strip().lower(): value for key, value in read.items()}
    return _with_values(member, values, *columns)


def _with_values(member: TarMember | TarViews, values: dict[str, Any], *columns: str) -> TarSample:
    """Return the sample with what its files say."""
    try:
        facts = read_facts(values, CAPTION_KEYS, *columns)
    except ValueError as error:
        return TarSample(member, problem=f"has {error}")
    if too_long := [each for each in facts.captions if len(each) > LONGEST_CAPTION]:
        return TarSample(member, problem=f"has a caption of {len(too_long[0])} characters; at most {LONGEST_CAPTION}")
    return TarSample(member, facts)
