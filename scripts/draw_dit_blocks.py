"""Draw the four kinds of DiT's blocks, with the shapes that the code computes for DiT-XL/2 at 256 pixels.

python -m scripts.draw_dit_blocks --output docs/dit/blocks.svg
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptdit_diffusers import DiT2DModel
from ptdit_diffusers.core.backbones.dit_parameters import BLOCK_TYPES

MODULATED = ("norm", "scale and shift")
BRANCHES = {  # block -> its branches, each added to the tokens; capitals are layers of the block, by their names
    "adaln_zero": ((*MODULATED, "ATTN", "gate"), (*MODULATED, "MLP", "gate")),
    "adaln": ((*MODULATED, "ATTN"), (*MODULATED, "MLP")),
    "cross_attention": (("norm", "ATTN"), ("norm", "CROSS_ATTN"), ("norm", "MLP")),
    "in_context": (("norm", "ATTN"), ("norm", "MLP")),
}
TITLES = {"ATTN": "self-attention", "CROSS_ATTN": "cross-attention", "MLP": "feed-forward"}
COLORS = {"ATTN": "#cfe3f7", "CROSS_ATTN": "#cfe3f7", "MLP": "#d8efd3"}
CONDITIONED = ("scale and shift", "gate")  # by rows of the condition


def shapes_of(block_type: str) -> tuple[dict[str, list[tuple[int, ...]]], int]:
    """Run one block without data. Returns layer -> shapes of its inputs and its output, and the model's parameters."""
    with torch.device("meta"):
        model = DiT2DModel.from_preset("DiT-XL/2", num_layers=1, block_type=block_type)
        latents, time, label = torch.empty(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        seen: dict[str, list[tuple[int, ...]]] = {}

        def record(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
                seen[name] = [tuple(value.shape[1:]) for value in (*inputs, output) if isinstance(value, torch.Tensor)]

            return hook

        for name, module in model.blocks[0].named_children():
            module.register_forward_hook(record(name.upper()))
        with torch.no_grad():
            model(latents, time, label)
        whole = DiT2DModel.from_preset("DiT-XL/2", block_type=block_type)
    return seen, sum(parameter.numel() for parameter in whole.parameters())


def words(shape: tuple[int, ...]) -> str:
    """Return a shape as text."""
    return " x ".join(map(str, shape))


class Column:
    """One block, drawn from top to bottom around `x`."""

    WIDTH, HEIGHT, STEP = 1.8, 0.52, 0.78

    def __init__(self, axes: Any, x: float, block_type: str) -> None:
        self.axes, self.x, self.y = axes, x, 0.0
        self.block_type = block_type
        self.shapes, self.parameters = shapes_of(block_type)

    def text(self, x: float, y: float, text: str, **options: Any) -> None:
        """Write a text around a point."""
        self.axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": 8, **options})

    def line(self, *points: tuple[float, float], arrow: bool = False, **options: Any) -> None:
        """Draw a line through points, with a head at its end where `arrow`."""
        options = {"color": "#555555", "linewidth": 1, **options}
        for start, end in zip(points[:-1], points[1:], strict=True):
            style = "-|>" if arrow and end == points[-1] else "-"
            self.axes.annotate("", end, start, arrowprops={"arrowstyle": style, "shrinkA": 0, "shrinkB": 0, **options})

    def box(self, text: str, color: str) -> None:
        """Draw a box below the last one, with an arrow from there."""
        self.line((self.x, self.y), (self.x, self.y - self.STEP + self.HEIGHT), arrow=True)
        self.y -= self.STEP
        corner = (self.x - self.WIDTH / 2, self.y)
        self.axes.add_patch(_box(corner, self.WIDTH, self.HEIGHT, color))
        self.text(self.x, self.y + self.HEIGHT / 2, text)

    def draw(self) -> None:
        """Draw title, branches, and what the condition is."""
        attention = self.shapes["ATTN"]
        self.text(self.x, 1.15, self.block_type, fontsize=12, weight="bold")
        self.text(self.x, 0.82, f"{self.parameters:,} parameters")
        self.text(self.x, 0.2, f"tokens {words(attention[0])}")
        for branch in BRANCHES[self.block_type]:
            self.branch(branch)
        self.line((self.x, self.y), (self.x, self.y - 0.35), arrow=True)
        self.text(self.x, self.y - 0.5, f"tokens {words(attention[-1])}")

    def branch(self, names: Sequence[str]) -> None:
        """Draw one branch and the line around it."""
        top = self.y - 0.13
        for name in names:
            self.box(self.label(name), COLORS.get(name, "#f0f0f0" if name == "norm" else "#fae3b8"))
            if name in CONDITIONED or name == "CROSS_ATTN":
                self.condition(name)
        self.line((self.x, self.y), (self.x, self.y - 0.3), arrow=True)
        self.y -= 0.4
        self.axes.add_patch(_circle((self.x, self.y)))
        self.text(self.x, self.y - 0.01, "+", fontsize=10)
        left = self.x - self.WIDTH / 2 - 0.2
        self.line((self.x, top), (left, top), (left, self.y), (self.x - 0.1, self.y), arrow=True)
        self.y -= 0.1

    def label(self, name: str) -> str:
        """Return the text of a box."""
        if name not in TITLES:
            return name
        shapes = self.shapes[name]
        if name == "CROSS_ATTN":
            return f"{TITLES[name]}\n{words(shapes[0])} to {words(shapes[1])}"
        if name == "ATTN" and self.block_type == "in_context":
            return f"{TITLES[name]}, with\ntime and class as tokens"
        return f"{TITLES[name]}\n{words(shapes[0])}"

    def condition(self, name: str) -> None:
        """Draw where the condition enters."""
        right, middle = self.x + self.WIDTH / 2, self.y + self.HEIGHT / 2
        self.line((right + 0.3, middle), (right, middle), arrow=True, color="#b3741a")
        if name == "CROSS_ATTN":
            text = "time,\nclass"
        else:
            (condition, rows) = self.shapes["ADALN_MODULATION"]
            text = f"{'2' if name == 'scale and shift' else '1'} of\n{rows[0] // condition[0]} rows"
        self.text(right + 0.34, middle, text, ha="left", fontsize=7, color="#b3741a")


def _box(corner: tuple[float, float], width: float, height: float, color: str) -> Any:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.06"
    return FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=color, edgecolor="#555555")


def _circle(center: tuple[float, float]) -> Any:
    from matplotlib.patches import Circle

    return Circle(center, 0.1, facecolor="white", edgecolor="#555555")


def draw(path: Path) -> None:
    """Write the drawing; the ending of the path is its format."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.6))
    axes = figure.add_axes((0, 0, 1, 1))
    columns = [Column(axes, 2.9 * number, block_type) for number, block_type in enumerate(BLOCK_TYPES)]
    for column in columns:
        column.draw()
    modulation = shapes_of("adaln_zero")[0]["ADALN_MODULATION"]
    note = f"condition: time + class, {words(modulation[0])} numbers; SiLU and a linear layer make the rows of a block"
    lowest = min(column.y for column in columns) - 1.0
    columns[0].text(4.3, lowest, note, fontsize=9, color="#b3741a")
    axes.set_xlim(-1.3, 10.4)
    axes.set_ylim(lowest - 0.3, 1.5)
    axes.set_aspect("equal")
    axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ptdit"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, facecolor="white")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.draw_dit_blocks", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/dit/blocks.svg"), help="default: %(default)s")
    draw(parser.parse_args(arguments).output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
