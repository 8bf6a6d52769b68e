"""One call of a pipeline on several devices, each a process of torch.distributed that makes the same call."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ContextParallelConfig
from torch import Tensor

from .ptdit_request import GenerationRequest


class ParallelMixin:
    """Shares the work of the pipeline's `transformer` and `vae`, and sees to it that all devices do the same."""

    _can_halve_guidance = False  # whether `guided_flow` can predict for one text only

    def enable_parallelism(self, guidance_halves: bool = False) -> None:
        """Share every call among all processes of torch.distributed; each must make it with the same arguments.

        Tokens are shared as by `transformer.enable_parallelism`. The VAE decodes its tiles (`vae.enable_tiling()`) on
        all devices, with the picture of one device, bit for bit. Every process gets the whole result.

        Args:
            guidance_halves: One half of the processes predicts for the negative prompt and the other for the prompt;
                tokens are shared within each half. The quickest way for calls with guidance; without guidance both
                halves do the same.

        Raises:
            ValueError: With `guidance_halves`, the number of processes is odd, or a guider of diffusers guides.
            RuntimeError: Parallelism is on already, torch.distributed is not initialized, or there is one process.
        """
        self.transformer.check_devices()
        count = torch.distributed.get_world_size()
        if count < 2:
            raise RuntimeError("there is one process: start several, for example torchrun --nproc-per-node 2 ...")
        if guidance_halves and not self._can_halve_guidance:
            raise ValueError(
                f"guidance_halves=True is for PTDiTPipeline and those made from it; a {type(self).__name__} guides as "
                "its guider says: leave it out."
            )
        if guidance_halves:
            from ptdit_diffusers.models.parallel_ptdit import share_guidance

            mesh = share_guidance()
            if count == 2:  # no tokens to share
                self.transformer.join_devices(mesh)
            else:
                config = ContextParallelConfig(ulysses_degree=count // 2, mesh=mesh)
                self.transformer.enable_parallelism(config=config)
        else:
            self.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count))
        if getattr(self, "vae", None) is not None:
            self.vae.share_tiles(self.transformer.everyone)

    def check_agreement(
        self, call: GenerationRequest, tensors: dict[str, Tensor | None], timesteps: Tensor, options: dict[str, Any]
    ) -> None:
        """Check that all devices were asked for the same; does nothing on one device.

        Raises:
            ValueError: They were not, on all devices alike; names what differs.
        """
        if self.transformer.everyone is None:
            return
        seeds = _seeds(call.generator)
        if self.transformer.proxy_mode == "random" and not seeds:
            raise ValueError(
                "proxy_mode='random' draws other proxies on each device: give all processes a generator with the same "
                "seed, for example generator=torch.Generator().manual_seed(0)."
            )
        plain = {
            name: value for name, value in options.items() if not isinstance(value, Tensor) and name != "generator"
        }
        self._require_same(
            {
                "latents": tensors["latents"],
                "prompts": tensors["prompt_embeds"],
                "negative prompts": tensors["negative_prompt_embeds"],
                "seeds": seeds,
                "sizes or settings": (tensors["latents"].shape, plain, call.num_inference_steps),
                "timesteps": timesteps,
            }
        )

    def check_step(self, tensors: dict[str, Tensor | None]) -> None:
        """Check after a step that all devices go on alike, and stop all of them where a callback stops one.

        Raises:
            ValueError: They do not, on all devices alike: a callback or noise of the scheduler differs.
        """
        everyone = self.transformer.everyone
        if everyone is None:
            return
        self._interrupt = everyone.any(self._interrupt, tensors["latents"].device)
        self._require_same(
            {
                "latents": tensors["latents"],
                "prompts": tensors["prompt_embeds"],
                "guidance": getattr(self, "_guidance_scale", None),
            }
        )

    def _require_same(self, inputs: dict[str, Any]) -> None:
        if different := self.transformer.everyone.differing(inputs):
            raise ValueError(
                f"the devices have different {', '.join(different)}: give all processes the same prompt, size and "
                "seed, for example generator=torch.Generator().manual_seed(0)."
            )


def _seeds(generator: torch.Generator | Sequence[torch.Generator] | None) -> list[int]:
    generators = generator if isinstance(generator, list) else [generator] if generator is not None else []
    return [one.initial_seed() for one in generators]
