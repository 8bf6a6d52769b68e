"""The LoRA as a task of the training loop: the adapter in the frozen transformer, its loss, pictures and files."""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim import Optimizer

from ptdit_diffusers.core.sampling import choose_windows, size_conditions
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.training.base_model import BaseModel, choose_dtype
from ptdit_diffusers.training.checkpoint import whole
from ptdit_diffusers.training.held_out import spread, warn_of_learning_by_heart
from ptdit_diffusers.training.networks import Networks, transformer_of
from ptdit_diffusers.training.objective import flow_matching
from ptdit_diffusers.training.optimizers import make_optimizers
from ptdit_diffusers.training.randomness import Stream
from ptdit_diffusers.training.schedules import named_schedule
from ptdit_diffusers.training.sheets import step_name, write_sheet
from ptdit_diffusers.training.task import PartTask, trained_parameters
from ptdit_diffusers.training.trackers import track_pictures

from .adapter import adapter_parameters, add_adapter, folded_weights, layer_name, rate_factors
from .batches import CachedBatches, describe_epoch, fixed_batches, joined_texts
from .cache import Cache
from .config import LoRASettings, TrainingSettings, check_warmup
from .export import base_layer_weights, export
from .samples import Sample
from .text_encoder import embed
from .validate import Sampling, generate_validation, quarter_steps, save_validation

logger = logging.getLogger("lora")


class NetworkTask(PartTask):
    """Optimizer, learning rate and average of an adapter or a network, as `TrainingSettings` has them.

    Attributes:
        schedule: 0-based step -> learning rate.
    """

    settings: TrainingSettings
    schedule: Callable[[int], float]

    def optimizers(self) -> list[Optimizer]:
        return self.made_optimizers()

    def made_optimizers(self, factors: Mapping[str, float] | None = None) -> list[Optimizer]:
        """Return the optimizer; `factors` as for `make_optimizers`."""
        settings = self.settings
        options = {"lr": settings.lr, "weight_decay": settings.weight_decay, "arguments": settings.optimizer_args}
        return make_optimizers(trained_parameters(self.model), settings.optimizer, factors=factors, **options)

    def learning_rate(self, step: int) -> float:
        return self.schedule(step)

    def average(self, parameters: Sequence[nn.Parameter]) -> EMAModel | None:
        return EMAModel(parameters, decay=self.settings.ema) if self.settings.ema else None


class LoRATask(NetworkTask):
    """An adapter that is trained on the samples of a cache.

    Attributes:
        model: The transformer, or `Networks` where the text encoder is trained, too.
    """

    sheet_folder = "validation"
    stream = (Stream.LORA_DROPOUT,)
    model: PTDiTTransformer3DModel | Networks
    settings: LoRASettings

    def __init__(
        self, settings: LoRASettings, base: BaseModel, cache: Cache, accelerator: Accelerator, global_batch: int = 0
    ) -> None:
        """Load the transformer and add the adapter; `global_batch` as for `CachedBatches`."""
        self.settings, self.base, self.cache, self.accelerator = settings, base, cache, accelerator
        ranks = (each // settings.context_parallel for each in (accelerator.process_index, accelerator.num_processes))
        self.data = CachedBatches(cache, settings, *ranks, global_batch)
        per_epoch = math.ceil(self.data.plan.per_epoch / settings.accumulation)
        self.steps = settings.epochs * per_epoch or settings.max_steps
        check_warmup(settings.warmup, self.steps)
        rates = settings.lr, settings.warmup, self.steps, settings.lr_num_cycles
        self.schedule = named_schedule(settings.schedule, *rates)
        self.device, self.dtype = accelerator.device, choose_dtype(settings.precision, accelerator.device)
        logger.info("%s on %s, base weights kept in %s", self.dtype, self.device, settings.base_weights)
        self.model = base.load_transformer(self.dtype, settings.base_weights, self.device)
        if settings.train_text_encoder:
            self.model = Networks(self.model, base.load_text_encoder(self.device))
        self.first = add_adapter(self.model, settings)
        self.network.set_windows(proxy_mode=settings.proxy_mode)
        if settings.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self.model.train()
        if settings.compile:
            self.network.compile_repeated_blocks()
        logger.info("%s; %d steps", describe_epoch(self.data), self.steps)

    @property
    def network(self) -> PTDiTTransformer3DModel:
        """The transformer."""
        return transformer_of(self.model)

    def optimizers(self) -> list[Optimizer]:
        if not self.settings.lr_pattern:
            return self.made_optimizers()
        names = list(trained_parameters(self.model))
        factors = rate_factors(map(layer_name, names), self.settings)
        return self.made_optimizers({name: factors[layer_name(name)] for name in names})

    def batches(self, rank: int) -> CachedBatches:
        return self.data

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return lora_loss(self.network, self.with_text(batch), self.dtype), {}

    def with_text(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch with embeddings, which the text encoder makes where it is trained."""
        if "ids" not in batch:
            return batch
        return {**batch, "text": embed(self.model.text_encoder, batch["ids"], batch["mask"])}

    def embedding_of(self, text: str) -> Tensor:
        """Return the embedding (L, D) of a text in the cache."""
        batch = self.with_text(send_to_device(joined_texts([self.cache.text(text)]), self.device))
        return batch["text"][0]

    def samples_of(self, step: int, processes: int) -> int:
        return self.data.plan.global_batch * self.settings.accumulation

    def notes(self) -> dict[str, Any]:
        return {
            "settings": dataclasses.asdict(self.settings),
            "processes": self.accelerator.num_processes,
            "global_batch": self.data.plan.global_batch,
            "transformer": self.base.fingerprint("transformer", "scheduler"),
        }

    def sheet_steps(self, last: int) -> Sequence[int]:
        return quarter_steps(last) if self.settings.has_sheets else ()

    def sheet(self, path: Path, step: int) -> dict[str, float]:
        """Generate a picture of each validation prompt, write the sheet of all, and measure the held-out loss."""
        losses = self.held_out_losses()
        if self.accelerator.is_main_process:
            advice = "stop there (export_every keeps the LoRAs on the way), use more pictures, or a lower rank or lr"
            warn_of_learning_by_heart(path.parent.parent / "log.jsonl", losses, step, -1, advice)
        if self.settings.validation_prompts:
            self.draw(path, step)
        return losses

    def held_out_losses(self) -> dict[str, float]:
        """Return the loss on samples that training never sees, and on as many that it sees."""
        samples = self.cache.samples
        hidden = [number for number, sample in enumerate(samples) if sample.held_out]
        seen = [number for number, sample in enumerate(samples) if not sample.held_out and not self.keeps(sample)]
        if not hidden:
            return {}
        return {"held_out_loss": self.measured_loss(hidden), "seen_loss": self.measured_loss(seen)}

    def keeps(self, sample: Sample) -> bool:
        """Return whether a sample shows what the model can do already."""
        return sample.prior or self.data.sets[sample.data_set].is_reg

    def measured_loss(self, numbers: Sequence[int]) -> float:
        """Return the mean error of samples, always with the same noise and times."""
        numbers, total = spread(numbers), 0.0
        for batch in fixed_batches(self.cache, self.settings, numbers):
            batch = send_to_device(batch, self.device)
            total += float(lora_errors(self.network, self.with_text(batch), self.dtype).sum())
        return total / len(numbers)

    def draw(self, path: Path, step: int) -> None:
        """Generate a picture of each validation prompt, and write the sheet of all of them."""
        settings = self.settings
        sampling = Sampling(settings.validation_steps, settings.validation_guidance, settings.num_frames)
        found = generate_validation(self.network, self.base, self.embedding_of, settings, self.device, sampling)
        if self.accelerator.is_main_process:
            pictures = save_validation(found, path, step, settings, sampling)
            shown = {f"step {mark}": step_name(mark) for mark in self.sheet_steps(self.steps) if mark <= step}
            write_sheet(path.parent, path.parent.parent / "sheet.png", shown, settings.validation_prompts)
            track_pictures(self.accelerator, "validation", pictures, step)

    def export(self, folder: Path) -> None:
        """Write the finished LoRA to `folder`/lora."""
        self.write(folder / "lora", folder.resolve().name, self.steps)

    def export_step(self, folder: Path, step: int) -> None:
        """Write the LoRA of a step; ComfyUI's file has a name of its own, so that several lie in one folder."""
        self.write(folder, f"{Path(self.settings.output_dir).resolve().name}-{step:08d}", step)

    def write(self, target: Path, name: str, step: int) -> None:
        """Write the LoRA of a step to the folder `target`."""
        parameters = {name: whole(value).float() for name, value in adapter_parameters(self.model).items()}
        weights = folded_weights(self.model, parameters, self.first)
        base_weights = base_layer_weights(self.model, weights)
        if self.accelerator.is_main_process:
            side = self.base.own_resolution
            logger.info("saved %s", export(target, name, weights, self.settings, step, base_weights, side))


def lora_loss(transformer: PTDiTTransformer3DModel, batch: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """Return the mean over the batch of weight * error of the flow; see `CachedBatches` for the batch."""
    return (lora_errors(transformer, batch, dtype) * batch["weight"]).mean()


def lora_errors(transformer: PTDiTTransformer3DModel, batch: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """Return the mean square error of the flow of each sample (B,)."""
    latents = batch["latents"]
    height, width = latents.shape[-2:]
    options = {
        **choose_windows(transformer, "auto", "auto", height, width),
        **size_conditions(transformer, height * 8, width * 8),
    }
    if transformer.proxy_mode == "random":
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in batch["seeds"]]

    def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
        (sample,) = transformer(
            hidden_states=noisy.to(dtype),
            encoder_hidden_states=batch["text"].to(dtype),
            timestep=timestep,
            encoder_attention_mask=batch["mask"],
            return_dict=False,
            **options,
        )
        return transformer.flow(sample)

    return flow_matching(predict, latents, batch["noise"], batch["time"], batch.get("area"))
