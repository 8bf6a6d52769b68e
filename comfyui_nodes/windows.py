"""Windows and proxies as a user sets them: presets, rules by step range, and a description of what they cost."""

from __future__ import annotations

from typing import Any, NamedTuple

from ptdit_diffusers.core.backbones.proxies import ProxyPlan
from ptdit_diffusers.core.backbones.windows import Triple, Windows

MODES = ("match resolution (64 windows)", "checkpoint", "fast", "fine", "custom")
AUTO, CHECKPOINT, FAST, FINE, CUSTOM = MODES


class WindowRule(NamedTuple):
    """One setting of the Window & Proxy node; 0 in a triple means the default of that axis."""

    mode: str = AUTO
    window: Triple = (0, 0, 0)
    proxy: Triple = (0, 0, 0)
    proxy_mode: str = "checkpoint"
    start: float = 0.0
    end: float = 1.0


def rule_for(rules: tuple[tuple, ...], progress: float) -> WindowRule:
    """Return the rule that applies at `progress` (0 at the first step, 1 at the end): the last one that covers it.

    Rules are stored as plain tuples, which two copies of this pack on one server can both read.
    """
    rules = [WindowRule(*rule) for rule in rules]
    fitting = [rule for rule in rules if rule.start <= progress < rule.end]
    return fitting[-1] if fitting else WindowRule()


def window_and_ratio(network: Any, rule: WindowRule, height: int, width: int) -> tuple[Triple, Triple]:
    """Return the tokens per window and per proxy (frames, rows, columns) for a latent size.

    Args:
        network: a backbone, for its `trained_windows` and `auto_windows`.
        rule: the user's setting.
        height, width: latent size, multiples of the patch size.
    """
    if rule.mode == CHECKPOINT:
        return network.trained_windows
    window, ratio = network.auto_windows(height, width)
    if rule.mode == FAST:
        return window, (ratio[0], 2 * ratio[1], 2 * ratio[2])
    if rule.mode == FINE:
        return window, (ratio[0], max(1, ratio[1] // 2), max(1, ratio[2] // 2))
    if rule.mode == CUSTOM:
        window = tuple(new or old for new, old in zip(rule.window, network.trained_windows[0], strict=True))
        ratio = tuple(new or old for new, old in zip(rule.proxy, window, strict=True))
    return window, ratio


def check_custom(window: Triple, proxy: Triple) -> None:
    """Check that on each axis proxies divide the window or are multiples of it.

    Raises:
        ValueError: on some axis they are neither; names the axis, both values and the nearest legal ones.
    """
    for axis, length, part in zip(("frames", "height", "width"), window, proxy, strict=True):
        if not length or not part or length % part == 0 or part % length == 0:
            continue
        legal = [value for value in range(1, length + 1) if length % value == 0]
        legal += [length * times for times in range(2, 9)]
        nearest = sorted(sorted(legal, key=lambda value: abs(value - part))[:2])  # noqa: B023
        raise ValueError(
            f"proxy_{axis}={part} neither divides window_{axis}={length} nor is a multiple of it; nearest: "
            f"{' or '.join(map(str, nearest))} (0 = one proxy per window)."
        )


def explain(network: Any, rule: WindowRule, height: int, width: int, frames: int = 1) -> str:
    """Describe what a rule means for pictures of height x width pixels with `frames` latent frames."""
    patch = network.patch_size
    rows, columns = height // 8 // patch, width // 8 // patch
    window, ratio = window_and_ratio(network, rule, rows * patch, columns * patch)
    grid = (frames, rows, columns)
    tokens = frames * rows * columns
    sizes = Windows(grid, window, shifted=False).sizes
    shifted = Windows(grid, window, shifted=True).sizes
    proxies = ProxyPlan(grid, window, ratio).number()
    windowed = sum(count * size**2 for count, size in [*sizes, *shifted])
    pairs = windowed + proxies**2 + tokens * proxies
    mode = network.proxy_mode if rule.proxy_mode == "checkpoint" else rule.proxy_mode
    at = f"{width} x {height} px" + (f", {frames} latent frames" if frames > 1 else "")
    return (
        f"{at}: {columns} x {rows} tokens ({tokens} in all). Windows of {window[2]} x {window[1]} tokens"
        + (f" over {window[0]} frames" if window[0] > 1 else "")
        + f", {sum(count for count, _ in sizes)} of them; {proxies} proxies ({mode}), one for {ratio[2]} x {ratio[1]} "
        f"tokens. A block's attention compares {pairs:,} pairs of tokens, {100 * pairs / tokens**2:.1f} % of the "
        f"{tokens**2:,} that attention over all tokens would."
    )
