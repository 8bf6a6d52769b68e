"""Where the axes of a token grid are cut into windows. Plain Python."""

from typing import NamedTuple

Triple = tuple[int, int, int]


class Segment(NamedTuple):
    """A run of equal windows along one axis: `count` windows of `length` tokens from token `start` on.

    `own` is how many tokens of each window are queries; None: all of them.
    """

    start: int
    count: int
    length: int
    own: int | None = None

    @property
    def stop(self) -> int:
        return self.start + self.count * self.length


def axis_segments(size: int, window: int, shifted: bool) -> list[Segment]:
    """Cut one axis at 0, c, 2c, ..., N; shifted at 0, s, s+c, s+2c, ..., N with s = c // 2.

    The shifted cut gives the same windows as a cyclic roll by -s with the usual region mask, without roll and mask.
    """
    shift = window // 2 if shifted else 0
    head = shift if shift < size else size  # min() would give torch.compile an expression to carry along
    count = (size - head) // window
    tail = size - head - count * window
    runs = [Segment(0, 1, head), Segment(head, count, window), Segment(size - tail, 1, tail)]
    return [run for run in runs if run.count > 0 and run.length > 0]


def segments_of_share(segments: list[Segment], start: int, stop: int) -> list[Segment]:
    """Return the windows with tokens from `start` to `stop`; those that have others, too, are runs of their own."""
    found = []
    for run in segments:
        first = max(0, (start - run.start) // run.length)
        last = min(run.count, -(-(stop - run.start) // run.length))  # window after the last
        inner = [max(first, -(-(start - run.start) // run.length)), min(last, (stop - run.start) // run.length)]
        pieces = [(first, last)] if inner[0] > inner[1] else [(first, inner[0]), tuple(inner), (inner[1], last)]
        for low, high in pieces:
            if low < high:
                begin = run.start + low * run.length
                own = min(stop, begin + run.length) - max(start, begin)
                found.append(Segment(begin, high - low, run.length, own))
    return found


def borders_of(segments: list[Segment]) -> list[int]:
    """Return where the windows of an axis begin, and the end."""
    return [run.start + i * run.length for run in segments for i in range(run.count)] + [segments[-1].stop]
