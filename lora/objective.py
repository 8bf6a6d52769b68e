"""The loss: rectified flow on the first half of the transformer's channels, as in the official training.

x_t = (1 - t) x0 + t noise; the network predicts x0 - noise. Must not know data, files or the loop.
Letters: B samples, C latent channels, F H W latent frames, rows, columns, L text tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptdit_diffusers.core.sampling import choose_windows, size_conditions
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel


class FlowLoss(nn.Module):
    """The transformer and its loss as one forward, which is what accelerate wraps."""

    def __init__(self, transformer: PTDiTTransformer3DModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.transformer, self.dtype = transformer, dtype

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Mean over the batch of weight * |(noise - x0) - flow|^2, a scalar; see `Batches` for the batch."""
        model, latents, noise = self.transformer, batch["latents"], batch["noise"]
        time = batch["time"][:, None, None, None, None]
        noisy = (1 - time) * latents + time * noise  # (B, C, F, H, W)
        height, width = latents.shape[-2:]
        options = {
            **choose_windows(model, "auto", "auto", height, width),
            **size_conditions(model, height * 8, width * 8),
        }
        if model.proxy_mode == "random":
            options["generator"] = [torch.Generator().manual_seed(seed) for seed in batch["seeds"]]
        sample = model(
            hidden_states=noisy.to(self.dtype),
            encoder_hidden_states=batch["text"].to(self.dtype),
            timestep=batch["time"] * 1000,
            encoder_attention_mask=batch["mask"],
            return_dict=False,
            **options,
        )[0]
        error = F.mse_loss(model.flow(sample), noise - latents, reduction="none").mean((1, 2, 3, 4))  # (B,)
        return (error * batch["weight"]).mean()

    def within(self, use: Callable[[], Any]) -> Any:
        """Call `use`, which runs the transformer: under FSDP2 this method gathers weights as the forward does."""
        return use()
