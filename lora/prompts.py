"""Prompts of validation pictures, with options in the text as kohya's sd-scripts have them: `a cat --w 256 --d 5`."""

import difflib
import re
from dataclasses import dataclass, fields

OPTION = re.compile(r"\s--([A-Za-z]+)(?:\s+|$)")
OPTIONS = {  # name in the text -> what it sets
    "n": "negative",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "steps",
    "l": "guidance",
    "f": "num_frames",
}
LARGEST_SEED = 2**63 - 1  # of 64 bits with a sign
WORDS = ", ".join(f"--{name} {meaning}" for name, meaning in OPTIONS.items())


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A validation prompt; None = as for all of them.

    Args:
        text: The prompt.
        negative: What the picture should not show.
        width, height: Pixels.
        seed: Of the noise.
        steps: Denoising steps.
        guidance: Scale.
        num_frames: 1 = a picture.
    """

    text: str
    negative: str = ""
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    num_frames: int | None = None


def parse_prompt(line: str) -> Prompt:
    """Return the prompt with its options.

    Raises:
        ValueError: An option is unknown, or its value is not right; names it with the nearest.
    """
    text, *rest = OPTION.split(f" {line}")
    kinds = {field.name: field.type for field in fields(Prompt)}
    values: dict[str, str | int | float] = {}
    for name, value in zip(rest[::2], rest[1::2], strict=True):
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0)[0]
            raise ValueError(f"validation_prompts: --{name} in {line!r} is no option; nearest: --{near} (of {WORDS}).")
        meaning, value = OPTIONS[name], value.strip()
        kind = str if meaning == "negative" else float if kinds[meaning] == float | None else int
        least = {"negative": "", "seed": 0, "guidance": 0.0}.get(meaning, 1)
        try:
            values[meaning] = number = kind(value)
        except ValueError:
            raise ValueError(
                f"validation_prompts: --{name} {value} in {line!r} must be a number; nearest: --{name} {least}."
            ) from None
        if kind is not str and not number >= least:
            raise ValueError(
                f"validation_prompts: --{name} {value} in {line!r} must be at least {least}; nearest: {least}."
            )
        if meaning == "seed" and number > LARGEST_SEED:
            raise ValueError(
                f"validation_prompts: --{name} {value} in {line!r} must be at most 2**63 - 1; nearest: {LARGEST_SEED}."
            )
    if (frames := values.get("num_frames", 1)) % 4 != 1:
        low = max(0, frames - 1) // 4 * 4 + 1
        raise ValueError(
            f"validation_prompts: --f {frames} in {line!r} is not of the form 4n + 1; nearest: {low} or {low + 4}."
        )
    return Prompt(text=text.strip(), **values)
