"""Room on the disk, compared with what a run will write before it begins."""

import shutil
from pathlib import Path

SPARE = 50 * 2**20  # bytes for the log, pictures and curves


def require_space(setting: str, folder: Path, needed: int) -> None:
    """Raise OSError unless the disk of a folder, which need not exist, has room for so many bytes and a little more.

    Raises:
        OSError: It has not, or a file stands where the folder should be.
    """
    existing = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    if existing.is_file():
        raise OSError(f"{setting} {folder} cannot be made: {existing} is a file.")
    free = shutil.disk_usage(existing).free
    if free < needed + SPARE:
        raise OSError(
            f"the disk of {setting} {folder} has {free / 2**20:.0f} MiB free; this run needs about "
            f"{(needed + SPARE) / 2**20:.0f} MiB there."
        )
