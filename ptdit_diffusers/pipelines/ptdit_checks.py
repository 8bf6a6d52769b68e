"""Checks of the arguments of a call. Each error names the value given, the rule and the nearest legal value."""

import math
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ptdit_diffusers.core.backbones.windows import legal_triple
from ptdit_diffusers.core.cost import Call
from ptdit_diffusers.core.sampling import choose_windows
from ptdit_diffusers.core.sizes import LARGEST_SIDE

from .machine import check_size_of_call
from .ptdit_request import GenerationRequest

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
COUNTS = (  # arguments of a call that are integers, or None
    *("height", "width", "num_frames", "num_views"),
    *("num_inference_steps", "num_images_per_prompt", "max_sequence_length"),
)


class ChecksMixin:
    """Checks a call against the `transformer` and `vae` of the pipeline, whose sizes `LatentsMixin` knows.

    Attributes:
        refuse_large_calls: Refuse what needs more memory than the device has, or more than a day. Set it to False on a
            pipeline to try such calls.
    """

    refuse_large_calls = True

    def check_call(self, call: GenerationRequest) -> None:
        """Check a call before any long work, and fill in what depends on the model.

        Sets `height` and `width` in pixels, `num_frames` (for views see `clip_length`), and `samples`, prompts *
        images per prompt.

        Raises:
            ValueError: An argument is not legal; the message names the nearest legal values.
        """
        for name in COUNTS:
            setattr(call, name, plain_integer(getattr(call, name)))
        for name in ("window_size", "proxy_ratio"):
            if isinstance(getattr(call, name), (tuple, list)):
                setattr(call, name, tuple(map(plain_integer, getattr(call, name))))
        check_count("num_inference_steps", call.num_inference_steps)
        if isinstance(call.generator, tuple):
            call.generator = list(call.generator)
        check_levels(call.sigmas, call.timesteps)
        check_count("max_sequence_length", call.max_sequence_length)
        check_guidance(getattr(call, "guidance_scale", 1.0), getattr(call, "guidance_rescale", 0.0))
        check_windows("window_size", call.window_size)
        check_windows("proxy_ratio", call.proxy_ratio)
        call.height, call.width = self.fill_size(call.height, call.width)
        call.num_frames = self.clip_length(call.num_frames, call.num_views)
        call.samples = self.check_inputs(
            call.prompt, call.negative_prompt, call.height, call.width, call.num_frames, call.num_images_per_prompt,
            call.generator, call.latents, call.prompt_embeds, call.prompt_attention_mask, call.negative_prompt_embeds,
            call.negative_prompt_attention_mask, call.output_type,
        )  # fmt: skip
        if self.refuse_large_calls:
            self.check_cost(call)

    def predictions(self, call: GenerationRequest) -> int:
        """Return how many samples the network sees in a step for each sample of the call."""
        return 1 + (call.guidance_scale > 1)

    def check_cost(self, call: GenerationRequest) -> None:
        """Refuse a checked call that needs more memory than the device has, or more than a day.

        Raises:
            ValueError: It does; names the estimate and the nearest sizes.
        """
        levels, spatial, temporal = call.sigmas, self.vae_scale_factor_spatial, self.vae_scale_factor_temporal
        levels = call.timesteps if levels is None else levels
        views, prompts = call.num_views is not None, call.samples // call.num_images_per_prompt
        size = Call(
            samples=call.num_images_per_prompt,
            prompts=prompts,
            height=call.height,
            width=call.width,
            steps=call.num_inference_steps if levels is None else len(levels),
            frames=call.num_views if views else call.num_frames,
            predictions=self.predictions(call),
            views=views,
            slices=bool(self.vae is not None and self.vae.use_slicing),
            tiling=self.vae.tiling if self.vae is not None and self.vae.use_tiling else None,
        )
        latent = size.height // spatial, size.width // spatial
        windows = choose_windows(self.transformer, call.window_size, call.proxy_ratio, *latent)
        side = spatial * self.transformer.config.patch_size
        names = {
            "samples": ("num_images_per_prompt={}" + f" for {prompts} prompts" * (prompts > 1), 1, 1),
            "frames": ("num_views={}", 2, 1) if views else ("num_frames={}", 1, temporal),
            "size": ("height={}, width={}", side, side),
        }
        if levels is None:
            names["steps"] = ("num_inference_steps={}", 1, 1)
        check_size_of_call(self, size, names, None if call.output_type == "latent" else self.vae, windows)

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        height: int,
        width: int,
        num_frames: int = 1,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
    ) -> int:
        """Check arguments that depend on each other: texts, sizes, generators, latents. They are those of a call.

        Returns:
            The number of samples: prompts * images per prompt.

        Raises:
            ValueError: Something does not fit; the message names the value, the rule and the nearest legal values.
        """
        text_width = self.transformer.config.caption_channels
        check_text("prompt", prompt, prompt_embeds, prompt_attention_mask, text_width)
        negative = negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask
        check_text("negative_prompt", *negative, text_width)
        if prompt is None and prompt_embeds is None:
            raise ValueError("`prompt` and `prompt_embeds` are both None; pass one of them.")
        prompts = len(prompt_embeds) if prompt is None else 1 if isinstance(prompt, str) else len(prompt)
        if isinstance(negative_prompt, list):
            check_batch("negative_prompt", len(negative_prompt), prompts, "one string")
        if negative_prompt_embeds is not None:
            check_batch("negative_prompt_embeds", len(negative_prompt_embeds), prompts)

        spatial, patch = self.vae_scale_factor_spatial, self.transformer.config.patch_size
        for name, size in (("height", height), ("width", width)):
            check_size(name, size, spatial * patch, 0, f"VAE {spatial} x patch {patch}")
        check_size("num_frames", num_frames, self.vae_scale_factor_temporal, 1, "frames that the VAE packs into one")
        check_count("num_images_per_prompt", num_images_per_prompt)
        samples = prompts * num_images_per_prompt
        check_generator(generator)
        if isinstance(generator, list):
            check_batch("generator", len(generator), samples, "one generator")
        expected = self.latent_shape(samples, height, width, num_frames)
        if latents is not None and tuple(latents.shape) != expected:
            raise ValueError(f"`latents` must have shape {expected} for this call, got {tuple(latents.shape)}.")
        check_output_type(output_type)
        if self.vae is None and output_type != "latent":
            raise ValueError(f'output_type={output_type!r} needs a VAE, but this pipeline has none; pass "latent".')
        warn_of_images_only(expected[2], self.transformer.config.sample_frames)
        return samples


def check_size(name: str, value: Any, multiple: int, offset: int, reason: str) -> None:
    """Raise unless `value` is a positive integer of the form multiple * n + offset (offset 0 or 1)."""
    if not is_integer(value):
        nearest = max(1, nearest_integer(value, multiple) // multiple) * multiple + offset
        raise ValueError(f"{name}={value!r} must be an integer; nearest legal value: {nearest}.")
    if value > LARGEST_SIDE + offset:
        raise ValueError(f"{name}={value} must be at most {LARGEST_SIDE + offset}; nearest: {LARGEST_SIDE + offset}.")
    if value >= 1 and value % multiple == offset:
        return
    smallest = offset or multiple
    low = max(smallest, (value - offset) // multiple * multiple + offset)
    rule = f"a multiple of {multiple}" if offset == 0 else f"of the form {multiple}n + {offset}"
    raise ValueError(f"{name}={value} is not {rule} ({reason}); nearest: {low} or {low + multiple}.")


def check_count(name: str, value: Any) -> None:
    """Raise unless `value` is an integer of at least 1."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1; nearest: {nearest_integer(value, 1)}.")


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, also one of numpy, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def plain_integer(value: Any) -> Any:
    """Return an integer of numpy as one of Python, and anything else unchanged."""
    return int(value) if is_integer(value) else value


def nearest_integer(value: Any, least: int) -> int:
    """Return the integer of at least `least` that is nearest to a finite number; `least` for anything else."""
    return max(least, round(value)) if isinstance(value, float) and math.isfinite(value) else least


def check_guidance(scale: Any, rescale: Any = 0.0) -> None:
    """Raise unless the guidance scale is a finite number of at least 0, and `guidance_rescale` one from 0 to 1."""
    check_numbers({"guidance_scale": (scale, math.inf), "guidance_rescale": (rescale, 1.0)})


def check_numbers(numbers: Mapping[str, tuple[Any, float]]) -> None:
    """Raise unless each is a finite number from 0 to the given most."""
    for name, (value, most) in numbers.items():
        try:
            legal = math.isfinite(value) and 0 <= value <= most
        except (TypeError, ValueError):
            legal = False
        if not legal:
            rule = "a finite number of at least 0" if most == math.inf else "a number from 0 to 1"
            nearest = most if isinstance(value, (int, float)) and most < value else 0.0
            raise ValueError(f"{name}={value!r} must be {rule}; nearest: {nearest}.")


def check_generator(generator: Any) -> None:
    """Raise unless it is None, a `torch.Generator` or a list of them."""
    for one in generator if isinstance(generator, (list, tuple)) else [generator]:
        if one is not None and not isinstance(one, torch.Generator):
            seed = one if is_integer(one) else 0
            raise ValueError(
                f"generator={one!r} must be a torch.Generator or a list of them, one for each sample: "
                f"torch.Generator().manual_seed({seed})."
            )


def check_views(num_views: Any, num_frames: Any) -> None:
    """Raise unless `num_views` is None, or an integer of at least 2 that comes without `num_frames`."""
    if num_views is None:
        return
    if num_frames != 1:
        raise ValueError(
            f"num_views={num_views!r} and num_frames={num_frames!r} were both given: views are the frames of an "
            "object that stands still; pass only one of them."
        )
    if not is_integer(num_views) or num_views < 2:
        nearest = nearest_integer(num_views, 2)
        raise ValueError(
            f"num_views={num_views!r} must be an integer of at least 2 (one view is an image: leave num_views out); "
            f"nearest: {nearest}."
        )


def check_output_type(output_type: Any) -> None:
    """Raise unless `output_type` is one that the pipeline can return."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} is unknown; choose one of {', '.join(OUTPUT_TYPES)}.")


def check_levels(sigmas: Sequence[float] | None, timesteps: Sequence[float] | None) -> None:
    """Raise if both are given, or one does not fall strictly from at most 1 (`timesteps`: 1000) to above 0."""
    if sigmas is not None and timesteps is not None:
        raise ValueError("`timesteps` and `sigmas` were both given; pass only one of them.")
    for name, levels, most in (("sigmas", sigmas, 1), ("timesteps", timesteps, 1000)):
        if levels is None:
            continue
        if not hasattr(levels, "__len__") or isinstance(levels, str):
            raise ValueError(f"{name}={levels!r} must be a list of numbers, e.g. [{float(most)}, {most / 2}].")
        falls = all(later < earlier for earlier, later in zip(levels, levels[1:], strict=False))
        if len(levels) == 0 or not falls or levels[0] > most or levels[-1] <= 0:
            raise ValueError(
                f"{name}={list(levels)} must fall strictly from at most {most} to above 0, "
                f"e.g. [{float(most)}, {most / 2}]."
            )


def check_strength(strength: Any) -> None:
    """Raise unless `strength` is above 0 and at most 1."""
    if not isinstance(strength, Real) or not 0 < strength <= 1:
        nearest = 1.0 if isinstance(strength, Real) and strength > 1 else 0.1
        raise ValueError(f"strength={strength!r} must be above 0 and at most 1; nearest: {nearest}.")


def check_steps(steps: int, strength: float) -> int:
    """Return the number of steps to leave out at the beginning; raise if none of `steps` would be left."""
    skipped = int(max(steps - steps * strength, 0))
    if skipped >= steps:
        raise ValueError(f"strength={strength} of {steps} steps leaves none; nearest strength: {1 / steps:.3g}.")
    return skipped


def check_image_count(name: str, given: int, prompts: int, samples: int) -> None:
    """Raise unless there is one image for all, one per prompt or one per sample."""
    if given not in (1, prompts, samples):
        legal = " or ".join(map(str, sorted({1, prompts, samples})))
        raise ValueError(f"`{name}` holds {given} images for {prompts} prompts ({samples} samples); pass {legal}.")


def check_text(name: str, text: Any, embeds: Tensor | None, mask: Tensor | None, width: int) -> None:
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
    """Raise if a callback asks for a tensor that the pipeline does not pass to it."""
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


def warn_of_images_only(latent_frames: int, sample_frames: int) -> None:
    """Warn of several frames from a model that was trained on single images.

    Args:
        latent_frames: Frames of the call; views are such frames.
        sample_frames: Latent frames that the model was trained on.
    """
    if latent_frames > 1 and sample_frames == 1:
        warnings.warn(
            f"{latent_frames} latent frames were asked for, but this model was trained on single images (its "
            "transformer has sample_frames=1): its frames will not form a continuous video.",
            stacklevel=2,
        )


def require_finite(tensor: Tensor, what: str, network: torch.nn.Module) -> None:
    """Raise `RuntimeError` if a result of the networks holds NaN or infinity; it would become a black image.

    Args:
        tensor: (B, ...).
        what: Which result this is, for the message.
        network: What made it.
    """
    broken = (~torch.isfinite(tensor)).flatten(1).any(dim=1)
    if not broken.any():
        return
    found = f"the {what} of {int(broken.sum())} of {len(broken)} results hold NaN or infinite values"
    damaged = first_broken_weight(network)
    if damaged:
        raise RuntimeError(
            f"{found}, because the weights of {type(network).__name__} do, first {damaged}: the file is damaged, or "
            "was saved so; fetch or convert it again."
        )
    raise RuntimeError(
        f"{found} (computed in {network.dtype}); load the pipeline with dtype torch.bfloat16 or torch.float32."
    )


def first_broken_weight(network: torch.nn.Module) -> str | None:
    """Return the name of the first weight with NaN or infinite values, among those that are in memory."""
    for name, weight in network.named_parameters():
        if weight.is_floating_point() and not weight.is_meta and not torch.isfinite(weight.detach().float()).all():
            return name
    return None


def warn_of_black(pixels: Tensor, dtype: torch.dtype) -> None:
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
