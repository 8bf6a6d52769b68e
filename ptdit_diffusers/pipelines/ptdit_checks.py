"""Checks of what a user hands to the pipeline. Each error names the value given, the rule and the nearest legal value.

It must not know components: sizes, lists and shapes come in as plain values.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ptdit_diffusers.core.backbones.windows import legal_triple

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_size(name: str, value: Any, multiple: int, offset: int, reason: str) -> None:
    """Raise unless `value` is a positive integer of the form multiple * n + offset (offset 0 or 1)."""
    if not isinstance(value, int) or isinstance(value, bool):
        nearest = (
            max(1, round(value / multiple)) * multiple + offset if isinstance(value, float) else multiple + offset
        )
        raise ValueError(f"{name}={value!r} must be an integer; nearest legal value: {nearest}.")
    if value >= 1 and value % multiple == offset:
        return
    smallest = offset or multiple
    low = max(smallest, (value - offset) // multiple * multiple + offset)
    rule = f"a multiple of {multiple}" if offset == 0 else f"of the form {multiple}n + {offset}"
    raise ValueError(f"{name}={value} is not {rule} ({reason}); nearest: {low} or {low + multiple}.")


def check_count(name: str, value: Any) -> None:
    """Raise unless `value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        nearest = max(1, round(value)) if isinstance(value, float) and value == value else 1
        raise ValueError(f"{name}={value!r} must be an integer of at least 1; nearest: {nearest}.")


def check_views(num_views: Any, num_frames: Any) -> None:
    """Raise unless `num_views` is None, or an integer of at least 2 that comes without `num_frames`."""
    if num_views is None:
        return
    if num_frames != 1:
        raise ValueError(
            f"num_views={num_views!r} and num_frames={num_frames!r} were both given: views are the frames of an "
            "object that stands still; pass only one of them."
        )
    if not isinstance(num_views, int) or isinstance(num_views, bool) or num_views < 2:
        nearest = max(2, round(num_views)) if isinstance(num_views, float) and num_views == num_views else 2
        raise ValueError(
            f"num_views={num_views!r} must be an integer of at least 2 (one view is a picture: leave num_views out); "
            f"nearest: {nearest}."
        )


def check_output_type(output_type: Any) -> None:
    """Raise unless `output_type` is one that the pipeline can return."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} is unknown; choose one of {', '.join(OUTPUT_TYPES)}.")


def check_sigmas(sigmas: Sequence[float] | None) -> None:
    """Raise unless `sigmas` is None or falls strictly from at most 1 to above 0."""
    if sigmas is None:
        return
    falls = all(later < earlier for earlier, later in zip(sigmas, sigmas[1:], strict=False))
    if len(sigmas) == 0 or not falls or sigmas[0] > 1 or sigmas[-1] <= 0:
        raise ValueError(f"sigmas={list(sigmas)} must fall strictly from at most 1 to above 0, e.g. [1.0, 0.5].")


def check_timesteps(timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> None:
    """Raise unless `timesteps` is None, or `sigmas` is and the times fall strictly from at most 1000 to above 0."""
    if timesteps is None:
        return
    if sigmas is not None:
        raise ValueError("`timesteps` and `sigmas` were both given; pass only one of them.")
    falls = all(later < earlier for earlier, later in zip(timesteps, timesteps[1:], strict=False))
    if len(timesteps) == 0 or not falls or timesteps[0] > 1000 or timesteps[-1] <= 0:
        raise ValueError(
            f"timesteps={list(timesteps)} must fall strictly from at most 1000 to above 0, e.g. [1000.0, 500.0]."
        )


def check_strength(strength: Any) -> None:
    """Raise unless `strength` is above 0 and at most 1."""
    if not isinstance(strength, (int, float)) or not 0 < strength <= 1:
        nearest = 1.0 if isinstance(strength, (int, float)) and strength > 1 else 0.1
        raise ValueError(f"strength={strength!r} must be above 0 and at most 1; nearest: {nearest}.")


def check_steps(steps: int, strength: float) -> int:
    """Number of steps to leave out at the beginning; raises if none would be left of `steps`."""
    skipped = int(max(steps - steps * strength, 0))
    if skipped >= steps:
        raise ValueError(f"strength={strength} of {steps} steps leaves none; nearest strength: {1 / steps:.3g}.")
    return skipped


def check_settings(
    num_inference_steps: Any,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
    strength: Any,
    max_sequence_length: Any,
    window_size: Any,
    ratio: Any,
) -> None:
    """Raise unless the arguments of a call that stand for themselves are legal."""
    check_count("num_inference_steps", num_inference_steps)
    check_sigmas(sigmas)
    check_timesteps(timesteps, sigmas)
    check_strength(strength)
    check_count("max_sequence_length", max_sequence_length)
    check_windows("window_size", window_size)
    check_windows("proxy_ratio", ratio)


def check_picture_count(name: str, given: int, prompts: int, samples: int) -> None:
    """Raise unless there is one picture for all, one per prompt or one per sample."""
    if given not in (1, prompts, samples):
        legal = " or ".join(map(str, sorted({1, prompts, samples})))
        raise ValueError(f"`{name}` holds {given} pictures for {prompts} prompts ({samples} samples); pass {legal}.")


def check_text(name: str, text: Any, embeds: torch.Tensor | None, mask: torch.Tensor | None, width: int) -> None:
    """Raise if a prompt has the wrong type, comes in two forms, or its embeddings or mask have the wrong shape."""
    if text is not None and not isinstance(text, str):
        if not isinstance(text, list) or not text or not all(isinstance(part, str) for part in text):
            raise ValueError(f"`{name}` must be a string or a list of strings, got {type(text).__name__}: {text!r}.")
    if text is not None and embeds is not None:
        raise ValueError(f"`{name}` and `{name}_embeds` were both given; pass only one of them.")
    if embeds is not None and (embeds.ndim != 3 or embeds.shape[2] != width):
        raise ValueError(f"`{name}_embeds` must have shape (batch, tokens, {width}), got {tuple(embeds.shape)}.")
    if mask is None:
        return
    mask_name = f"{name}_attention_mask"
    if embeds is None:
        raise ValueError(f"`{mask_name}` was given without `{name}_embeds`; pass both or neither.")
    if mask.shape != embeds.shape[:2]:
        raise ValueError(f"`{mask_name}` must have shape {tuple(embeds.shape[:2])}, got {tuple(mask.shape)}.")
    if not mask.bool().any(dim=1).all():
        raise ValueError(f"`{mask_name}` has a row without a single kept token; keep at least the end token.")


def check_batch(name: str, given: int, batch_size: int, alternative: str = "") -> None:
    """Raise unless a list or tensor has as many members as the batch; `alternative` names another legal form."""
    if given != batch_size:
        alternative = f" or {alternative}" if alternative else ""
        raise ValueError(f"`{name}` has {given} members for a batch of {batch_size}; pass {batch_size}{alternative}.")


def check_callback_inputs(names: Any, allowed: list[str]) -> None:
    """Raise if a callback asks for a tensor that the pipeline does not hand out."""
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs={unknown} are unknown; choose from {allowed}.")


def check_windows(name: str, value: Any) -> None:
    """Raise unless a window size or proxy ratio is "auto" or three integers >= 1 (frames, rows, columns)."""
    if value == "auto":
        return
    if isinstance(value, str):
        raise ValueError(f'{name}={value!r} must be "auto" or three integers >= 1 (frames, rows, columns).')
    legal_triple(name, value)


def warn_of_pictures_only(latent_frames: int, sample_frames: int) -> None:
    """Warn of several frames from a model that was trained on single pictures.

    Args:
        latent_frames: Asked for; views are such frames.
        sample_frames: Latent frames that the model was made for.
    """
    if latent_frames > 1 and sample_frames == 1:
        warnings.warn(
            f"{latent_frames} latent frames were asked for, but this model was trained on single pictures (its "
            "transformer has sample_frames=1): they will not follow from one another.",
            stacklevel=2,
        )


def require_finite(tensor: torch.Tensor, what: str, dtype: torch.dtype) -> None:
    """Raise `RuntimeError` if a result of the networks holds NaN or infinity; it would become a black picture.

    Args:
        tensor: (B, ...).
        what: Which result this is, for the message.
        dtype: What the network that made it computes in.
    """
    broken = (~torch.isfinite(tensor)).flatten(1).any(dim=1)
    if broken.any():
        raise RuntimeError(
            f"the {what} of {int(broken.sum())} of {len(broken)} results hold NaN or infinite values "
            f"(computed in {dtype}); load the pipeline with dtype torch.bfloat16 or torch.float32."
        )


def warn_of_black(pixels: torch.Tensor, dtype: torch.dtype) -> None:
    """Warn of results that are black everywhere, which is how numbers that overflowed often look.

    Args:
        pixels: (B, ...) in [-1, 1], not yet clamped.
        dtype: What the network that made them computes in.
    """
    black = (pixels <= -1).flatten(1).all(dim=1)
    if black.any():
        warnings.warn(
            f"{int(black.sum())} of {len(black)} results are all black (computed in {dtype}); numbers may have "
            "overflowed: try dtype torch.bfloat16 or torch.float32.",
            stacklevel=2,
        )
