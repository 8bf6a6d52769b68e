"""The loss on samples that training never sees, and what it says: whether the model learns by heart."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from ptdit_diffusers.training.record import read_log

logger = logging.getLogger(__name__)

MEASURED = 32  # times at which the loss is measured; few samples are measured several times
TOGETHER = 8  # of them at once
RISE = 1.02  # of the held-out loss above its least, while the loss on trained samples falls: learning by heart


def spread(numbers: Sequence[int], count: int = MEASURED) -> list[int]:
    """Return `count` of the numbers, evenly spread; each several times where there are fewer."""
    total = len(numbers)
    return [int(numbers[i * total // count if total > count else i % total]) for i in range(count)]


def warn_of_learning_by_heart(log: Path, losses: Mapping[str, float], step: int, first: int, advice: str) -> None:
    """Say when the loss on new samples rises while that on trained ones falls.

    Args:
        log: The run's log.jsonl; lines of earlier measurements have the same names.
        losses: `held_out_loss` and `seen_loss` of now; may be empty.
        step: Of now.
        first: Only lines after this step count.
        advice: What may be done about it.
    """
    earlier = [line for line in read_log(log) if "held_out_loss" in line and first < line["step"] < step]
    best = min(earlier, key=lambda line: line["held_out_loss"], default=None)
    if (
        losses
        and best
        and losses["held_out_loss"] > RISE * best["held_out_loss"]
        and losses["seen_loss"] < best["seen_loss"]
    ):
        logger.warning(
            "the model learns by heart since step %d: the loss on new pictures was %.4f there and is %.4f, on "
            "trained ones %.4f and %.4f; %s",
            best["step"],
            best["held_out_loss"],
            losses["held_out_loss"],
            best["seen_loss"],
            losses["seen_loss"],
            advice,
        )
