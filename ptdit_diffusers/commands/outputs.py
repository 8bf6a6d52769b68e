"""The files of `ptdit generate`: their formats, checks beforehand, and writing with the settings inside.

A file is written to a temporary name first and then renamed, so nothing half-written is left behind.
"""

import difflib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from glob import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptdit_diffusers.core.folder_files import move

from .terminal import UserError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

    Result = Image | list[Image]  # an image, or the frames of a video, or the views of an object

MP4_PACKAGES = {"imageio": "imageio", "imageio_ffmpeg": "imageio-ffmpeg"}  # module -> name to install; as diffusers
MP4_QUALITY = 8  # of 0 to 10; the 5 of diffusers' export_to_video blurs the edges of flat shapes
WEBP_QUALITY = 90
IMAGE_DESCRIPTION = 0x010E  # field of EXIF

IMAGE, VIDEO, VIEWS = "image", "video", "views"
ANIMATED = (".mp4", ".gif", ".webp")
ENDINGS = {IMAGE: (".png",), VIDEO: (*ANIMATED, ""), VIEWS: (".png", *ANIMATED, "")}  # "" is a folder of PNG files
DEFAULTS = {IMAGE: "ptdit.png", VIDEO: "ptdit.webp", VIEWS: "ptdit.png"}
RULES = {
    IMAGE: "does not end in .png, the format that keeps the settings in the image",
    VIDEO: "is no file for a video; end it in .mp4, .gif or .webp, or give a name without an ending for a folder of "
    "PNG files",
    VIEWS: "is no file for views; end it in .png for a contact sheet, in .mp4, .gif or .webp for rotating views, or "
    "give a name without an ending for a folder of PNG files",
}


def check_output(output: Path, kind: str = IMAGE) -> None:
    """Refuse a name that is no file for an image, a video or views.

    Raises:
        UserError: A file of that ending cannot hold this kind of result, or a package is missing to write it.
    """
    ending = output.suffix.lower()
    if output.name.lower() in (".png", *ANIMATED):
        raise UserError(
            f"--output {output} has no name before the ending; nearest: {output.with_name('ptdit' + output.name)}"
        )
    if ending not in ENDINGS[kind]:
        near = difflib.get_close_matches(ending, ENDINGS[kind], n=1) if ending else []
        raise UserError(f"--output {output} {RULES[kind]}" + (f"; nearest: {near[0]}" if near else ""))
    missing = [name for module, name in MP4_PACKAGES.items() if ending == ".mp4" and find_spec(module) is None]
    if missing:
        raise UserError(
            f"--output {output}: writing .mp4 needs {' and '.join(missing)}: python -m pip install "
            f"{' '.join(missing)}; .webp and .gif need nothing"
        )


def output_files(output: Path, count: int) -> Iterator[Path]:
    """Return the files to write: FILE.png, or FILE-0.png, FILE-1.png, ... for several images, videos or objects."""
    names = (f"{output.stem}-{index}{output.suffix}" for index in range(count))
    return iter([output]) if count == 1 else map(output.with_name, names)


def check_targets(output: Path, count: int, overwrite: bool) -> None:
    """Refuse files that exist or cannot be written; writing is tried with a temporary file."""
    first, folder = next(output_files(output, count)), output.parent
    try:
        refuse_existing(first, overwrite)
        for path in folder.glob(f"{escape(output.stem)}-*{escape(output.suffix)}") if count > 1 else ():
            number = path.name.removeprefix(f"{output.stem}-").removesuffix(output.suffix)
            if number.isdecimal() and number == str(int(number)) and int(number) < count:
                refuse_existing(path, overwrite)
        if not folder.is_dir():
            raise UserError(f"--output {first}: there is no folder {folder}; make it or name another one")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output {first} cannot be written: {error.strerror}") from error


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Refuse a target that exists, unless it is a file that may be replaced, or an empty folder to be filled."""
    if target.suffix == "":
        if target.is_dir() and any(target.iterdir()):
            raise UserError(f"--output {target} is a folder that is not empty; name another one (nothing replaces it)")
        if os.path.lexists(target) and not target.is_dir():
            raise UserError(f"--output {target} exists and is not a folder; name another one")
        return
    if target.is_dir():
        raise UserError(f"--output {target} is a folder; name a file, for example {target / 'ptdit.png'}")
    if os.path.lexists(target) and not overwrite:
        raise UserError(f"--output {target} exists; name another file, or add --overwrite to replace it")


def save(result: "Result", target: Path, metadata: dict[str, Any], overwrite: bool, fps: int) -> None:
    """Write an image, a video or views with their settings: to a temporary name first, then renamed.

    Args:
        result: One image, or a list of images of one size.
        target: As `output_files` returned it; its ending decides the format.
        metadata: The settings. PNG: one text chunk each; GIF (comment), WebP (EXIF ImageDescription) and MP4
            (comment): one JSON text.
        overwrite: Whether an existing file may be replaced.
        fps: Frames per second of animations.

    Raises:
        UserError: The file cannot be written, or appeared in the meantime. Nothing is left behind.
    """
    ending = target.suffix.lower()
    unfinished = target.with_name(f".{uuid.uuid4().hex}.part{ending}")
    try:
        writer_of(ending)(result, unfinished, metadata, fps)
        refuse_existing(target, overwrite)
        if target.is_dir():  # an empty one
            target.rmdir()
        move(unfinished, target)
    except (OSError, RuntimeError) as error:  # of the disk, of ffmpeg
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"--output {target} cannot be written: {reason}") from error
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)


def writer_of(ending: str) -> Callable[["Result", Path, dict[str, Any], int], None]:
    """Return the function that writes files of this ending."""
    return {".png": write_png, ".gif": write_gif, ".webp": write_webp, ".mp4": write_mp4, "": write_folder}[ending]


def write_png(result: "Result", path: Path, metadata: dict[str, Any], fps: int) -> None:
    """Write an image; views become a contact sheet."""
    from PIL.PngImagePlugin import PngInfo

    from ptdit_diffusers.core.views import contact_sheet

    chunks = PngInfo()
    for name, value in metadata.items():
        chunks.add_itxt(name, str(value))
    image = contact_sheet(result) if isinstance(result, list) else result
    with open(path, "xb") as file:
        image.save(file, format="PNG", pnginfo=chunks)


def write_folder(result: "Sequence[Image]", path: Path, metadata: dict[str, Any], fps: int) -> None:
    """Write a folder of 000.png, 001.png, ..., each with the settings, its number and, for views, its azimuth."""
    from ptdit_diffusers.core.views import azimuths

    path.mkdir()
    digits = max(3, len(str(len(result) - 1)))
    for index, (image, azimuth) in enumerate(zip(result, azimuths(len(result)), strict=True)):
        place = {"view": index, "azimuth": azimuth} if "num_views" in metadata else {"frame": index}
        write_png(image, path / f"{index:0{digits}}.png", metadata | place, fps)


def write_gif(result: "Sequence[Image]", path: Path, metadata: dict[str, Any], fps: int) -> None:
    """Write an animated GIF that repeats forever."""
    settings = {"format": "GIF", "comment": json.dumps(metadata).encode("ascii")}
    write_animation(result, path, fps, settings)


def write_webp(result: "Sequence[Image]", path: Path, metadata: dict[str, Any], fps: int) -> None:
    """Write an animated WebP that repeats forever."""
    from PIL.Image import Exif

    exif = Exif()
    exif[IMAGE_DESCRIPTION] = json.dumps(metadata)
    write_animation(result, path, fps, {"format": "WEBP", "quality": WEBP_QUALITY, "exif": exif})


def write_animation(result: "Sequence[Image]", path: Path, fps: int, settings: dict[str, Any]) -> None:
    """Write an animation with Pillow; `settings` are its options for the format."""
    with open(path, "xb") as file:
        result[0].save(
            file, save_all=True, append_images=list(result[1:]), duration=round(1000 / fps), loop=0, **settings
        )


def write_mp4(result: "Sequence[Image]", path: Path, metadata: dict[str, Any], fps: int) -> None:
    """Write an H.264 video as diffusers' `export_to_video` does, which cannot add settings."""
    import imageio
    import numpy as np

    comment = ["-metadata", f"comment={json.dumps(metadata)}"]
    with imageio.get_writer(path, format="FFMPEG", fps=fps, quality=MP4_QUALITY, output_params=comment) as writer:
        for image in result:
            writer.append_data(np.asarray(image))
