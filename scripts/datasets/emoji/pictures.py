"""The drawn pictures on disk: pictures/SET/CODE.png with alpha, and index.jsonl with a line about each."""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.datasets.emoji.drawing import draw, on_ground
from scripts.datasets.emoji.icons import STYLES, WORDS, Emoji, read_emoji, read_svgs

FOLDER, INDEX = "pictures", "index.jsonl"
THINGS = ("smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects")
ROLES = "person-role"
ALIKE = 0.05  # RMS of 32 x 32 pixels on white, 0 to 1, under which two emoji of one set are near-duplicates
COMPARED = 32  # pixels a side


@dataclass(frozen=True)
class Picture:
    """A drawn emoji.

    Attributes:
        style: Its set, a key of STYLES.
        emoji: What it shows.
        everywhere: Whether all four sets have its concept, which the judges tell apart.
        twins: Code of a concept for all that are near-duplicates of each other in some set.
    """

    style: str
    emoji: Emoji
    everywhere: bool
    twins: str

    @property
    def file(self) -> str:
        """Its path below the folder of the data."""
        return f"{FOLDER}/{self.style}/{self.emoji.code}.png"

    @property
    def selected(self) -> bool:
        """Whether the model learns it: things without letters and signs, and people in their roles."""
        return self.everywhere and (self.emoji.group in THINGS or self.emoji.subgroup == ROLES)


def draw_all(folder: Path, processes: int, say: Callable[[str], None]) -> int:
    """Draw every icon of the packages, write the index last, and return how many there are.

    What was drawn before is kept, so a call that was stopped goes on.

    Args:
        folder: Of the data; holds packages/.
        processes: That draw at the same time.
        say: Gets a line now and then.

    Raises:
        ValueError: A package is missing, or resvg-py is.
    """
    packages = folder / "packages"
    emoji = read_emoji(packages)
    svgs = {style: read_svgs(packages, style) for style in STYLES}
    everywhere = {each.base for each in emoji if all(each.base in svgs[style] for style in STYLES)}
    twins = {style: {} for style in STYLES}
    found: list[tuple[str, Emoji]] = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for style in STYLES:
            (folder / FOLDER / style).mkdir(parents=True, exist_ok=True)
            mine = [each for each in emoji if each.code in svgs[style]]
            paths = [folder / FOLDER / style / f"{each.code}.png" for each in mine]
            together = map if processes == 1 else partial(pool.map, chunksize=32)
            small = together(draw_file, [svgs[style][each.code] for each in mine], repeat(style), paths)
            for each, thumbnail in zip(mine, small, strict=True):
                found.append((style, each))
                if each.code in everywhere:
                    twins[style][each.code] = thumbnail
            say(f"{style}: {len(mine)} pictures")
    groups = near_duplicates(twins)
    with open(folder / f"{INDEX}.part", "w", encoding="utf-8") as file:
        for style, each in found:
            line = asdict(Picture(style, each, each.base in everywhere, groups.get(each.base, each.base)))
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    (folder / f"{INDEX}.part").replace(folder / INDEX)
    return len(found)


def draw_file(svg: str, style: str, path: Path) -> np.ndarray:
    """Draw an icon into a file unless it is there, and return its thumbnail."""
    if path.is_file():
        with Image.open(path) as image:
            return thumbnail(np.asarray(image.convert("RGBA")))
    pixels = draw(svg, style)
    part = path.with_suffix(".part")
    Image.fromarray(pixels).save(part, format="PNG")
    part.replace(path)
    return thumbnail(pixels)


def read_index(folder: Path) -> list[Picture]:
    """Return the pictures of a data folder.

    Raises:
        ValueError: There are none.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{path} is missing; draw the pictures with: python -m scripts.emoji draw {folder}")
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        emoji = values.pop("emoji")
        found.append(Picture(emoji=Emoji(**{**emoji, "tags": tuple(emoji["tags"])}), **values))
    return found


def style_numbers(pictures: Iterable[Picture]) -> np.ndarray:
    """Return the number of the style of each picture (N,): its place among the four, or after them the fifth's."""
    styles = list(WORDS)
    return np.array([styles.index(each.style) for each in pictures], int)


def load(folder: Path, picture: Picture) -> np.ndarray:
    """Return a picture as RGBA bytes (H, W, 4)."""
    with Image.open(folder / picture.file) as image:
        return np.asarray(image.convert("RGBA"))


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Return an RGBA picture on white, made small: float32 (COMPARED, COMPARED, 3), 0 to 1."""
    small = Image.fromarray(on_ground(pixels, (255, 255, 255)))
    return np.asarray(small.resize((COMPARED, COMPARED), Image.Resampling.BOX), np.float32) / 255


def near_duplicates(small: dict[str, dict[str, np.ndarray]]) -> dict[str, str]:
    """Return code -> the first code of its group; in a group, each is near to another in some set.

    Args:
        small: Set -> code -> thumbnail.
    """
    parent: dict[str, str] = {code: code for pictures in small.values() for code in pictures}

    def root(code: str) -> str:
        while parent[code] != code:
            code = parent[code]
        return code

    for pictures in small.values():
        codes = sorted(pictures)
        for one, other in near_pairs(np.stack([pictures[code] for code in codes])):
            first, second = sorted((root(codes[one]), root(codes[other])))
            parent[second] = first
    return {code: root(code) for code in parent}


def near_pairs(pictures: np.ndarray) -> Iterable[tuple[int, int]]:
    """Yield pairs of numbers of pictures (N, h, w, 3) that are nearer to each other than ALIKE."""
    flat = pictures.reshape(len(pictures), -1)
    squares = (flat**2).sum(1)
    errors = (squares[:, None] + squares - 2 * flat @ flat.T) / flat.shape[1]
    for one, other in zip(*np.nonzero(errors < ALIKE**2), strict=True):
        if one < other:
            yield int(one), int(other)
