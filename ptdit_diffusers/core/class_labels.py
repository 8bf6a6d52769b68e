"""Classes of a class-conditional model by number or name. Plain Python."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any


def class_names(id2label: Mapping[Any, str] | None) -> dict[str, list[int]]:
    """Return every name in lower case -> its classes; a label "tench, Tinca tinca" holds two names and is one, too."""
    names: dict[str, list[int]] = {}
    for number, label in (id2label or {}).items():
        for name in {_plain(label), *map(_plain, label.split(","))}:
            names.setdefault(name, []).append(int(number))
    return names


def class_ids(labels: Any, id2label: Mapping[Any, str] | None, num_classes: int) -> list[int]:
    """Return class numbers.

    Args:
        labels: A number, a name, a sequence of them, or a tensor or array of numbers.
        id2label: Class number -> name, or several names with commas between; None if classes have no names.
        num_classes: Number of classes.

    Raises:
        ValueError: There is no such class; names the nearest.
    """
    if hasattr(labels, "tolist"):  # a tensor or an array
        labels = labels.reshape(-1).tolist()
    elif isinstance(labels, str) or not isinstance(labels, Iterable):
        labels = [labels]
    if len(labels) == 0:
        raise ValueError("class_labels is empty; pass at least one class.")
    names = class_names(id2label)
    return [_class_id(label, names, num_classes) for label in labels]


def _class_id(label: Any, names: Mapping[str, Sequence[int]], num_classes: int) -> int:
    if isinstance(label, str) and _plain(label) in names:
        numbers = names[_plain(label)]
        if len(numbers) > 1:
            raise ValueError(f"{label!r} is a name of the classes {', '.join(map(str, numbers))}; pass the number.")
        return numbers[0]
    if isinstance(label, str) and label.strip().removeprefix("-").isdecimal():
        label = int(label)
    if isinstance(label, str):
        near = difflib.get_close_matches(_plain(label), [name for name in names if "," not in name], n=3, cutoff=0.0)
        hint = f"nearest: {', '.join(near)}" if near else f"this model has no names, pass 0 to {num_classes - 1}"
        raise ValueError(f"there is no class {label!r}; {hint}.")
    if isinstance(label, bool) or not isinstance(label, Integral):
        raise ValueError(f"class label {label!r} must be a number or a name.")
    if not 0 <= label < num_classes:
        nearest = 0 if label < 0 else num_classes - 1
        raise ValueError(f"class label {label} must be 0 to {num_classes - 1}; nearest: {nearest}.")
    return int(label)


def _plain(name: str) -> str:
    return " ".join(name.lower().split())
