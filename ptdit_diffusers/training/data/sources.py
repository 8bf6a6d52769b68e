"""What there is to encode: pictures and clips of a folder, a table or tar shards, in parts that share nothing."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ptdit_diffusers.core.files import file_hash
from ptdit_diffusers.training.data.find import piece_name, with_trigger
from ptdit_diffusers.training.data.listing import CAPTIONS, Listing, list_data
from ptdit_diffusers.training.data.media import (
    UnreadableError,
    is_views,
    read_opacity,
    read_samples,
    view_files,
)
from ptdit_diffusers.training.data.tables import Facts
from ptdit_diffusers.training.data.tars import TarMember, TarViews, is_tars, list_tar, tar_names


class Reading(Protocol):
    """What is taken of a file: settings of `PictureEncoder` and of the section `data`, which say what they mean."""

    num_frames: int
    num_views: int
    fps: float
    all_pieces: bool
    alpha_mask: bool


@dataclass(frozen=True)
class Picture:
    """A picture or clip that may be trained on, or why it cannot be (`problem`)."""

    name: str
    file: Path | TarMember | TarViews
    facts: Facts = Facts()
    problem: str = ""
    has_caption: bool = True  # of its own; else it gets the default one

    def key(self) -> str:
        """Return the hash of its content.

        Raises:
            OSError: It cannot be read.
        """
        if is_views(self.file):
            return hashlib.sha256("".join(map(_hash, view_files(self.file))).encode()).hexdigest()[:32]
        return _hash(self.file)[:32]

    def samples(
        self, reading: Reading, skip: Callable[[str, str], None]
    ) -> Iterator[tuple[int, list[Image.Image], list[Image.Image]]]:
        """Yield the samples that are trained on: number of the first frame, frames, and how opaque they are.

        Args:
            reading: What is taken; the last value is empty unless it asks for masks.
            skip: Is called with name and reason for a file, or a piece of a clip, that cannot be used.
        """
        try:
            if self.problem:
                raise UnreadableError(self.problem)
            source = self.file, reading.num_frames, reading.num_views, reading.fps, reading.all_pieces
            for number, frames in enumerate(read_samples(*source)):
                begin = number * reading.num_frames
                try:
                    opacity = read_opacity(self.file, len(frames), reading.fps, begin) if reading.alpha_mask else []
                except UnreadableError as error:  # other pieces of the clip may be opaque
                    skip(piece_name(self.name, begin), str(error))
                    continue
                yield begin, frames, opacity
        except (UnreadableError, OSError) as error:
            skip(self.name, str(getattr(error, "strerror", None) or error))

    def group(self, is_piece: bool) -> str:
        """Return the name of what is held out together with it, "" for nothing; pieces of a clip always are."""
        return self.facts.group or (self.name if is_piece else "")


def _hash(file: Path | TarMember) -> str:
    return file_hash(file) if isinstance(file, Path) else hashlib.sha256(file.read_bytes()).hexdigest()


@dataclass(frozen=True)
class DataSource:
    """A folder, a table (metadata.jsonl, metadata.csv), or tar shards.

    Args:
        source: Its place; tars may be named by a pattern or by numbers in braces.
        default_caption: Of what has no caption.
        trigger: Word before every caption, or in place of [trigger] in it.
        caption_column: Of a table.
        outside_files: Take also what a table or a link names outside of the folder.
        licence_column: Of a table or of .json files; every picture must have a licence then. "" = none is read.
        group_column: Of a table or of .json files: samples of one name are held out together. "" = none is read.
        own: Folders that the run writes to.
        caption_extension: Ending of the files of captions in a folder.
    """

    source: str
    default_caption: str = ""
    trigger: str = ""
    caption_column: str = ""
    outside_files: bool = False
    licence_column: str = ""
    group_column: str = ""
    own: tuple[Path, ...] = field(default=(), compare=False)
    caption_extension: str = CAPTIONS

    @property
    def is_tars(self) -> bool:
        """Whether it is tar shards."""
        return is_tars(self.source)

    def identity(self) -> dict[str, str | bool]:
        """Return what decides about the captions and the files, for names."""
        where = self.source if "{" in self.source or "*" in self.source else str(Path(self.source).resolve())
        own = {name: getattr(self, name) for name in ("default_caption", "trigger", "caption_column", "outside_files")}
        own |= {name: value for name in ("licence_column", "group_column") if (value := getattr(self, name))}
        own |= {} if self.caption_extension == CAPTIONS else {"caption_extension": self.caption_extension}
        return {"source": where, **own}

    def encoding_name(self, facts: Mapping[str, Any]) -> str:
        """Return a name of its encoding, which changes with it and with further facts about the samples."""
        return hashlib.sha256(json.dumps({**self.identity(), **facts}, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def listing(self) -> Listing:
        """The files of a folder or table.

        Raises:
            ValueError: There is no such folder, or a table is not right.
        """
        options = self.outside_files, self.caption_column, self.own, self.licence_column, self.caption_extension
        return list_data(self.source, *options, self.group_column)

    def count(self) -> int | None:
        """Return how many files a folder or table has; None for tars, which are not looked through for this.

        Raises:
            ValueError: There is no such folder, a table is not right, or files have no licence where they need one.
        """
        if self.is_tars:
            return None
        entries = self.listing.entries
        lacking = [entry.path.name for entry in entries if not entry.problem and not entry.facts.licence]
        if self.licence_column and lacking:
            raise ValueError(
                f"{len(lacking)} of {len(entries)} files have no {self.licence_column!r} (data.licence_column), for "
                f"example {', '.join(lacking[:3])}; add it to metadata.jsonl or metadata.csv."
            )
        return len(entries)

    def pictures(self, part: int = 0, parts: int = 1, tars: int = 0) -> Iterator[Picture]:
        """Yield what one of several parts has to look at; all parts together look at everything once.

        Args:
            part: Number of the part.
            parts: How many there are.
            tars: Look only into so many tars, spread evenly; 0 = all.

        Raises:
            ValueError: The source is not there.
        """
        if not self.is_tars:
            yield from self._files(self.listing.entries[part::parts])
            return
        paths = tar_names(self.source)
        if 0 < tars < len(paths):
            paths = [paths[i * len(paths) // tars] for i in range(tars)]
        whole = len(paths) >= parts  # a part has tars of its own
        for number, path in enumerate(paths):
            if whole and number % parts != part:
                continue
            listing = list_tar(path, self.licence_column, self.group_column)
            if listing.problem and (whole or part == 0):
                yield Picture(str(path), path, problem=listing.problem)
            samples = listing.samples if whole else listing.samples[part::parts]
            for sample in samples:
                yield self._picture(f"{path.name}:{sample.member.name}", sample.member, sample.facts, sample.problem)

    def _files(self, entries: Sequence) -> Iterator[Picture]:
        top = Path(self.source) if Path(self.source).is_dir() else Path(self.source).parent
        for entry in entries:
            name = entry.path.relative_to(top).as_posix() if entry.path.is_relative_to(top) else str(entry.path)
            yield self._picture(name, entry.path, entry.facts, entry.problem)

    def _picture(self, name: str, file: Path | TarMember | TarViews, facts: Facts, problem: str) -> Picture:
        """Return a picture with the captions that are trained on."""
        captions = tuple(with_trigger(text, self.trigger) for text in facts.captions or (self.default_caption,))
        if self.licence_column and not facts.licence and not problem:
            problem = f"has no {self.licence_column!r} (data.licence_column)"
        shown = replace(facts, captions=captions, weights=facts.weights or (1.0,))
        return Picture(name, file, shown, problem, bool(facts.captions))
