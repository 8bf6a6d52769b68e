"""Records of results: JSON files, and the facts that stand in them (time, versions, processor)."""

import json
import platform
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ptdit_diffusers.core.files import replace_json

BENCHMARKS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


def now() -> str:
    """Return date and time, UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of the packages."""
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def processor() -> str:
    """Return the processor's name, from /proc/cpuinfo where there is one."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_record(path: Path, content: Any) -> None:
    """Write JSON by renaming a finished file; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_json(path, content)


def read_record(path: Path, default: Any) -> Any:
    """Return the content of a JSON file, or the default where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default
