"""What a file of weights says of itself when they were distilled for few steps. Needs no torch."""

from pathlib import Path
from typing import Any

from .documents import header_metadata, parse_json
from .embedded import WEIGHTS

DISTILLED = "distilled"  # entry of a file's metadata: JSON of how the student is used
LORA_FILE = "pytorch_lora_weights.safetensors"


def read_distillation(path: Path) -> dict[str, Any] | None:
    """Return how a student in a safetensors file is used, None where the file holds none.

    Returns:
        At least `steps`, forwards from noise to latents.

    Raises:
        ValueError: The file is damaged, or its entry is not what `lora.distill` writes.
    """
    text = header_metadata(path).get(DISTILLED)
    if text is None:
        return None
    facts = parse_json(text)
    if not isinstance(facts, dict) or type(facts.get("steps")) is not int or facts["steps"] < 1:
        raise ValueError(f"{path}: the entry {DISTILLED!r} of its metadata does not say the steps of a student.")
    return facts


def embedded_student(model: str) -> Path | None:
    """Return the LoRA file of few steps that the package has for an embedded model, None where there is none."""
    found = (folder / LORA_FILE for folder in student_folders() if folder.name.rpartition("-")[0] == model)
    return next(found, None)


def student_folders() -> list[Path]:
    """Return the folders of the LoRAs of few steps that the package has, sorted."""
    return sorted(path.parent for path in WEIGHTS.glob(f"*-*steps/{LORA_FILE}"))


def resolve_student(source: Any) -> Any:
    """Return the folder of the short name of a LoRA of few steps that the package has; other sources unchanged.

    A local file or folder goes first, so a short name never hides one.
    """
    if not isinstance(source, str) or Path(source).exists():
        return source
    return next((str(folder) for folder in student_folders() if folder.name == source), source)


def embedded_students() -> list[str]:
    """Return the short names of the embedded models that have one, sorted."""
    return sorted({folder.name.rpartition("-")[0] for folder in student_folders()})
