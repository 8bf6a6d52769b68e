"""Follow the figures of a clip from frame to frame and find out what each of them does.

From pixels only. Positions and radii are fractions of the picture side, angles are degrees, x right, y down.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from scripts.verifiers.pictures.figures import Figure, read_picture

LOST = 6  # frames after which a figure that shows again is another; in between its color may be the background's
TWICE = 2  # frames for which a figure that changes its color may look like two parts
JUMP = 0.16  # a figure does not move further than this from one frame to the next
TRAVEL = 0.2  # less than this is no way
GROWTH = 1.35  # ratio of radii; less is no growth
TURN = 50.0  # degrees; less is no rotation
HOP = 0.13  # a bounce rises at least so high
SPOKES = 120  # directions in which an outline is measured


@dataclass
class Track:
    """One figure through a clip; what it is and does is asked once the track is complete.

    Attributes:
        frames: numbers of the frames that show it.
        figures: the figure in each of them.
        outlines: its `outline_signature` in each of them.
    """

    frames: list[int]
    figures: list[Figure]
    outlines: list[np.ndarray]

    @cached_property
    def color(self) -> str:
        """Color word in its first frames."""
        return Counter(figure.color for figure in self.figures[: 1 + len(self.figures) // 4]).most_common(1)[0][0]

    @cached_property
    def new_color(self) -> str:
        """Color word in its last frames."""
        return Counter(figure.color for figure in self.figures[-1 - len(self.figures) // 4 :]).most_common(1)[0][0]

    @cached_property
    def shape(self) -> str:
        """The shape that it fits best over all frames; a figure that rotates looks like itself only at times."""
        scores = Counter()
        for figure in self.figures:
            scores[figure.shape] += figure.score**4
        return scores.most_common(1)[0][0]

    @cached_property
    def motion(self) -> str:
        """One of left, right, up, down, rotates, grows, shrinks, bounces, changes, stays."""
        if self.color != self.new_color:
            return "changes"
        x, y = (np.array([getattr(figure, axis) for figure in self.figures]) for axis in "xy")
        ends = max(1, len(x) // 6)
        across, down = (float(values[-ends:].mean() - values[:ends].mean()) for values in (x, y))
        if _hops(y) >= 1:
            return "bounces"
        if max(abs(across), abs(down)) > TRAVEL:
            if abs(across) > abs(down):
                return "right" if across > 0 else "left"
            return "down" if down > 0 else "up"
        radii = np.sqrt([figure.area for figure in self.figures])
        growth = radii[-ends:].mean() / radii[:ends].mean()
        if max(growth, 1 / growth) > GROWTH:
            return "grows" if growth > 1 else "shrinks"
        return "rotates" if abs(self.turn()) > TURN else "stays"

    def turn(self) -> float:
        """Return the degrees by which the figure turned, added up over the frames."""
        return sum(map(rotation_between, self.outlines, self.outlines[1:]))


def _hops(y: np.ndarray) -> int:
    """Return how often a figure rises by HOP and falls again."""
    hops, low, high = 0, y[0], y[0]
    rising = True
    for value in y:
        if rising:
            low = max(low, value)  # y points down: the floor is the largest value
            if value < low - HOP:
                rising, high = False, value
        else:
            high = min(high, value)
            if value > high + HOP:
                rising, low, hops = True, value, hops + 1
    return hops


def outline_signature(mask: np.ndarray) -> np.ndarray:
    """Return the second moment of a silhouette (H, W) in SPOKES directions around its center, less its mean."""
    rows, columns = np.nonzero(mask)
    down, across = rows - rows.mean(), columns - columns.mean()
    direction = np.arctan2(down, across) / (2 * np.pi) * SPOKES
    low = np.floor(direction).astype(int)
    share = direction - low
    weight = down**2 + across**2
    sums = np.bincount(low % SPOKES, weight * (1 - share), SPOKES)
    sums += np.bincount((low + 1) % SPOKES, weight * share, SPOKES)
    smooth = sum(np.roll(sums, step) * (3 - abs(step)) for step in range(-2, 3))
    return smooth / max(smooth.mean(), 1e-9) - 1


def rotation_between(first: np.ndarray, second: np.ndarray, most: float = 24.0) -> float:
    """Return the degrees, at most `most`, by which the second signature is the first turned; 0 if it is round."""
    reach = round(most / 360 * SPOKES)
    if min(first.std(), second.std()) < 0.12:
        return 0.0
    steps = np.arange(-reach - 1, reach + 2)
    likeness = np.array([(np.roll(first, step) * second).mean() for step in steps])
    best = 1 + int(likeness[1:-1].argmax())
    before, here, after = likeness[best - 1 : best + 2]
    bend = before - 2 * here + after
    fine = 0.5 * (before - after) / bend if bend < 0 else 0.0
    return float((steps[best] + np.clip(fine, -0.5, 0.5)) / SPOKES * 360)


def follow(frames: np.ndarray) -> list[Track]:
    """Return the figures of a clip of bytes (F, H, W, 3), those in most frames first.

    Figures are joined frame by frame, nearest first; a figure may be lost for LOST - 1 frames. What shows in less than
    a third of the frames is left out.
    """
    readings = [read_picture(frame) for frame in frames]
    tracks: list[Track] = []
    for number, reading in enumerate(readings):
        outlines = [outline_signature(mask) for mask in reading.silhouettes]
        open_tracks = [track for track in tracks if number - track.frames[-1] <= LOST]
        pairs = sorted(
            (_step(track, figure), t, f)
            for t, track in enumerate(open_tracks)
            for f, figure in enumerate(reading.figures)
        )
        taken_tracks, taken_figures = set(), set()
        for far, t, f in pairs:
            if far > JUMP or t in taken_tracks or f in taken_figures:
                continue
            taken_tracks.add(t)
            taken_figures.add(f)
            open_tracks[t].frames.append(number)
            open_tracks[t].figures.append(reading.figures[f])
            open_tracks[t].outlines.append(outlines[f])
        new = set(range(len(outlines))) - taken_figures
        tracks += [Track([number], [reading.figures[f]], [outlines[f]]) for f in sorted(new)]
    tracks = [track for track in _joined(tracks) if 3 * len(track.frames) >= len(readings)]
    return sorted(tracks, key=lambda track: -len(track.frames))


def _joined(tracks: list[Track]) -> list[Track]:
    """Join tracks of which the second begins where and when the first ends: a color on its way to another."""
    joined: list[Track] = []
    for track in sorted(tracks, key=lambda track: track.frames[0]):
        for first in joined:
            both = first.frames[-1] - track.frames[0] + 1
            if not 0 < both <= TWICE or both >= min(len(first.frames), len(track.frames)):
                continue
            before, after = first.figures[-1 - both], track.figures[both]  # the last and the first that is whole
            if np.hypot(before.x - after.x, before.y - after.y) < JUMP / 2:
                first.frames[-both:], first.figures[-both:] = track.frames[both:], track.figures[both:]
                first.outlines[-both:] = track.outlines[both:]
                break
        else:
            joined.append(track)
    return joined


def _step(track: Track, figure: Figure) -> float:
    """Return how far a figure is from the end of a track, a little more when its color is another."""
    last = track.figures[-1]
    return float(np.hypot(last.x - figure.x, last.y - figure.y)) + 0.04 * (last.color != figure.color)


def flicker(frames: np.ndarray, tracks: list[Track]) -> float:
    """Return the mean change of a byte from frame to frame where nothing moves: outside all figures' boxes."""
    height, width = frames.shape[1:3]
    still = np.ones((height, width), dtype=bool)
    for figure in (figure for track in tracks for figure in track.figures):
        reach = 1.6 * figure.radius + 0.05
        rows = slice(max(0, int((figure.y - reach) * height)), int((figure.y + reach) * height) + 1)
        columns = slice(max(0, int((figure.x - reach) * width)), int((figure.x + reach) * width) + 1)
        still[rows, columns] = False
    if not still.any():
        return 0.0
    change = np.abs(np.diff(frames.astype(np.int16), axis=0))
    return float(change[:, still].mean())
