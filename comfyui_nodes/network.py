"""What our networks and models share with ComfyUI: its attention, wrappers, replaced blocks, and lines in its log."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor, nn

from ptdit_diffusers.core.checkpoint_names import LISTED, ConversionError

from .effects import foreign_sampling, log_lines


class CurrentForward:
    """ComfyUI's `transformer_options` of the forward that is running, for attention to read."""

    options: dict[str, Any] = {}


def attend(current: CurrentForward, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attend by ComfyUI's attention.

    Args:
        current: The forward that is running.
        query, key, value: (B, tokens, heads, head_dim).
        mask: (B, 1, 1, keys), True = keep; or (1, heads, tokens, keys), added to the logits.
    """
    heads = query.shape[2]
    if mask is not None and mask.dtype == torch.bool:  # additive and full, which every attention of ComfyUI takes
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, lowest)
        mask = mask.expand(-1, -1, query.shape[1], -1)
    tokens = (part.flatten(2) for part in (query, key, value))
    attended = optimized_attention(*tokens, heads, mask=mask, transformer_options=current.options)
    return attended.unflatten(2, (heads, -1))


class ComfyNetwork:
    """What ComfyUI asks of a network; a class inherits from this first, then from a backbone.

    Attributes:
        block_inputs: ComfyUI's names of what a block gets after its tokens, for nodes that replace blocks.
    """

    block_inputs: tuple[str, ...] = ("vec",)

    def prepare(self, dtype: torch.dtype | None) -> None:
        """Set what `build` of the backbone and the other methods need."""
        self.dtype = dtype
        self.current = CurrentForward()
        self.attention = partial(attend, self.current)

    def number_blocks(self, blocks: Iterable[nn.Module]) -> None:
        """Give each block its number."""
        for index, block in enumerate(blocks):
            block.index = index

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        attention_mask: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Call `_forward` through the wrappers of other nodes."""
        options = {} if transformer_options is None else transformer_options
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options
        )
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, attention_mask, options, **kwargs)

    def begin(self, options: Mapping[str, Any], blocks: int) -> None:
        """Keep ComfyUI's options of a forward for attention and blocks."""
        self.current.options = {**options, "total_blocks": blocks, "block_type": "double"}

    def end(self) -> None:
        """Forget them."""
        self.current.options = {}

    def run_block(self, block: nn.Module, hidden_states: Tensor, *inputs: Any) -> Tensor:
        """Run one block, or what a node put in its place with `patches_replace`; a canceled prompt ends here."""
        options = self.current.options
        if not torch.compiler.is_compiling():
            comfy.model_management.throw_exception_if_processing_interrupted()
        options["block_index"] = block.index
        replacements = options.get("patches_replace", {}).get("dit", {})
        for kind in ("double_block", "single_block"):
            if (kind, block.index) in replacements:
                more = inputs[len(self.block_inputs) :]

                def original(given: dict[str, Any], more: tuple = more) -> dict[str, Tensor]:
                    return {"img": block(given["img"], *(given[name] for name in self.block_inputs), *more)}

                given = {"img": hidden_states, "txt": None, "pe": None, "transformer_options": options}
                given |= dict(zip(self.block_inputs, inputs, strict=False))
                return replacements[(kind, block.index)](given, {"original_block": original})["img"]
        return block(hidden_states, *inputs)


class ComfyModel(comfy.model_base.BaseModel):
    """A model that says in the log, once in a sampling run, what is connected and cannot act on it."""

    logged_run: Any = None  # sigmas of the sampling run whose lines are written
    logged: frozenset[str] = frozenset()  # its lines
    blocks: int = 0
    title = "PT-DiT"

    def arguments(self, sigma: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """Return more arguments of the network for a step at noise levels `sigma` (B,)."""
        return {}

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        self.log_once(options, control)
        kwargs |= self.arguments(t, options)
        return super()._apply_model(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def log_once(self, options: dict[str, Any], control: Any) -> None:
        """Log what cannot act on this model, each line once in a sampling run; patches may come and go within it."""
        run = options.get("sample_sigmas")
        if run is None or torch.compiler.is_compiling():
            return
        lines = log_lines(control, options, self.blocks, self.title)
        if run is not self.logged_run:
            self.logged_run, self.logged = run, frozenset()
            foreign = self.foreign_sampling()
            lines += [foreign] if foreign else []
        for line in lines:
            if line not in self.logged:
                logging.warning("PT-DiT: %s", line)
        self.logged |= set(lines)

    def foreign_sampling(self) -> str | None:
        """Return a warning if a node has set the sampling of another kind of model, else None."""
        sampling, types = self.model_sampling, comfy.model_base.ModelType
        own = comfy.model_sampling.CONST if self.model_type is types.FLOW else comfy.model_sampling.EPS
        fits = getattr(type(sampling), "calculate_denoised", None) is own.calculate_denoised
        highest = torch.as_tensor(sampling.sigma_max, dtype=torch.float32)
        return foreign_sampling(fits, float(sampling.timestep(highest)))


def check_names(what: str, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Check that no weight of a network is missing: ComfyUI would sample with random numbers in its place.

    Shapes are not compared, since weights may be quantized; ComfyUI does it when it loads them.

    Raises:
        ConversionError: Some are missing; names the first ones.
    """
    missing = [name for name in dict(network.named_parameters()) if name not in weights]
    if missing:
        more = f", and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        raise ConversionError(f"the file lacks {len(missing)} weights of {what}: {', '.join(missing[:LISTED])}{more}")
