"""The longest video of the official size that fits a GPU, by formula: nothing is measured here.

    python -m scripts.benchmarks.longest_video --memory 8 16 24 --pixels 512 1024

The formulas are in `ptdit_diffusers/core/cost.py`; tests hold them against counted tensors at small sizes. The text
encoder is gone when the steps begin, as in `ptdit generate`. What kernels use inside, the CUDA context and gaps
between tensors are not in the formulas: a tenth of the memory is kept for them.
"""

from ptdit_diffusers.core.cost import decode_bytes, forward_bytes, video_bytes
from scripts.evaluation.options import make_parser

WEIGHTS = 1_131_629_216 + 239_189_991  # parameters of the official transformer and VAE
WIDTH = 1152
NUMBER_BYTES = 2  # bf16
BATCH = 2  # guidance
FREE = 0.9
TILES = ((512, 29), (512, 17), (256, 29), (256, 17), (256, 9))  # pixels, frames: the first that fits is taken


def needed(latent_frames: int, pixels: int, tile: tuple[int, int]) -> int:
    """Return the bytes of a call: weights, and the largest of its stages."""
    frames, tokens = 4 * (latent_frames - 1) + 1, latent_frames * (pixels // 16) ** 2
    decoding = decode_bytes(min(tile[0], pixels), tile[1], NUMBER_BYTES) + video_bytes(frames, pixels) // 2
    stages = forward_bytes(BATCH * tokens, WIDTH, NUMBER_BYTES), decoding, video_bytes(frames, pixels)
    return WEIGHTS * NUMBER_BYTES + max(stages)


def longest(memory: float, pixels: int) -> tuple[int, tuple[int, int]]:
    """Return the latent frames of the longest video in that many GiB, 0 if not one fits, and the tile it needs."""
    budget, best = int(FREE * memory * 2**30), (0, TILES[-1])
    for tile in TILES:
        latent_frames = 0
        while needed(latent_frames + 1, pixels, tile) <= budget:
            latent_frames += 1
        best = max(best, (latent_frames, tile), key=lambda one: one[0])
    return best


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = make_parser("scripts.benchmarks.longest_video", __doc__)
    parser.add_argument("--memory", type=float, nargs="+", default=[8, 16, 24], help="GiB of the GPU")
    parser.add_argument("--pixels", type=int, nargs="+", default=[512, 1024], help="side of the frames")
    args = parser.parse_args(arguments)
    print("| memory (computed) | pixels | latent frames | frames | tile of the VAE |\n| --- | --- | --- | --- | --- |")
    for memory in args.memory:
        for pixels in args.pixels:
            latent_frames, (side, frames) = longest(memory, pixels)
            made = 4 * (latent_frames - 1) + 1 if latent_frames else 0
            print(f"| {memory:g} GiB | {pixels} | {latent_frames} | {made} | {side} px, {frames} frames |")


if __name__ == "__main__":
    main()
