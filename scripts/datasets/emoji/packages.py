"""The npm packages that hold the data, by name, version and checksum; and reading them without unpacking."""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Package:
    """A package of the npm registry.

    Attributes:
        name, version: In the registry.
        sha512: Of the .tgz, base64 as npm writes it.
        licence: Of its content, by SPDX name.
        credit: Whom to name.
    """

    name: str
    version: str
    sha512: str
    licence: str
    credit: str

    @property
    def file(self) -> str:
        """Name of its .tgz, as `npm pack` writes it."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def path(self) -> str:
        """Its path below the address of a registry."""
        return f"{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"


PACKAGES = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "Noto Emoji, Google Inc.",
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        "MIT",
        "Fluent Emoji, Microsoft Corporation",
    ),
    "fluent-flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "Fluent Emoji Flat, Microsoft Corporation",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        "Twemoji, Twitter, Inc and other contributors",
    ),
    "fluent-high-contrast": Package(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
        "MIT",
        "Fluent Emoji High Contrast, Microsoft Corporation",
    ),
    "emojibase": Package(
        "emojibase-data",
        "17.0.0",
        "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
        "MIT and Unicode-3.0",
        "Emojibase, Miles Johnson; labels and tags from Unicode CLDR, Unicode, Inc.",
    ),
}


def check(package: Package, path: Path, source: str = "") -> None:
    """Raise ValueError unless a file is the package that is meant.

    Args:
        package: What is meant.
        path: Of the file.
        source: Where a file has just come from that is not kept if it is wrong; "" = the file stays where it is.

    Raises:
        ValueError: It has another checksum.
        OSError: It cannot be read.
    """
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != package.sha512:
        action = "it was not kept; give another registry with --registry" if source else "remove it and fetch it again"
        raise ValueError(
            f"{source or path} is not {package.name} {package.version}: its sha512 is {found[:12]}..., expected "
            f"{package.sha512[:12]}...; {action}."
        )


def fetch(package: Package, folder: Path, registry: str = "") -> bool:
    """Bring a package into a folder; return False where it is there already.

    Args:
        package: What to bring.
        folder: Gets the .tgz.
        registry: Address of a registry to download from; "" lets `npm pack` choose it.

    Raises:
        ValueError: What came, or what is there, has another checksum.
        OSError: It cannot be downloaded, or npm is not installed.
    """
    path = folder / package.file
    if path.exists():
        check(package, path)
        return False
    part = folder / f"{package.file}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        made = part / package.file
        if registry:
            source = f"{registry.rstrip('/')}/{package.path}"
            _download(source, made)
        else:
            source = "what npm pack brought"
            _npm_pack(package, part)
        check(package, made, source)
        made.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def _download(address: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(address, timeout=60) as answer, open(path, "wb") as file:
            shutil.copyfileobj(answer, file)
    except (urllib.error.URLError, ValueError) as error:
        raise OSError(f"{address} cannot be downloaded: {error}.") from error


def _npm_pack(package: Package, folder: Path) -> None:
    program = shutil.which("npm")
    if program is None:
        raise OSError("npm is not installed; install Node.js, or give the address of a registry with --registry.")
    command = [program, "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--silent"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode or not (folder / package.file).is_file():
        reason = (done.stderr.strip() or "it wrote no file").splitlines()[-1]
        raise OSError(f"npm pack {package.name}@{package.version} failed: {reason}.")


def read_json(folder: Path, name: str, member: str) -> Any:
    """Return a JSON file of a package.

    Args:
        folder: Of the packages.
        name: Key of PACKAGES.
        member: For example "icons.json".

    Raises:
        ValueError: The package is not there, or it is not the one that is meant.
    """
    path = folder / PACKAGES[name].file
    if not path.is_file():
        raise ValueError(f"{path} is missing; fetch it with: python -m scripts.emoji fetch {folder.parent}")
    _check_once(name, path)
    with tarfile.open(path) as tar:
        return json.load(tar.extractfile(f"package/{member}"))


@cache
def _check_once(name: str, path: Path) -> None:
    check(PACKAGES[name], path)
