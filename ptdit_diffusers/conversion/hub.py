"""Checkpoint files named by where they are on the Hugging Face Hub: `OWNER/NAME[@REVISION][:PATH]`.

Only the files that are needed are fetched, into huggingface_hub's cache. A broken download resumes where it stopped;
after an interrupt complete files are kept.
"""

import difflib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_download, scan_cache_dir, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ptdit_diffusers.core.checkpoint_names import LISTED, ConversionError
from ptdit_diffusers.core.files import shard_names

from .containers import one_line
from .text import TOKENIZER_FILES, WEIGHT_FILES

SOURCE = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^:@\s]+))?(:(?P<path>[^:\\]*))?")
CHECKPOINTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".index.json")
TOKENIZER_PARTS = (*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class HubSource(NamedTuple):
    """A repository, a branch, tag or commit of it (None: main), and a path in it ("": the whole repository)."""

    repo: str
    revision: str | None
    path: str


class Listing(NamedTuple):
    """What a repository holds: its commit, and name -> bytes (0 where unknown)."""

    commit: str
    files: dict[str, int]


def hub_source(text: str, revision: str | None = None) -> HubSource | None:
    """Parse the name of a source; None if it means a file or folder of this machine.

    What exists on this machine wins. A name that ends like a checkpoint, or whose folder exists, means a missing file.

    Args:
        text: A path, or OWNER/NAME[@REVISION][:PATH].
        revision: Branch, tag or commit for sources that name none.
    """
    match = SOURCE.fullmatch(text)
    if match is None or Path(text).exists():
        return None
    if match["path"] is None and (text.endswith(CHECKPOINTS) or Path(text).parent.is_dir()):
        return None
    return HubSource(match["repo"], match["revision"] or revision, (match["path"] or "").strip("/"))


def locate(text: str, component: str, revision: str | None, report: Callable[[str], None]) -> Path:
    """Return the file or folder of a component on this machine, fetched from the Hub where its name says so.

    Args:
        text: A path, or OWNER/NAME[@REVISION][:PATH].
        component: "transformer", "vae", "text_encoder" or "tokenizer"; decides which files are needed.
        revision: Branch, tag or commit for sources that name none.
        report: Receives a line that says what is fetched.

    Raises:
        ConversionError: There is no such repository or file, the Hub cannot be reached, or the disk is too small.
    """
    source = hub_source(text, revision)
    if source is None:
        return Path(text)
    try:
        listing = list_files(source, report)
        if component in ("text_encoder", "tokenizer"):
            path, needed = text_files(source, listing, component)
        else:
            path, needed = source_file(source, listing), []
        index = next((name for name in (path, *needed) if name.endswith(".index.json")), None)
        if index is not None:
            needed += shards_of(source, listing, index)
        needed = list(dict.fromkeys([path] * (path in listing.files) + needed))
        check_room(source, listing, needed, report)
        fetched = [Path(hf_hub_download(source.repo, name, revision=source.revision)) for name in needed]
    except ConversionError:
        raise
    except Exception as error:  # network, Hub and disk fail in many ways
        raise ConversionError(trouble(source, error)) from error
    root = fetched[0].parents[needed[0].count("/")]
    return root / path if path else root


def list_files(source: HubSource, report: Callable[[str], None]) -> Listing:
    """Return the files of a repository; without a network those that were fetched earlier."""
    try:
        info = HfApi().model_info(source.repo, revision=source.revision, files_metadata=True)
        return Listing(info.sha, {file.rfilename: file.size or 0 for file in info.siblings or []})
    except OfflineModeIsEnabled:
        folder = cached_snapshot(source)
        report(f"{source.repo}: offline, so what was fetched earlier is used ({folder.name})")
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return Listing(folder.name, dict.fromkeys(names, 0))


def cached_snapshot(source: HubSource) -> Path:
    """Return the folder in the cache with what was fetched of a repository.

    Raises:
        LocalEntryNotFoundError: Nothing was fetched.
    """
    revision = source.revision or constants.DEFAULT_REVISION
    repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos if Path(constants.HF_HUB_CACHE).is_dir() else []
    for repository in repositories:
        for snapshot in repository.revisions if repository.repo_id == source.repo else []:
            if revision in (snapshot.commit_hash, *snapshot.refs):
                return snapshot.snapshot_path
    raise LocalEntryNotFoundError(f"{source.repo} at {revision} is not in the cache")


def trouble(source: HubSource, error: Exception) -> str:
    """Return a message that says what failed between here and the Hub, and what to do about it."""
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{source.repo}"
        return f"{source.repo} requires that its conditions are accepted: do so at {page}, then log in"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no file or folder {source.repo} here, and no such repository on the Hub (or it is private: "
            "log in with `hf auth login`)"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{source.repo} has no branch, tag or commit {source.revision}"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return f"{source.repo} was not fetched yet, and the Hub cannot be reached (offline mode, or no network)"
    return (
        f"{source.repo} cannot be fetched: {one_line(error)}; complete files are kept in "
        f"{constants.HF_HUB_CACHE}, so the same command resumes after them"
    )


def source_file(source: HubSource, listing: Listing) -> str:
    """Return the checkpoint that a source means: the one it names, or the only one in the repository.

    Raises:
        ConversionError: There is none of that name, or there are several.
    """
    if source.path in listing.files:
        return source.path
    found = [name for name in listing.files if name.endswith(CHECKPOINTS)]
    if source.path:
        near = difflib.get_close_matches(source.path, listing.files, n=3, cutoff=0.0)
        raise ConversionError(f"{source.repo} has no file {source.path}; nearest: {', '.join(near) or 'none'}")
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConversionError(f"{source.repo} holds no checkpoint ({', '.join(CHECKPOINTS)})")
    names = ", ".join(found[:LISTED]) + (f", and {len(found) - LISTED} more" if len(found) > LISTED else "")
    raise ConversionError(f"{source.repo} holds several checkpoints; name one as {source.repo}:{found[0]} ({names})")


def text_files(source: HubSource, listing: Listing, component: str) -> tuple[str, list[str]]:
    """Return a text encoder's file or folder in a repository, and what else is needed: weights, config, tokenizer."""
    if source.path in listing.files:
        return source.path, tokenizer_files(listing, parent(source.path))
    inner = join(source.path, "text_encoder")
    folder = inner if join(inner, "config.json") in listing.files else source.path
    tokenizer = tokenizer_files(listing, source.path if component == "tokenizer" else folder)
    if component == "tokenizer":
        if tokenizer:
            return parent(tokenizer[0]), tokenizer
        raise ConversionError(
            f"{source.repo} has no tokenizer ({' or '.join(TOKENIZER_FILES)}) in {source.path or '/'}"
        )
    weights = next((join(folder, name) for name in WEIGHT_FILES if join(folder, name) in listing.files), None)
    config = join(folder, "config.json")
    if weights is None or config not in listing.files:
        return source_file(source, listing), tokenizer  # a single file, or the error that names what there is
    return folder, [config, weights, *tokenizer]


def tokenizer_files(listing: Listing, folder: str) -> list[str]:
    """Return the files of a tokenizer in or beside a folder of a repository, from the first place that has one."""
    for place in (join(folder, "tokenizer"), folder, join(parent(folder), "tokenizer")):
        if any(join(place, name) in listing.files for name in TOKENIZER_FILES):
            return [join(place, name) for name in TOKENIZER_PARTS if join(place, name) in listing.files]
    return []


def shards_of(source: HubSource, listing: Listing, index: str) -> list[str]:
    """Return the files that the index of a sharded checkpoint names; the index is fetched."""
    path = Path(hf_hub_download(source.repo, index, revision=source.revision))
    names = [join(parent(index), shard) for shard in shard_names(path, f"{source.repo}:{index}")]
    absent = [name for name in names if name not in listing.files]
    if absent:
        raise ConversionError(f"{source.repo}:{index} names {absent[0]}, which the repository does not hold")
    return names


def check_room(source: HubSource, listing: Listing, needed: list[str], report: Callable[[str], None]) -> None:
    """Report what will be fetched, and refuse when the disk has too little room."""
    absent = [name for name in needed
              if not isinstance(try_to_load_from_cache(source.repo, name, revision=listing.commit), str)]  # fmt: skip
    size = sum(listing.files[name] for name in absent)
    cache = Path(constants.HF_HUB_CACHE)
    there = next(place for place in (cache, *cache.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    if size > free:
        raise ConversionError(
            f"{source.repo}: {size / 10**9:.2f} GB have to be fetched and {there} has {free / 10**9:.2f} GB of free "
            "space; make room, or name another cache with the environment variable HF_HOME"
        )
    what = f"fetching {len(absent)} files, {size / 10**9:.2f} GB, into {cache}" if absent else f"all there in {cache}"
    report(f"{source.repo} at {listing.commit[:10]}: {what}")


def join(folder: str, name: str) -> str:
    """Join a folder and a name to a path in a repository; "" is its top."""
    return f"{folder}/{name}" if folder else name


def parent(path: str) -> str:
    """Return the folder of a path in a repository, "" for its top."""
    return path.rpartition("/")[0]
