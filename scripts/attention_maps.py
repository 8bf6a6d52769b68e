"""Draw attention maps of class-conditional models with global attention, DiT and DiffiT, and measure them.

python -m scripts.attention_maps timesteps --model diffit-128 --model dit-128 --class "red star" --output maps.png
    One row per model, one column per timestep: what one token looks at, mean of all heads. With time-dependent
    attention (DiffiT) the queries and keys themselves depend on the time; in DiT only their modulation does.
    Measured: how much the maps change from one timestep to the next (total variation, 0 to 1).

python -m scripts.attention_maps windows --model dit-128 --class "red star" --output windows.png
    What the 16 tokens of one 4 x 4 window look at: one row per token, one column per key. Where columns are constant,
    one proxy token per window would do, which is the idea of PT-DiT. Measured: standard deviation over the 16 rows,
    divided by their mean, by distance from the window, mean over all windows and heads.

With --json FILE the numbers are kept.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ptdit_diffusers import ClassToImagePipeline
from ptdit_diffusers.core.backbones.diffit import DiffiTAttention
from ptdit_diffusers.core.backbones.layers import MultiHeadAttention
from scripts.evaluation.generate import load_pipeline
from scripts.evaluation.options import add_sampling_options, make_parser
from scripts.evaluation.records import write_record

WINDOW = 4  # tokens per side of the window whose queries are compared
Maps = dict[float, Tensor]  # timestep -> weights (heads, queries, keys) of the first sample


# --- recording -------------------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for an attention processor: computes attention by its definition and keeps the weights."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self) -> None:
        self.weights: Tensor | None = None

    def __call__(self, attn: MultiHeadAttention, hidden_states: Tensor, *inputs: Any) -> Tensor:
        if isinstance(attn, DiffiTAttention):
            if inputs[1].windows is not None:
                raise ValueError("the attention of this model works in windows; maps need a global attention.")
            return attn.attend(self.attention, hidden_states, *inputs)
        return attn.attend(self.attention, hidden_states, None, None, None, None)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with (B, tokens, heads, head_dim) tensors; `mask` is added to the logits."""
        logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        weights = (logits if mask is None else logits + mask).softmax(-1)
        self.weights = weights[0].float()
        return torch.einsum("bhqk,bkhd->bqhd", weights, value)


@contextmanager
def recorded(pipe: ClassToImagePipeline, block: int) -> Iterator[Maps]:
    """Fill the maps of one block while the pipeline samples.

    Raises:
        ValueError: there is no such block; names the nearest.
    """
    blocks, maps = pipe.transformer.blocks, {}
    if not 0 <= block < len(blocks):
        nearest = min(max(block, 0), len(blocks) - 1)
        raise ValueError(f"--block {block} must be 0 to {len(blocks) - 1}; nearest: {nearest}.")
    layer, recorder = blocks[block].attn, Recorder()
    before, layer.processor = layer.processor, recorder

    def keep(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        height, width = (size // module.patch_size for size in inputs[0].shape[2:])
        tokens = height * width  # those of the picture come first, also where time and class are tokens
        maps[float(torch.as_tensor(inputs[1]).reshape(-1)[0])] = recorder.weights[:, :tokens, :tokens]

    hook = pipe.transformer.register_forward_hook(keep)
    try:
        yield maps
    finally:
        hook.remove()
        layer.processor = before


def sample_maps(pipe: ClassToImagePipeline, label: str, arguments: argparse.Namespace) -> tuple[Maps, Image.Image]:
    """Return the maps of all steps of one sample, and its picture; of a guided step those of the class."""
    block = len(pipe.transformer.blocks) // 2 if arguments.block is None else arguments.block
    with recorded(pipe, block) as maps:
        picture = pipe(
            label,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance,
            generator=torch.Generator().manual_seed(arguments.seed),
        ).images[0]
    return maps, picture


def nearest(maps: Maps, timesteps: Sequence[float]) -> Maps:
    """Return the maps at the sampled timesteps that are nearest to the ones asked for, each once."""
    chosen = [min(maps, key=lambda sampled, asked=asked: abs(sampled - asked)) for asked in timesteps]
    return {timestep: maps[timestep] for timestep in dict.fromkeys(chosen)}


# --- measures --------------------------------------------------------------------------------------------------------


def changes(maps: Maps) -> list[float]:
    """Return the total variation between the maps of successive timesteps, 0 to 1, mean of queries and heads."""
    weights = list(maps.values())
    pairs = zip(weights, weights[1:], strict=False)
    return [0.5 * (later - earlier).abs().sum(-1).mean().item() for earlier, later in pairs]


def window_tokens(row: int, column: int, side: int, window: int = WINDOW) -> Tensor:
    """Return the indices (window^2,) of the tokens of a window whose first token is at this place."""
    rows, columns = (torch.arange(start, start + window) for start in (row, column))
    return (rows[:, None] * side + columns).flatten()


def distances(row: int, column: int, side: int, window: int = WINDOW) -> Tensor:
    """Return how many tokens each key (side^2,) is away from a window, in the larger direction; 0 is inside."""
    place = torch.arange(side)
    down, right = (torch.maximum(start - place, place - (start + window - 1)).clamp(min=0) for start in (row, column))
    return torch.maximum(down[:, None], right[None]).flatten()


def spread_by_distance(weights: Tensor, window: int = WINDOW) -> list[float]:
    """Return the relative standard deviation over the queries of a window, for keys at distance 0, 1, 2, ...

    Args:
        weights: (heads, N, N) of a square grid.
        window: tokens per side; windows are at multiples of it.

    Raises:
        ValueError: the grid has no window of this size.
    """
    side = round(weights.shape[-1] ** 0.5)
    if side < window:
        raise ValueError(f"a grid of {side} x {side} tokens has no window of {window} x {window}.")
    sums, counts = torch.zeros(side), torch.zeros(side)
    for row in range(0, side - window + 1, window):
        for column in range(0, side - window + 1, window):
            rows = weights[:, window_tokens(row, column, side, window)]  # (heads, window^2, N)
            relative = (rows.std(dim=1) / rows.mean(dim=1).clamp(min=1e-12)).mean(dim=0)
            away = distances(row, column, side, window)
            sums.index_add_(0, away, relative)
            counts.index_add_(0, away, torch.ones(side * side))
    return [float(total / number) for total, number in zip(sums, counts, strict=True) if number]


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_timesteps(rows: dict[str, tuple[Maps, Image.Image]], query: tuple[int, int] | None, path: Path) -> None:
    """Draw what one token looks at, and the picture with that token marked."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = 1 + max(len(maps) for maps, _ in rows.values())
    figure = Figure(figsize=(1.6 * columns, 1.9 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, (maps, picture)) in zip(axes, rows.items(), strict=True):
        side = round(next(iter(maps.values())).shape[-1] ** 0.5)
        row, column = (side // 2, side // 2) if query is None else query
        if not (0 <= row < side and 0 <= column < side):
            raise ValueError(f"--query {row} {column} must be 0 to {side - 1} each, the tokens per side of {name}.")
        for axis in line:
            axis.set_axis_off()
        line[0].imshow(picture, extent=(0, side, side, 0))
        line[0].add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor="red", linewidth=1.5))
        line[0].set_title(name, fontsize=8)
        for axis, (timestep, weights) in zip(line[1:], maps.items(), strict=False):
            axis.imshow(weights[:, row * side + column].mean(0).view(side, side), cmap="magma")
            axis.set_title(f"t = {timestep:.0f}", fontsize=8)
    save(figure, path)


def draw_windows(rows: dict[str, tuple[Tensor, list[float]]], path: Path) -> None:
    """Draw the rows of a window in the middle, all keys wide, and the spread over the rows by distance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False, width_ratios=(4, 1))
    for (image, curve), (name, (weights, spread)) in zip(axes, rows.items(), strict=True):
        side = round(weights.shape[-1] ** 0.5)
        start = (side // 2) // WINDOW * WINDOW
        start = min(start, side - WINDOW)
        shown = weights.mean(0)[window_tokens(start, start, side)]
        image.imshow(shown, aspect="auto", cmap="magma", interpolation="nearest")
        image.set(title=f"{name}: {WINDOW**2} queries of one window", xlabel="key, in raster order", ylabel="query")
        curve.plot(range(len(spread)), spread, marker="o")
        curve.set(xlabel="tokens from the window", ylabel="std / mean", ylim=(0, 1.1 * max(spread)))
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")


# --- command ---------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = make_parser("scripts.attention_maps", __doc__)
    add = parser.add_argument
    add("figure", choices=("timesteps", "windows"), help="which figure")
    add("--model", action="append", required=True, help="folder or short name of a model; may be repeated")
    add("--class", dest="label", required=True, help="name or number of the class")
    add("--timesteps", type=float, nargs="+", default=[900, 700, 500, 300, 100], help="default: 900 700 500 300 100")
    add("--block", type=int, help="block whose attention is recorded (default: the middle one)")
    add("--query", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="token that looks (default: the middle)")
    add_sampling_options(parser, steps=25, guidance=1.5, seed=0)
    add("--output", type=Path, required=True, help="picture to write")
    add("--json", type=Path, help="file for the numbers")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = parse(arguments)
    figures: dict[str, Any] = {}
    numbers: dict[str, Any] = {}
    try:
        for name in options.model:
            pipe = load_pipeline(name)
            if not isinstance(pipe, ClassToImagePipeline):
                raise ValueError(f"--model {name} is no class-conditional transformer.")
            maps, picture = sample_maps(pipe, options.label, options)
            chosen, title = nearest(maps, options.timesteps), Path(name).name
            if options.figure == "timesteps":
                figures[title] = chosen, picture
                numbers[title] = {"timesteps": list(chosen), "changes": changes(chosen)}
            else:
                spreads = [spread_by_distance(weights) for weights in chosen.values()]
                mean = torch.tensor(spreads).mean(dim=0).tolist()
                figures[title] = list(chosen.values())[len(chosen) // 2], mean
                numbers[title] = {"timesteps": list(chosen), "spread_by_distance": mean}
        if options.figure == "timesteps":
            draw_timesteps(figures, options.query, options.output)
        else:
            draw_windows(figures, options.output)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if options.json is not None:
        write_record(options.json, numbers)
    for name, measured in numbers.items():
        values = measured.get("changes", measured.get("spread_by_distance"))
        sys.stdout.write(f"{name}: {', '.join(f'{value:.3f}' for value in values)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
