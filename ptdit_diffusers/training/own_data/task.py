"""Training on one's own data as a task of the loop: loss, held-out loss, sheets, and the finished model."""

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import free_memory
from PIL import Image, PngImagePlugin
from torch import Tensor, nn
from torch.optim import Optimizer

from ptdit_diffusers.core.devices import check_compiler
from ptdit_diffusers.core.files import new_file
from ptdit_diffusers.core.sampling import choose_windows, size_conditions
from ptdit_diffusers.core.views import contact_sheet
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.pipelines.ptdit_base import PTDiTPipelineOutput
from ptdit_diffusers.training.average import PowerAverages, snapshot_steps, write_snapshot
from ptdit_diffusers.training.base_model import BaseModel, gpu_dtype
from ptdit_diffusers.training.checkpoint import is_shared, whole
from ptdit_diffusers.training.held_out import TOGETHER, spread, warn_of_learning_by_heart
from ptdit_diffusers.training.networks import Networks, text_encoder_of, transformer_of
from ptdit_diffusers.training.objective import flow_matching, shifted_times
from ptdit_diffusers.training.optimizers import make_optimizers
from ptdit_diffusers.training.own_data.batches import QUARTERS, OwnBatches, StageData, read_bad_shards
from ptdit_diffusers.training.own_data.card import card
from ptdit_diffusers.training.own_data.model import (
    export_model,
    load_trained,
    make_networks,
    outline,
    plain,
    to_bf16,
)
from ptdit_diffusers.training.own_data.settings import OwnDataSettings
from ptdit_diffusers.training.own_data.text import CachedText, OnlineText
from ptdit_diffusers.training.randomness import Stream, torch_generator
from ptdit_diffusers.training.record import update_run
from ptdit_diffusers.training.schedules import warmup_hold_decay
from ptdit_diffusers.training.sheets import step_name, write_sheet
from ptdit_diffusers.training.task import PartTask, trained_parameters
from ptdit_diffusers.training.throughput import peak_flops, step_flops
from ptdit_diffusers.training.trackers import track_pictures

logger = logging.getLogger(__name__)

SNAPSHOTS = "snapshots"  # folder in that of the run


class OwnDataTask(PartTask):
    """The transformer, trained on encoded pictures and their captions; with it the text encoder, if asked for."""

    all_draw = True
    model: PTDiTTransformer3DModel | Networks
    settings: OwnDataSettings

    def __init__(
        self,
        settings: OwnDataSettings,
        base: BaseModel,
        stages: list[StageData],
        texts: Sequence[OnlineText | CachedText],
        accelerator: Accelerator,
    ) -> None:
        """Load what is trained."""
        self.settings, self.base, self.stages, self.texts = settings, base, stages, texts
        self.accelerator, self.device = accelerator, accelerator.device
        context = settings.parallel.context
        ranks = accelerator.process_index // context, accelerator.num_processes // context
        self.data = OwnBatches(settings, base, stages, texts, *ranks)
        if settings.parallel.compile:
            check_compiler(self.device)
        self.model = make_networks(settings, base).to(self.device)
        if encoder := text_encoder_of(self.model):
            for text in texts:
                text.encoder = encoder
        if settings.optimizer.half:
            to_bf16(self.network)
        if settings.parallel.recompute:
            self.network.enable_gradient_checkpointing()
        if settings.parallel.compile:
            self.network.compile_repeated_blocks()
        bf16 = accelerator.mixed_precision == "bf16"
        self.peak, self.sample_flops = peak_flops(self.device, bf16, settings.run.peak_tflops), {}
        if not self.peak:
            logger.info("no mfu in the log: the peak of this device is not known; run.peak_tflops gives it")
        self.starts = [sum(stage.steps for stage in settings.stages[:i]) for i in range(len(settings.stages))]

    @property
    def network(self) -> PTDiTTransformer3DModel:
        """The transformer."""
        return transformer_of(self.model)

    def batches(self, rank: int) -> OwnBatches:
        return self.data

    def blocks(self) -> Sequence[nn.Module]:
        return self.network.transformer_blocks

    @property
    def shared(self) -> bool:
        """Whether processes share the weights."""
        return any(map(is_shared, self.model.parameters()))

    @property
    def run_together(self) -> bool:
        """Whether all processes must run the model together: they share the weights or the samples."""
        return self.shared or self.settings.parallel.context > 1

    def samples_of(self, step: int, processes: int) -> int:
        return self.settings.stages[self.settings.stage_at(step)[0]].batch

    def work_of(self, batch: dict[str, Any]) -> dict[str, float]:
        samples, *shape = batch["latents"].shape
        work: dict[str, float] = {"tokens": math.prod((samples, *shape[1:])) / self.network.config.patch_size**2}
        if self.peak:
            text = batch.get("input_ids", batch.get("text")).shape[1]
            flops = self.sample_flops.get(tuple(shape)) or self.sample_flops.setdefault(
                tuple(shape), sample_flops(outline(self.settings, self.base), shape, text)
            )
            work["seconds_at_peak"] = samples * flops / self.peak
        return work

    def describe(self, step: int) -> str:
        return self.data.describe(step)

    def optimizers(self) -> list[Optimizer]:
        optimizer = self.settings.optimizer
        return make_optimizers(
            trained_parameters(self.model),
            optimizer.name,
            lr=self.settings.stages[0].lr,
            weight_decay=optimizer.weight_decay,
            betas=optimizer.betas,
            decay_vectors=False,
            fused=True,
            muon=optimizer.muon,
            round_bf16=optimizer.half if optimizer.from_torchao else None,
        )

    def learning_rate(self, step: int) -> float:
        number, step = self.settings.stage_at(step)
        stage = self.settings.stages[number]
        hold = 1.0 if stage.decay == "constant" else 0.0
        decay = "linear" if stage.decay == "constant" else stage.decay
        return warmup_hold_decay(step, stage.lr, stage.warmup, hold, decay, stage.steps)

    def average(self, parameters: Sequence[nn.Parameter]) -> PowerAverages | None:
        run = self.settings.run
        if not run.ema:
            return None
        marks = snapshot_steps(self.starts, self.settings.total_steps, run.snapshots)
        return PowerAverages(parameters, run.ema, self.starts, self.snapshot, marks)

    def snapshot(self, step: int, width: float, averages: Sequence[Tensor]) -> None:
        """Write the averages of one width, for `ptdit average`."""
        if self.shared:
            averages = [whole(value) for value in averages]
        if self.accelerator.is_main_process:
            start = max(each for each in self.starts if each < step)
            values = dict(zip(trained_parameters(self.model), averages, strict=True))
            write_snapshot(self.settings.folder / SNAPSHOTS, step, start, width, values)

    def notes(self) -> dict[str, Any]:
        run = self.settings.folder / "run.json"
        if self.accelerator.is_main_process and run.is_file() and (bad := read_bad_shards(self.settings.folder)):
            update_run(run, {"bad_shards": bad})
        return {"own_data": plain(self.settings)}

    def errors(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean square error of the flow of each sample (B,)."""
        text, mask = self.texts[0].embed(batch)
        height, width = batch["latents"].shape[-2:]
        options = {
            **choose_windows(self.network, "auto", "auto", height, width),
            **size_conditions(self.network, height * 8, width * 8),
        }

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            return self.network.flow(self.network(noisy, text, timestep, mask, return_dict=False, **options)[0])

        return flow_matching(predict, batch["latents"], batch["noise"], batch["time"], batch.get("area"))

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        errors = self.errors(batch)
        numbers = {}
        if "quarters" in batch:
            by_time = batch["quarters"] @ errors.detach().float()
            numbers = {f"loss_quarter_{number + 1}": by_time[number] for number in range(QUARTERS)}
        return (errors * batch["weight"]).sum(), numbers

    def autocast(self) -> AbstractContextManager:
        """Return the context in which bf16 weights meet float32 latents; the loop has its own for the training."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.optimizer.half)

    # --- what is shown -----------------------------------------------------------------------------------------------

    def measured_loss(self, stage: int, numbers: Sequence[int]) -> float:
        """Return the mean error on samples, always with the same noise and times.

        Every process takes a share, or all of them where they run together.
        """
        data, settings = self.stages[stage], self.settings
        total, mine = torch.zeros((), device=self.device), range(len(numbers))
        by_bucket: dict[int, list[int]] = {}
        for place in mine[self.mine()]:
            by_bucket.setdefault(int(data.encoded.index["bucket"][numbers[place]]), []).append(place)
        for bucket, members in sorted(by_bucket.items()):
            times = settings.times.distribution(self.base.time_ratio(data.encoded.buckets[bucket]))
            for begin in range(0, len(members), TOGETHER):
                part = members[begin : begin + TOGETHER]
                means = torch.stack([data.encoded.latents(int(numbers[place]))[0] for place in part])
                noise = [
                    torch.randn(means[0].shape, generator=torch_generator(settings.seed, Stream.OWN_HELD_OUT, place))
                    for place in part
                ]
                shares = torch.tensor([(place + 0.5) / len(numbers) for place in part])
                lines = [data.encoded.caption_lines(int(numbers[place]))["captions"][0] for place in part]
                lines = [self.data.caption(text, place) for text, place in zip(lines, part, strict=True)]
                rows = self.texts[stage].rows(
                    lines, [int(data.encoded.index["text"][numbers[place]]) for place in part]
                )
                batch = {"latents": means * self.base.scaling_factor, "noise": torch.stack(noise)}
                batch |= {"time": shifted_times(shares, **times), **rows}
                if settings.data.alpha_mask:
                    batch["area"] = torch.stack([data.encoded.area(int(numbers[place])) for place in part])
                batch = {name: None if value is None else value.to(self.device) for name, value in batch.items()}
                total += self.errors(batch).sum()
        total = total if self.run_together else self.accelerator.reduce(total, "sum")
        return float(total) / max(1, len(numbers))

    def mine(self) -> slice:
        """Return which of several things this process does: a share of them, or all where they run together."""
        if self.run_together:
            return slice(None)
        return slice(self.accelerator.process_index, None, self.accelerator.num_processes)

    def held_out_losses(self, step: int) -> dict[str, float]:
        """Return the loss on samples that training never sees, and on as many that it sees."""
        stage, _ = self.settings.stage_at(max(0, step - 1))
        data = self.stages[stage]
        if not len(data.held_out):
            return {}
        hidden = spread(data.held_out)
        seen = spread(np.sort(np.concatenate(list(data.members.values()))))
        return {
            "held_out_loss": self.measured_loss(stage, hidden),
            "seen_loss": self.measured_loss(stage, seen),
        }

    def sheet_steps(self, last: int) -> Sequence[int]:
        return sorted({0, last})

    def sheet(self, path: Path, step: int) -> dict[str, float]:
        """Measure the held-out loss, and draw a picture of each prompt: picture i has the seed i."""
        with self.autocast():
            losses = self.held_out_losses(step)
        if step == 0 and losses and self.accelerator.is_main_process:
            logger.info("held-out loss of the start on these data: %.4f", losses["held_out_loss"])
        if losses and self.accelerator.is_main_process:
            first = step - self.settings.stage_at(max(0, step - 1))[1] - 1
            advice = "stop there, use more pictures, or train: lora"
            warn_of_learning_by_heart(self.settings.folder / "log.jsonl", losses, step, first, advice)
        prompts = self.settings.run.sheet
        if prompts:
            with self.autocast():
                self.draw(path, step, prompts)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                steps = sorted(int(each.stem.split("-")[1]) for each in path.parent.glob("step-*-0.png"))
                columns = {f"step {each}": step_name(each) for each in steps}
                write_sheet(path.parent, self.settings.folder / "sheet.png", columns, prompts)
        return losses

    @torch.no_grad()
    def draw(self, path: Path, step: int, prompts: Sequence[str]) -> None:
        """Draw this process's share of the pictures."""
        run, stage = self.settings.run, self.settings.stages[self.settings.stage_at(max(0, step - 1))[0]]
        vae = self.base.load_vae(gpu_dtype(self.device), self.device)
        parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "scheduler": self.base.scheduler}
        pipe = PTDiTPipeline(transformer=self.network, **parts)
        pipe.set_progress_bar_config(disable=True)
        pictures = []
        for index in range(len(prompts))[self.mine()]:
            result = pipe(
                prompt_embeds=self.texts[0].prompt(prompts[index]).to(self.device),
                negative_prompt_embeds=self.texts[0].prompt("").to(self.device) if run.guidance > 1 else None,
                height=stage.resolution,
                width=stage.resolution,
                **self.sheet_length(),
                num_inference_steps=run.steps,
                guidance_scale=run.guidance,
                generator=torch.Generator().manual_seed(index),
            )
            picture = self.one_picture(result)
            info = PngImagePlugin.PngInfo()
            for name, value in {"prompt": prompts[index], "seed": index, "step": step}.items():
                info.add_text(name, str(value))
            if self.accelerator.is_main_process or not self.run_together:
                with new_file(path.with_name(f"{path.name}-{index}.png")) as temporary:
                    picture.save(temporary, format="PNG", pnginfo=info)
            pictures.append(picture)
        track_pictures(self.accelerator, "sheet", pictures, step)
        del pipe, vae
        free_memory()

    def sheet_length(self) -> dict[str, int]:
        """Return the arguments of the pipeline for what the sheet shows."""
        data = self.settings.data
        kinds = {"pictures": {}, "clips": {"num_frames": data.num_frames}, "views": {"num_views": data.num_views}}
        return kinds[self.settings.run.sheet_kind]

    @staticmethod
    def one_picture(result: PTDiTPipelineOutput) -> Image.Image:
        """Return the picture of a result, or its views or every fourth frame side by side."""
        if result.images is not None:
            return result.images[0]
        return contact_sheet(result.views[0] if result.frames is None else result.frames[0][::4])

    def export(self, folder: Path) -> None:
        """Write the finished model, a whole pipeline folder."""
        self.export_step(folder, self.settings.total_steps)

    def export_step(self, folder: Path, step: int) -> None:
        """Write the model after a step, as `export`."""
        model = self.model
        if self.shared:  # all processes gather, one writes
            values = {name: whole(value) for name, value in trained_parameters(self.model).items()}
            if not self.accelerator.is_main_process:
                return
            model = make_networks(self.settings, self.base)
            load_trained(model, values)
        width = f"their average of width {self.settings.run.ema[0]}" if self.settings.run.ema else "as they are"
        text = card(self.settings, self.settings.folder.resolve().name, step, width)
        export_model(self.settings, self.base, model.eval(), folder, text)


def sample_flops(model: PTDiTTransformer3DModel, shape: Sequence[int], text: int) -> int:
    """Return the floating-point operations of one sample, forward and backward; what is recomputed does not count.

    Args:
        model: On the device "meta".
        shape: (C, F, H, W) of its latents.
        text: Tokens of its caption; other samples of the size count as much.
    """
    height, width = shape[-2:]
    options = {
        **choose_windows(model, "auto", "auto", height, width),
        **size_conditions(model, height * 8, width * 8),
    }
    caption = torch.zeros(1, text, model.config.caption_channels, device="meta")
    latents, time, mask = torch.zeros(1, *shape, device="meta"), torch.zeros(1, device="meta"), None
    return step_flops(lambda: model(latents, caption, time, mask, return_dict=False, **options)[0].sum())
