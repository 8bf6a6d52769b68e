"""What a call costs: multiply-accumulates (MACs) and bytes, by formulas of sizes; the algebra is in `docs/cost.md`.

Buffers inside kernels are not in the formulas.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .backbones.parameters import PTDiTParameters, VAEParameters
from .backbones.proxies import ProxyPlan
from .backbones.vae_tiling import VAETiling
from .backbones.windows import Triple, keep_windows

TEXT_TOKENS = 32  # of a prompt, about
COPIES = 3  # of the finished result in fp32, while it is turned into pictures


# --- one forward of the network --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """One forward: token grid, windows, width and depth, text, batch."""

    grid: Triple
    window: Triple
    ratio: Triple
    dim: int = 1152
    layers: int = 28
    text: int = 24
    batch: int = 1
    caption: int = 4096
    patch_in: int = 16  # in channels * patch area
    patch_out: int = 32

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def proxies(self) -> int:
        return ProxyPlan(self.grid, self.window, self.ratio).number()

    @property
    def window_pairs(self) -> int:
        """Pairs of tokens that meet in windows and in shifted windows: sums of squares, a product over the axes."""
        pairs = 0
        for shifted in (False, True):
            product = 1
            for size, length in zip(self.grid, self.window, strict=True):
                head = min(length // 2, size) if shifted else 0
                product *= head**2 + (size - head) // length * length**2 + ((size - head) % length) ** 2
            pairs += product
        return pairs


def linear_macs(size: Size) -> int:
    """Return those of linear layers: 22 D^2 a token, 6 D^2 a proxy, 2 D^2 a text token in each block; both ends."""
    square = size.dim**2
    block = 22 * square * size.tokens + 6 * square * size.proxies + 2 * square * size.text
    conditions = 256 * size.dim + square + 6 * square
    ends = size.tokens * size.dim * (size.patch_in + size.patch_out)
    text = size.text * (size.caption * size.dim + square)
    return size.batch * (size.layers * block + conditions + ends + text)


def attention_macs(size: Size) -> int:
    """Return those of scores and weighted sums: 2 D for each pair of tokens that meet."""
    tokens, proxies = size.tokens, size.proxies
    pairs = proxies**2 + tokens * proxies + size.window_pairs + tokens * size.text
    return size.batch * size.layers * 2 * size.dim * pairs


def total_macs(size: Size) -> int:
    """Return those of one forward."""
    return linear_macs(size) + attention_macs(size)


def plain_macs(tokens: int, dim: int, layers: int, batch: int, window: int | None = None) -> int:
    """Return those of a forward of DiT: 12 D^2 a token, and all pairs of tokens meet, or those of a square window."""
    together = tokens if window is None else min(tokens, window**2)
    return batch * layers * (12 * dim**2 * tokens + 2 * dim * tokens * together)


def forward_bytes(tokens: int, dim: int, number_bytes: int) -> int:
    """Return the peak of a forward above the weights: 11 tensors of all tokens, in shifted windows of a long video.

    Args:
        tokens: Batch times latent frames times rows times columns.
        dim: Width.
        number_bytes: Bytes of a number.
    """
    return 11 * tokens * dim * number_bytes


# --- decoding --------------------------------------------------------------------------------------------------------


def decoder_macs(widths: Sequence[int], blocks: int, frames: int, height: int, width: int) -> int:
    """Return those of decoding one video, or with one frame a picture.

    Args:
        widths: Channels at each resolution, from full size down.
        blocks: Residual blocks at each resolution.
        frames: Frames in pixel space, 4n + 1.
        height, width: Pixels.
    """
    taps, halved = (27, (frames - 1) // 2 + 1) if frames > 1 else (9, 1)
    lengths = [frames, frames, halved, *[(frames - 1) // 4 + 1] * len(widths)]
    cells = [lengths[level] * (height >> level) * (width >> level) for level in range(len(widths))]
    lowest, per_frame = widths[-1], cells[-1] // lengths[len(widths) - 1]
    total = cells[-1] * (4 * taps * lowest**2 + 4 * lowest**2 + 2 * lowest * per_frame)  # both blocks and attention
    for level, after in enumerate(widths):
        before = widths[min(level + 1, len(widths) - 1)]
        first = taps * (before * after + after**2) + (before * after if before != after else 0)
        total += cells[level] * (first + (blocks - 1) * 2 * taps * after**2)
        if level:
            total += cells[level - 1] * (9 if level == 1 else taps) * after**2  # the convolution after doubling
    return total


def decode_bytes(tile: int, frames: int, number_bytes: int, hidden_size: int = 128) -> int:
    """Return the peak of decoding one tile: 8 tensors of the full resolution, and the frames that layers carry over.

    Args:
        tile: Side in pixels.
        frames: Frames of a tile, 9 or more.
        number_bytes: Bytes of a number.
        hidden_size: Channels of the VAE at full resolution.
    """
    return (8 * frames + 45) * hidden_size * tile**2 * number_bytes


def video_bytes(frames: int, pixels: int) -> int:
    """Return the bytes of the finished video in fp32 and two copies of it, as the pipeline turns it into pictures."""
    return COPIES * frames * 3 * pixels**2 * 4


# --- a whole call ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """The sizes of a call that decide its cost.

    Attributes:
        samples: Pictures, videos or sets of views for each prompt.
        frames: Frames in pixel space, 4n + 1; with `views` the number of views.
        height, width: Pixels.
        steps: Sampling steps.
        prompts: Number of prompts.
        predictions: How many samples the network sees in a step for each sample; 2 with guidance.
        views: Whether each latent frame is a picture of its own.
        slices: Whether samples are decoded one by one.
        tiling: Tiles of the VAE, if they are on.
        at_once: Pixels of all latent frames that one call may have, where samples are made in several calls.
    """

    samples: int
    height: int
    width: int
    steps: int
    prompts: int = 1
    frames: int = 1
    predictions: int = 2
    views: bool = False
    slices: bool = False
    tiling: VAETiling | None = None
    at_once: int | None = None

    @property
    def latent_frames(self) -> int:
        return self.frames if self.views else (self.frames - 1) // 4 + 1

    @property
    def together(self) -> int:
        """Samples that are in memory at the same time."""
        if self.at_once is None:
            return self.samples * self.prompts
        return min(self.samples, max(1, self.at_once // (self.height * self.width * self.latent_frames)))


class Cost(NamedTuple):
    """What a call needs: bytes beside the weights, and multiply-accumulates."""

    memory: int
    macs: int


def cost_of(
    call: Call, transformer: Mapping[str, Any], vae: Mapping[str, Any] | None, number_bytes: int, windows: Any = None
) -> Cost:
    """Return what a call of a pipeline costs.

    Args:
        call: Its sizes.
        transformer: Configuration of PT-DiT, or of DiT or another network whose tokens all attend to each other.
        vae: Configuration of the VAE; None if latents are the result.
        number_bytes: Bytes of a number of both networks.
        windows: Window size and proxy ratio of PT-DiT; default those that keep the number of trained windows.
    """
    patch = transformer.get("patch_size", 2)
    dim = transformer.get("num_attention_heads", 0) * transformer.get("attention_head_dim", 0)
    widths, blocks = _decoder_sizes(vae) if vae is not None else ((), 0)
    cell = 2 ** (len(widths) - 1) if widths else 8
    rows, columns = max(1, call.height // (cell * patch)), max(1, call.width // (cell * patch))
    latent, batch = call.latent_frames, call.predictions * call.samples * call.prompts
    if "proxy_ratio" in transformer:
        known = PTDiTParameters.from_config(transformer)
        windows = windows or keep_windows(rows, columns, known.window_size, known.proxy_ratio, known.num_windows)
        size = Size((latent, rows, columns), *windows, dim, known.num_layers, TEXT_TOKENS, batch,
                    known.caption_channels)  # fmt: skip
        step = total_macs(size)
    else:
        step = plain_macs(rows * columns, dim, transformer.get("num_layers", 1), batch, transformer.get("window_size"))
    memory = forward_bytes(call.predictions * call.together * latent * rows * columns, dim, number_bytes)
    macs = call.steps * step
    if vae is not None:
        parts, frames = (call.frames, 1) if call.views else (1, call.frames)
        macs += call.samples * call.prompts * parts * _decoder_work(call, widths, blocks, frames)
        finished = COPIES * 3 * 4 * call.together * parts * frames * call.height * call.width
        memory = max(memory, _decoder_memory(call, widths[0], frames) * number_bytes + finished // 2, finished)
    return Cost(memory, macs)


def largest(call: Call, name: str, least: int, step: int, fits: Callable[[Call], bool]) -> Call | None:
    """Return the call with the largest value of a field up to its own with which it fits, None if `least` is too much.

    Args:
        call: Its sizes, which do not fit.
        name: Field; "size" stands for height and width, which keep their proportions.
        least, step: Legal values are `least`, `least` + `step` and so on.
        fits: Whether a call can be made.
    """
    longest = max(call.height, call.width)

    def changed(value: int) -> Call:
        if name != "size":
            return replace(call, **{name: value})
        sides = (max(least, side * value // longest // step * step) for side in (call.height, call.width))
        return replace(call, **dict(zip(("height", "width"), sides, strict=True)))

    low, high = 0, ((longest if name == "size" else getattr(call, name)) - least) // step
    if high <= 0 or not fits(changed(least)):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(changed(least + middle * step)) else (low, middle - 1)
    return changed(least + low * step)


def _decoder_sizes(vae: Mapping[str, Any]) -> tuple[Sequence[int], int]:
    """Return channels at each resolution and residual blocks, of our VAE or one of diffusers for pictures."""
    if "block_out_channels" in vae:
        return vae["block_out_channels"], vae.get("layers_per_block", 1) + 1
    known = VAEParameters.from_config(vae)
    return known.widths, known.num_res_blocks + 1


def _decoder_work(call: Call, widths: Sequence[int], blocks: int, frames: int) -> int:
    """Return the MACs of one sample; tiles overlap, so they are more."""
    tiling = call.tiling
    if tiling is None or tiling.covers(frames, call.height, call.width):
        return decoder_macs(widths, blocks, frames, call.height, call.width)
    height, width, length = (min(tiling.size, call.height), min(tiling.size, call.width), min(tiling.frames, frames))
    step = tiling.size - tiling.size // 8
    tiles = -(-call.height // step) * -(-call.width // step) * -(-frames // length)
    return tiles * decoder_macs(widths, blocks, length, height, width)


def _decoder_memory(call: Call, hidden_size: int, frames: int) -> int:
    """Return the numbers that decoding holds at once: `decode_bytes`, for any shape of a tile and single pictures."""
    tiling, carried = call.tiling, 4 * (frames > 1)
    height, width, samples = call.height, call.width, 1 if call.slices else call.together
    if tiling is not None and not tiling.covers(frames, height, width):
        height, width = min(tiling.size, height), min(tiling.size, width)
        carried = 45 if frames > tiling.frames else carried
        frames = min(tiling.frames, frames)
    return samples * (8 * frames + carried) * hidden_size * height * width
