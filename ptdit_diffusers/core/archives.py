"""Torch files, which are zip archives: their list of contents, looked at before anything is unpacked."""

import zipfile
from pathlib import Path

from .checkpoint_names import ConversionError

LARGEST_PICKLE = 32_000_000  # bytes of a torch file besides numbers; a weight takes about 150


def check_archive(path: Path) -> None:
    """Check that a torch file is not larger unpacked than packed, and that what is unpickled is small.

    Raises:
        ConversionError: It is no archive that torch wrote.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ConversionError(f"{path} is cut off or damaged; fetch it again ({error})") from error
    if (total := sum(member.file_size for member in members)) > path.stat().st_size:
        raise ConversionError(f"{path} is no checkpoint of torch: unpacked it would have {total:,} bytes")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ConversionError(f"{path} is no checkpoint of torch: {member.filename} in it is compressed")
        if member.filename.endswith("data.pkl") and member.file_size > LARGEST_PICKLE:
            raise ConversionError(f"{path} is no checkpoint of weights: it has {member.file_size:,} bytes of objects")
