"""Pictures and short videos from files, as 8-bit RGB.

Owns orientation, transparency, palettes, 16-bit and CMYK files, and counting frames by decoding them.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEOS = (".gif", ".apng", ".mp4", ".mov", ".mkv", ".webm", ".avi")
CONTAINERS = VIDEOS[2:]  # need PyAV; the others are read by Pillow
# Files are read as these kinds only, whatever is in them: Pillow would start Ghostscript, FFmpeg follow a playlist.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
VIDEO_OPTIONS = {"format_whitelist": "mov,mp4,matroska,webm,avi", "protocol_whitelist": "file"}


class UnreadableError(ValueError):
    """A file that cannot be trained on; the message is the reason."""


def picture_to_rgb(image: Image.Image) -> Image.Image:
    """Return RGB with orientation applied, transparency on white, 16-bit gray scaled and CMYK converted.

    Raises:
        UnreadableError: The picture holds floating-point values, whose range is unknown.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise UnreadableError("holds floating-point values; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit gray, also as 32-bit integers
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_frames(path: Path, num_frames: int) -> list[Image.Image]:
    """Return the one picture of a picture file, or the first `num_frames` frames of a video.

    Raises:
        UnreadableError: The file is damaged, of an unknown kind, or has too few frames; says which.
    """
    if path.suffix.lower() not in VIDEOS:
        return [_open(path)]
    frames = _decoded(path) if path.suffix.lower() in CONTAINERS else _animation(path)
    found = [frame for _, frame in zip(range(num_frames), frames, strict=False)]
    if len(found) < num_frames:
        raise UnreadableError(f"has {len(found)} frames, num_frames={num_frames} were asked for")
    return found


def size_of(path: Path, num_frames: int) -> tuple[int, int]:
    """Return width and height in pixels as trained, after decoding the whole file once.

    Raises:
        UnreadableError: As `read_frames`.
    """
    return read_frames(path, num_frames)[0].size


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale a picture until it covers width x height pixels and crop it evenly."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=FORMATS) as image:
            return picture_to_rgb(image)
    except UnreadableError:
        raise
    except UnidentifiedImageError:
        raise UnreadableError("is not a picture") from None
    except Exception as error:  # a crafted file fails in many ways
        raise UnreadableError(f"is damaged ({error})") from error


def _animation(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            for index in range(getattr(image, "n_frames", 1)):
                image.seek(index)
                yield picture_to_rgb(image.copy())
    except UnreadableError:
        raise
    except UnidentifiedImageError:
        raise UnreadableError("is not a video that Pillow can read") from None
    except Exception as error:  # a crafted file fails in many ways
        raise UnreadableError(f"is damaged ({error})") from error


def _decoded(path: Path) -> Iterator[Image.Image]:
    try:
        import av
    except ImportError:
        raise UnreadableError(f"needs PyAV to read {path.suffix}: pip install av") from None
    try:
        with av.open(str(path), options=VIDEO_OPTIONS) as container:
            if not container.streams.video:
                raise UnreadableError("has no video in it")
            for frame in container.decode(video=0):
                yield frame.to_image()
    except av.FFmpegError as error:
        raise UnreadableError(f"is damaged ({error})") from error
