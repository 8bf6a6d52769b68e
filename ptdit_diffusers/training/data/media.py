"""Pictures and short videos from files, as 8-bit RGB.

Owns orientation, transparency, palettes, 16-bit and CMYK files, and counting frames by decoding them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PICTURES = (".png", ".apng", ".gif", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
CONTAINERS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")  # need PyAV; the others are read by Pillow
EXTRACTIONS = ("head", "chunk")  # of a clip: its first frames, or all pieces of so many
VIEWS = ".views"  # a folder NAME.views holds pictures of one object from all around, in the order of their names
READ = (*PICTURES, *CONTAINERS, VIEWS)
NOT_READ = {  # pictures and videos of other kinds -> what to save them as
    **dict.fromkeys(".heic .heif .avif .jxl .jp2 .j2k .tga .psd .svg .ico .exr .hdr .eps .pdf".split(), "PNG or JPEG"),
    **dict.fromkeys(".cr2 .cr3 .nef .arw .dng .raf .orf .rw2 .raw .ppm .pgm".split(), "PNG or JPEG"),
    **dict.fromkeys(".ts .mts .m2ts .mpg .mpeg .wmv .flv .f4v .3gp .ogv .vob .y4m".split(), "MP4"),
}
# Files are read as these kinds only, whatever is in them: Pillow would start Ghostscript, FFmpeg follow a playlist.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
ANIMATED = ("PNG", "WEBP", "GIF")  # the pages of other files are no frames of a clip
TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")  # modes of Pillow
USUAL_MS = 100  # that a frame is shown where the file does not say it
VIDEO_OPTIONS = {"format_whitelist": "mov,mp4,matroska,webm,avi", "protocol_whitelist": "file"}


class Member(Protocol):
    """A file inside of another one, for example of a tar; it is read as a file on disk is."""

    suffix: str

    def open(self) -> BinaryIO:
        """Return the content as a file."""


class MemberViews(Protocol):
    """Views of one object inside of another file; they are read as a folder of views is."""

    suffix: str  # VIEWS

    @property
    def views(self) -> Sequence[Member]:
        """The pictures, in the order of a turn round the object."""


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
    if image.mode in TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_frames(
    path: Path | Member | MemberViews, num_frames: int, begin: int = 0, fps: float = 0.0
) -> list[Image.Image]:
    """Return frames of a clip, or for 1 the one of a picture; of a folder of views the first.

    Args:
        path: Of the file or folder.
        num_frames: How many.
        begin: Number of the first one, of those that `fps` leaves.
        fps: Take so many a second; 0 = all.

    Raises:
        UnreadableError: The file is damaged, of an unknown kind, or has too few frames; says which.
    """
    if is_views(path):
        frames = (frame for file in view_files(path) for _, frame in _opened(file, picture_to_rgb))
    else:
        frames = _at_rate(_frames(path, picture_to_rgb), fps)
    found = list(islice(frames, begin, begin + num_frames))
    if len(found) < num_frames:
        raise UnreadableError(f"has {len(found)} frames, num_frames={num_frames} were asked for")
    return found


def count_frames(path: Path | Member, fps: float = 0.0) -> int:
    """Return how many frames a clip has, of those that `fps` leaves, by decoding all of it.

    Raises:
        UnreadableError: As `read_frames`.
    """
    return sum(1 for _ in _at_rate(_frames(path, lambda frame: frame), fps))


def _at_rate(frames: Iterable[tuple[float, Image.Image]], fps: float) -> Iterator[Image.Image]:
    """Yield the frame that is shown at each multiple of 1 / fps seconds from the first frame on; all where fps is 0.

    Raises:
        UnreadableError: One would be taken twice.
    """
    if not fps:
        yield from (frame for _, frame in frames)
        return
    shown, start, seconds, wanted, early = None, 0.0, 0.0, 0, min(0.25 / fps, 0.01)
    for time, frame in frames:
        start = time if shown is None else start  # that of a clip that was cut out of another is seldom 0
        seconds = time - start
        if shown is not None and seconds > wanted / fps + early:
            yield shown
            wanted += 1
            if seconds > wanted / fps + early:
                raise UnreadableError(f"has fewer than {fps:g} frames a second (fps)")
        shown = frame
    if shown is not None and seconds >= wanted / fps - early:
        yield shown


def is_clip(path: Path | Member | MemberViews) -> bool:
    """Return whether a file moves, which its content says: GIF, PNG and WebP may be either.

    Raises:
        UnreadableError: As `read_frames`.
    """
    if path.suffix.lower() in CONTAINERS:
        return True
    if is_views(path):
        return False
    with _problems_named(), Image.open(_content(path), formats=FORMATS) as image:
        return image.format in ANIMATED and getattr(image, "n_frames", 1) > 1


def is_views(path: Path | Member | MemberViews) -> bool:
    """Return whether a path is a folder of views, or views inside of another file."""
    return path.suffix.lower() == VIEWS and (not isinstance(path, Path) or path.is_dir())


def view_files(folder: Path | MemberViews) -> list[Path | Member]:
    """Return the pictures of a folder of views; view i of V is seen from azimuth i * 360 / V degrees."""
    if not isinstance(folder, Path):
        return list(folder.views)
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.name[0] != ".")


def read_sample(
    path: Path | Member | MemberViews, num_frames: int, num_views: int = 0, fps: float = 0.0
) -> list[Image.Image]:
    """Return what is trained on: a picture, the first frames of a clip, or views evenly spread around the object.

    Args:
        path: Of the file or the folder of views.
        num_frames: Of a clip.
        num_views: Of a folder of views, whose number of pictures is a multiple of it; 0 = these are not read.
        fps: Take so many frames a second of a clip; 0 = all.

    Raises:
        UnreadableError: As `read_frames`, or views are too few, or of different sizes.
    """
    if not is_views(path):
        return read_frames(path, num_frames, fps=fps) if is_clip(path) else read_frames(path, 1)
    files = view_files(path)
    if not num_views:
        raise UnreadableError(f"holds {len(files)} views; data.num_views says how many are trained on")
    if not files or len(files) % num_views:
        raise UnreadableError(f"has {len(files)} views, which is no multiple of num_views={num_views}")
    views = [read_frames(file, 1)[0] for file in files[:: len(files) // num_views]]
    if len({view.size for view in views}) > 1:
        raise UnreadableError("has views of different sizes")
    return views


def read_samples(
    path: Path | Member | MemberViews, num_frames: int, num_views: int = 0, fps: float = 0.0, all_pieces: bool = False
) -> Iterator[list[Image.Image]]:
    """Yield what `read_sample` returns, or all pieces of `num_frames` of a clip; a rest is left out.

    Raises:
        UnreadableError: As `read_sample`.
    """
    pieces = count_frames(path, fps) // num_frames if all_pieces and is_clip(path) else 1
    if pieces < 2:
        yield read_sample(path, num_frames, num_views, fps)
        return
    frames = _at_rate(_frames(path, picture_to_rgb), fps)
    yield from (list(islice(frames, num_frames)) for _ in range(pieces))


def read_opacity(path: Path | Member | MemberViews, count: int, fps: float = 0.0, begin: int = 0) -> list[Image.Image]:
    """Return how opaque the pixels of the `count` frames or views of a sample are, 8 bits each; a piece has a `begin`.

    Raises:
        UnreadableError: As `read_frames`, or nothing is opaque.
    """
    if is_views(path):
        files = view_files(path)
        found = [read_alpha(file, 1)[0] for file in files[:: len(files) // count]]
    else:
        found = read_alpha(path, count, begin, fps if count > 1 else 0.0)
    if not any(each.getbbox() for each in found):
        raise UnreadableError("is wholly transparent (alpha_mask)")
    return found


def clip_length(path: Path | Member | MemberViews, frames: int) -> int:
    """Return the frames of the clip that the model sees: each view is a latent frame, which in a clip has four."""
    return 4 * (frames - 1) + 1 if is_views(path) else frames


EVEN = (500, 500)  # place of a crop in the middle


def fit(image: Image.Image, width: int, height: int, crop: tuple[int, int] = EVEN) -> Image.Image:
    """Scale a picture until it covers width x height pixels and crop it.

    Args:
        image: Of any size.
        width, height: Wanted, in pixels.
        crop: Where: thousandths of what is cut off that lie left of the crop and above it; even by default.
    """
    return ImageOps.fit(
        image, (width, height), Image.Resampling.LANCZOS, centering=tuple(each / 1000 for each in crop)
    )


def read_alpha(path: Path | Member, num_frames: int, begin: int = 0, fps: float = 0.0) -> list[Image.Image]:
    """Return how opaque the pixels of the frames are that `read_frames` returns, 8 bits each.

    Raises:
        UnreadableError: As `read_frames`.
    """
    return list(islice(_at_rate(_frames(path, _alpha), fps), begin, begin + num_frames))


def _alpha(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    transparent = image.mode in TRANSPARENT or "transparency" in image.info
    return image.convert("RGBA").getchannel("A") if transparent else Image.new("L", image.size, 255)


@contextmanager
def _problems_named() -> Iterator[None]:
    """Turn what goes wrong with a file into an UnreadableError; a crafted file fails in many ways."""
    try:
        yield
    except UnreadableError:
        raise
    except UnidentifiedImageError:
        raise UnreadableError("is not a picture") from None
    except Image.DecompressionBombError as error:
        raise UnreadableError(f"is too large ({error})") from error
    except PermissionError as error:
        raise UnreadableError(f"cannot be opened ({error.strerror})") from error
    except Exception as error:
        if "MAX_TEXT" in str(error):
            raise UnreadableError("holds more than a mebibyte of text; save it without its metadata") from error
        raise UnreadableError(f"is damaged ({error})") from error


def _content(path: Path | Member) -> Path | BinaryIO:
    return path if isinstance(path, Path) else path.open()


def _frames(path: Path | Member, convert: Callable[[Image.Image], Image.Image]) -> Iterator[tuple[float, Image.Image]]:
    """Yield the second at which each frame begins, and the frame, converted."""
    return _decoded(path, convert) if path.suffix.lower() in CONTAINERS else _opened(path, convert)


def _opened(path: Path | Member, convert: Callable[[Image.Image], Image.Image]) -> Iterator[tuple[float, Image.Image]]:
    with _problems_named(), Image.open(_content(path), formats=FORMATS) as image:
        seconds = 0.0
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            yield seconds, convert(image.copy())
            seconds += (image.info.get("duration") or USUAL_MS) / 1000


def _decoded(
    path: Path | Member, convert: Callable[[Image.Image], Image.Image]
) -> Iterator[tuple[float, Image.Image]]:
    try:
        import av
    except ImportError:
        raise UnreadableError(f"needs PyAV to read {path.suffix}: pip install av") from None
    with (
        _problems_named(),
        av.open(str(path) if isinstance(path, Path) else path.open(), options=VIDEO_OPTIONS) as container,
    ):
        if not container.streams.video:
            raise UnreadableError("has no video in it")
        rate = float(container.streams.video[0].average_rate or 25)
        for number, frame in enumerate(container.decode(video=0)):
            turn = 90 * round(getattr(frame, "rotation", 0) / 90)  # counterclockwise; phones film sideways
            seconds = number / rate if frame.time is None else float(frame.time)
            yield seconds, convert(frame.to_image().rotate(turn, expand=True))
