"""Distill an embedded model, with captions of its synthetic data set.

    python -m scripts.distill --config shapes-4steps --prompts pictures --output-dir runs/shapes-128-4steps
    python -m scripts.distill --config shapes-4steps --prompts FILE --output-dir runs/shapes-128-4steps

The options are those of `python -m lora.distill`, but `--prompts` may also be the name of a data set, whose captions
are written anew. Captions with combinations that are held out from the training of the model are counted and refused.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from lora.distill import main as distill
from lora.distill import prompts_in_file
from lora.distill_config import DistillSettings
from ptdit_diffusers.training.randomness import Stream, numpy_generator
from scripts.datasets.registry import DATA_SETS
from scripts.datasets.shapes.motion import HELD_OUT_MOTIONS
from scripts.datasets.shapes.scenes import HELD_OUT, INVERSE
from scripts.datasets.solids import HELD_OUT_SOLIDS
from scripts.verifiers.clips.prompt import read_clip_prompt
from scripts.verifiers.pictures.prompt import read_prompt
from scripts.verifiers.views.prompt import read_views_prompt

SHOWN = 3  # captions in a message


def scene_combinations(caption: str) -> Iterator[bool]:
    """Yield whether each figure with a relation that a caption names is held out."""
    request = read_prompt(caption)
    for subject, relation, other in request.relations:
        for index, name in ((subject, relation), (other, INVERSE[relation])):
            group = request.groups[index]
            yield (group.color, group.shape, name) in HELD_OUT


def motion_combinations(caption: str) -> Iterator[bool]:
    """Yield whether each figure with a motion that a caption names is held out; of "cross" it names no directions."""
    for each in read_clip_prompt(caption).figures:
        yield (each.figure.color, each.figure.shape, each.motion) in HELD_OUT_MOTIONS


def solid_combinations(caption: str) -> Iterator[bool]:
    """Yield whether each solid that a caption names is held out."""
    for part in read_views_prompt(caption).parts:
        yield (part.color, part.solid, part.mark) in HELD_OUT_SOLIDS


COMBINATIONS: dict[str, tuple[Callable[[str], Iterator[bool]], ...]] = {  # embedded model -> what it never saw
    "shapes-128": (scene_combinations,),
    "clips-128": (scene_combinations, motion_combinations),
    "views-96": (solid_combinations,),
}


def is_held_out(base: str, caption: str) -> bool:
    """Return whether a caption names a combination that is held out from the training of an embedded model."""
    for combinations in COMBINATIONS.get(Path(base).name, ()):
        try:
            if any(combinations(caption)):
                return True
        except ValueError:  # a caption of something else
            continue
    return False


def new_captions(data_set: str, count: int, seed: int) -> list[str]:
    """Return captions of samples of a data set; caption i is a function of (seed, i)."""
    found = []
    for index in range(count):
        choice = numpy_generator(seed, Stream.FEW_STEPS, index)
        sample = DATA_SETS[data_set].sample_for_training(choice)
        found.append(DATA_SETS[data_set].caption_for_training(sample, choice))
    return found


def prompts_of(settings: DistillSettings) -> list[str]:
    """Return the captions of a run.

    Raises:
        ValueError: `prompts` is neither a data set nor a file, or captions hold combinations that training never saw.
    """
    if settings.prompts in DATA_SETS:
        prompts = new_captions(settings.prompts, settings.paths, settings.seed)
    else:
        prompts = prompts_in_file(settings, checked=True)
    refused = [prompt for prompt in prompts if is_held_out(settings.base, prompt)]
    if refused:
        shown = "; ".join(map(repr, refused[:SHOWN]))
        raise ValueError(
            f"prompts {settings.prompts!r}: {len(refused)} of {len(prompts)} captions hold combinations that are held "
            f"out from the training of {settings.base}, first {shown}. Remove them."
        )
    return prompts


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return distill(arguments, prompts_of)


if __name__ == "__main__":
    sys.exit(main())
