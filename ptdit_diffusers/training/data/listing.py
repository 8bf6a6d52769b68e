"""The files of a data folder with their captions, from .txt files and tables; nothing is passed over in silence."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ptdit_diffusers.core.folder_files import inside
from ptdit_diffusers.training.data.media import NOT_READ, READ, VIEWS, is_views
from ptdit_diffusers.training.data.tables import Facts, find_table, read_table

CAPTIONS = ".txt"  # ending of files of captions
LONGEST_CAPTION = 20_000  # characters; a text encoder reads 200 tokens
OTHER_SPLITS = ("test", "val", "valid", "validation")  # of a folder with `train`, as data sets of the Hub have them
SIDE_FILES = (".md", ".gitattributes")  # no data, and not worth a line


@dataclass(frozen=True)
class Entry:
    """A file that could be trained on, with what is known of it; or why it is not ("" = it is)."""

    path: Path
    facts: Facts = Facts()
    problem: str = ""

    @property
    def caption(self) -> str:
        """The first caption."""
        return self.facts.caption


@dataclass
class Listing:
    """What lies in a data folder."""

    entries: list[Entry] = field(default_factory=list)
    own: list[Path] = field(default_factory=list)  # folders that our training wrote
    others: Counter[str] = field(default_factory=Counter)  # endings of files that are no data -> how many
    lonely: list[Path] = field(default_factory=list)  # files of captions without a picture


def list_data(
    source: str,
    outside_files: bool = False,
    caption_column: str = "",
    own: Sequence[Path] = (),
    licence_column: str = "",
    caption_extension: str = CAPTIONS,
    group_column: str = "",
) -> Listing:
    """Return every file of a data set; none of them is opened except tables and captions.

    Args:
        source: Folder, or a table.
        outside_files: Take also what a table or a link names outside of the folder.
        caption_column: As for `read_table`.
        own: Folders that this run writes to; what lies in them is no data.
        licence_column, group_column: As for `read_table`.
        caption_extension: Ending of the files of captions beside the pictures; may have several dots.

    Raises:
        ValueError: There is no such folder, or a table is not right.
        OSError: The folder itself cannot be opened.
    """
    place, columns = Path(source), (caption_column, licence_column, group_column)
    if place.is_file():
        entries = _table_entries(place, columns)
        listing = Listing(list(entries))
        home = place.parent
    elif place.is_dir():
        os.scandir(place).close()
        listing, home = Listing(), place
        files = list(_walk(place, None if outside_files else place, {path.resolve() for path in own}, listing))
        ending = caption_extension.lower()
        found = [path for path in sorted(files) if path.name.lower().endswith(ending)]
        texts = {(path.parent, path.name[: -len(ending)]): path for path in found}
        _read_captions(place, sorted(files), texts, columns, None if outside_files else place, listing)
    else:
        raise ValueError(f"data {source!r} is neither a folder nor a file.")
    listing.entries = [_checked(entry, None if outside_files else home) for entry in listing.entries]
    return listing


def _walk(folder: Path, home: Path | None, own: set[Path], listing: Listing) -> Iterator[Path]:
    """Yield the files below a folder; folders that are left out go into the listing."""
    seen = {folder.resolve()}
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        try:
            with os.scandir(place) as found:
                inner = sorted(found, key=lambda each: each.name)
        except OSError as error:
            listing.entries.append(Entry(place, problem=f"cannot be opened ({error.strerror})"))
            continue
        names = {each.name for each in inner}
        if place != folder and _is_ours(names):
            listing.own.append(place)
            continue
        for each in inner:
            path = place / each.name
            try:
                is_folder = path.is_dir()
            except OSError as error:  # the folder may be listed, but not entered
                listing.entries.append(Entry(path, problem=f"cannot be opened ({error.strerror})"))
                continue
            if not is_folder:
                yield path
            elif path.resolve() in own:
                listing.own.append(path)
            elif problem := _left_out(path, folder, names, home, seen):
                listing.entries.append(Entry(path, problem=problem))
            elif path.suffix.lower() == VIEWS:
                yield path
            else:
                seen.add(path.resolve())
                waiting.append(path)


def _left_out(path: Path, top: Path, beside: set[str], home: Path | None, seen: set[Path]) -> str:
    """Return why a folder is not looked into ("" = it is)."""
    if path.name.startswith("."):
        return "is hidden (its name begins with a dot)"
    if path.is_symlink() and home is not None:
        where = "is read where it lies" if inside(path, home) else "lies outside of the data folder"
        return f"is a link to a folder that {where}" + ("" if inside(path, home) else "; --outside-files takes it")
    if path.resolve() in seen:
        return "is a link to a folder that is read where it lies"
    if path.parent == top and path.name in OTHER_SPLITS and "train" in beside:
        return "is another split than train; give it as data if it is meant"
    return ""


def _is_ours(names: set[str]) -> bool:
    """Return whether a folder with these files was written by a training: a run, a cache, or a finished LoRA."""
    shards = any(name.startswith("latents-") and name.endswith(".safetensors") for name in names)
    return {"run.json", "log.jsonl"} <= names or "pytorch_lora_weights.safetensors" in names or shards


def _topmost_tables(files: list[Path]) -> dict[Path, Path]:
    """Return the tables among the files by their folders, without those below another."""
    by_folder: dict[Path, set[str]] = {}
    for path in files:
        by_folder.setdefault(path.parent, set()).add(path.name)
    tables: dict[Path, Path] = {}
    for folder in sorted(by_folder, key=lambda each: len(each.parts)):
        if not any(above in tables for above in folder.parents):
            table = find_table(by_folder[folder], folder)
            tables |= {folder: table} if table else {}
    return tables


def _read_captions(
    top: Path,
    files: list[Path],
    texts: dict[tuple[Path, str], Path],
    columns: tuple[str, str, str],
    home: Path | None,
    listing: Listing,
) -> None:
    """Sort the files into the listing, with captions from the topmost table above each, else from `texts`."""
    tables = _topmost_tables(files)
    named: set[Path] = set()
    for table in tables.values():
        for entry in _table_entries(table, columns):
            named.add(Path(os.path.normpath(entry.path)))
            listing.entries.append(entry)
    captions, used = set(texts.values()), set()
    for path in files:
        table = next((tables[above] for above in path.parents if above in tables), None)
        kind = path.suffix.lower()
        if path in captions or path in tables.values() or Path(os.path.normpath(path)) in named:
            continue
        if kind not in READ and kind not in NOT_READ:
            listing.others[kind or path.name] += kind not in SIDE_FILES and not path.name.startswith(".")
        elif path.name.startswith("."):
            listing.entries.append(Entry(path, problem="is hidden (its name begins with a dot)"))
        elif table is not None:
            listing.entries.append(Entry(path, problem=f"is not in {table.relative_to(top)}"))
        else:
            text = texts.get((path.parent, path.stem))
            used.add(text)
            listing.entries.append(_with_caption(path, text, home))
    governed = {path for path in texts.values() if any(above in tables for above in path.parents)}
    listing.lonely = [path for path in texts.values() if path not in used | governed]
    listing.others = +listing.others


def _with_caption(path: Path, text: Path | None, home: Path | None) -> Entry:
    if text is None or not text.is_file():
        return Entry(path)
    if home is not None and not inside(text, home):
        return Entry(path, problem=f"lies outside of the data folder ({text.name}); --outside-files takes it")
    try:
        if text.stat().st_size > 4 * LONGEST_CAPTION + 3:
            return Entry(path, problem=f"has a caption of more than {LONGEST_CAPTION} characters")
        caption = text.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        return Entry(
            path, problem=f"has a caption that is not UTF-8 ({text.name}, byte 0x{byte:02x} at {error.start})"
        )
    except OSError as error:
        return Entry(path, problem=f"has a caption that cannot be opened ({text.name}: {error.strerror})")
    facts = Facts((caption,), (1.0,)) if caption else Facts()
    return Entry(path, facts, f"has a caption with zero bytes ({text.name})" if "\0" in caption else "")


def _table_entries(table: Path, columns: tuple[str, str, str]) -> Iterator[Entry]:
    for row in read_table(table, *columns):
        path = table.parent / row.name
        if "\\" in row.name and not path.is_file():  # written on Windows
            path = table.parent / row.name.replace("\\", "/")
        kind = path.suffix.lower()
        known = kind in READ or kind in NOT_READ
        yield Entry(path, row.facts, "" if known else "is not a picture or video")


def _checked(entry: Entry, home: Path | None) -> Entry:
    """Return the entry with the reason why its file is not opened, if there is one."""
    return entry if entry.problem else Entry(entry.path, entry.facts, _objection(entry, home))


def _objection(entry: Entry, home: Path | None) -> str:
    path, kind = entry.path, entry.path.suffix.lower()
    try:
        if not path.exists() and not path.is_symlink():
            beside = path.parent.iterdir() if path.parent.is_dir() else ()
            other = next((each.name for each in beside if each.name.lower() == path.name.lower()), "")
            return f"does not exist; nearest: {other!r}" if other else "does not exist"
        if not path.is_file() and not is_views(path):
            return "is not an ordinary file"
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    if home is not None and not inside(path, home):
        return f"lies outside of the data folder ({path.name}); --outside-files takes it"
    if (longest := max(map(len, entry.facts.captions), default=0)) > LONGEST_CAPTION:
        return f"has a caption of {longest} characters; at most {LONGEST_CAPTION} are read"
    return f"is of a kind that is not read ({kind}); save it as {NOT_READ[kind]}" if kind in NOT_READ else ""
