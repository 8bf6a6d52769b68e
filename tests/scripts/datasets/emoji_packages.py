"""Small packages in the form of the real ones: five emoji, one with a tone of skin, in four sets and a fifth."""

import base64
import dataclasses
import hashlib
import io
import json
import tarfile
from pathlib import Path

from scripts.datasets.emoji.packages import PACKAGES, Package

SIDES = {"noto": 128, "fluent": 32, "fluent-flat": 32, "twemoji": 36, "fluent-high-contrast": 32}
NAMES = {
    "dog": "1F436",
    "sun": "2600-FE0F",
    "pear": "1F350",
    "bus": "1F68C",
    "cook": "1F9D1-200D-1F373",
    "cook-light": "1F9D1-1F3FB-200D-1F373",
}
COLORS = {  # of a circle, and how large it is, as a share of the side
    "dog": ("#a06030", 0.3),
    "sun": ("#f0b020", 0.45),
    "pear": ("#a0d020", 0.25),
    "bus": ("#203040", 0.4),
    "cook": ("#3060c0", 0.2),
    "cook-light": ("#30c060", 0.2),
}


def emojibase() -> dict[str, object]:
    skin = {"label": "cook: light skin tone", "hexcode": NAMES["cook-light"], "tone": 1}
    pair = {"label": "cook: two tones", "hexcode": "1F9D1-1F3FB-1F3FC", "tone": [1, 2]}
    lines = [
        {"label": "regional indicator A", "hexcode": "1F1E6"},
        {"label": "dog face", "hexcode": NAMES["dog"], "tags": ["dog", "pet", "puppy"], "group": 3, "subgroup": 34},
        {"label": "sun", "hexcode": NAMES["sun"], "tags": ["bright", "rays"], "group": 5, "subgroup": 59},
        {"label": "pear", "hexcode": NAMES["pear"], "tags": ["fruit"], "group": 4, "subgroup": 42},
        {"label": "bus", "hexcode": NAMES["bus"], "group": 5, "subgroup": 55},
        {"label": "cook", "hexcode": NAMES["cook"], "group": 1, "subgroup": 25, "skins": [skin, pair]},
    ]
    names = {"1": "people-body", "3": "animals-nature", "4": "food-drink", "5": "travel-places"}
    parts = {"25": "person-role", "34": "animal-mammal", "42": "food-fruit", "55": "transport", "59": "sky-weather"}
    groups = {"groups": names, "subgroups": parts}
    return {"en/data.json": lines, "meta/groups.json": groups}


def icon_set(style: str) -> dict[str, object]:
    side = SIDES[style]
    icons = {
        name: {"body": f'<circle cx="{side / 2}" cy="{side / 2}" r="{side * radius}" fill="{color}"/>'}
        for name, (color, radius) in COLORS.items()
    }
    files: dict[str, object] = {"icons.json": {"icons": icons, "width": side, "height": side}}
    if style != "fluent":
        files["chars.json"] = {code.lower(): name for name, code in NAMES.items()}
    return files


def write_packages(folder: Path) -> dict[str, Package]:
    """Write the .tgz files, and return the packages with their checksums."""
    folder.mkdir(parents=True)
    found = {}
    for name, package in PACKAGES.items():
        path = folder / package.file
        with tarfile.open(path, "w:gz") as tar:
            for member, values in (emojibase() if name == "emojibase" else icon_set(name)).items():
                content = json.dumps(values).encode()
                info = tarfile.TarInfo(f"package/{member}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
        found[name] = dataclasses.replace(package, sha512=digest)
    return found
