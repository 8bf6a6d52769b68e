"""The teacher's paths: its guided ODE from noise to latents, cut into segments whose ends are stored.

Path i is a function of (teacher, settings, seed, i) and its caption. Files hold CHUNK paths each and are complete or
absent, so a stopped run goes on where it was; `paths.json` beside them says what made them.
Letters: N paths, S segments of a path, C latent channels, F H W latent frames, rows, columns, L text tokens.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import free_memory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ptdit_diffusers.core.documents import read_mapping
from ptdit_diffusers.core.files import replace_json
from ptdit_diffusers.core.sampling import choose_windows
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.training.base_model import BaseModel
from ptdit_diffusers.training.latents import write_tensors
from ptdit_diffusers.training.randomness import Stream, torch_generator
from ptdit_diffusers.training.record import human_time

from .cache import Cache
from .distill_config import DistillSettings

logger = logging.getLogger("lora")

CHUNK = 64  # paths in a file
FACTS = "paths.json"
WORDS = {  # what made paths, in words
    "transformer": "the weights or the configuration of the transformer",
    "scheduler": "the scheduler, whose shift sets the times",
    "text": "the text encoder or tokenizer",
    "windows": "the windows and proxies",
    "times": "the times",
}


class Paths:
    """The folder of the paths of one teacher under one set of settings.

    Attributes:
        captions: Of each path.
        times: Noise levels (S + 1,) from 1 down to 0 of the stored states, as the sampler has them.
    """

    def __init__(self, base: BaseModel, settings: DistillSettings, prompts: Sequence[str]) -> None:
        """Look at what the folder has.

        Raises:
            ValueError: It holds paths of another teacher or of other settings or captions; says what differs.
        """
        self.base, self.settings, self.folder = base, settings, settings.paths_folder
        self.captions = [prompts[index % len(prompts)] for index in range(settings.paths)]
        self.side = settings.resolution or base.own_resolution
        self.times = noise_levels(base, settings.points, self.side, settings.num_frames)
        self.facts = path_facts(base, settings, self.side, self.times)
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode())
        self.maker = digest.hexdigest()[:16]
        self.cache = Cache(self.folder / "text", base)
        self.files: dict[str, Any] = {}
        self.refuse_others()

    @property
    def chunks(self) -> list[range]:
        """Return which paths each file holds."""
        count = self.settings.paths
        return [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]

    def file(self, chunk: range) -> Path:
        """Return the file of a chunk."""
        return self.folder / f"paths-{chunk.start:08d}-{chunk.stop:08d}.safetensors"

    def refuse_others(self) -> None:
        """Raise ValueError where the folder holds paths that this run would not make."""
        path = self.folder / FACTS
        if not path.is_file():
            return
        made = read_mapping(path)
        if made == self.facts:
            return
        changed = [
            f"{WORDS[name]} changed" if name in WORDS else f"{name} was {made.get(name)!r}, is {value!r}"
            for name, value in self.facts.items()
            if made.get(name) != value
        ]
        raise ValueError(
            f"paths_dir {self.folder} holds paths of another teacher or of other settings: {'; '.join(changed)}. "
            "Put that back, or give another paths_dir."
        )

    def missing(self) -> list[range]:
        """Return the chunks that the folder lacks; a damaged file counts as lacking.

        Raises:
            ValueError: A file holds paths of other captions, or comes from another folder.
        """
        return [chunk for chunk in self.chunks if not self._has(chunk)]

    def _has(self, chunk: range) -> bool:
        path = self.file(chunk)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                shape = file.get_slice("states").get_shape()
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged and will be made again (%s)", path, error)
            return False
        if metadata["maker"] != self.maker:
            raise ValueError(f"{path} was made by another teacher or with other settings; remove it.")
        for index, made, asked in zip(
            chunk, json.loads(metadata["captions"]), self.captions[chunk.start : chunk.stop], strict=True
        ):
            if made != asked:
                raise ValueError(
                    f"path {index} in {self.folder} was made for the caption {made!r}, it is {asked!r} now; give the "
                    "prompts of before, or another paths_dir."
                )
        return shape[0] == len(chunk)

    def noise(self, index: int) -> Tensor:
        """Return the noise (C, F, H, W) in which a path begins."""
        channels = self.base.transformer_config["in_channels"]
        shape = channels, (self.settings.num_frames - 1) // 4 + 1, self.side // 8, self.side // 8
        return torch.randn(shape, generator=torch_generator(self.settings.seed, Stream.PATH_NOISE, index))

    def text(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return embeddings (N, L, D) of the captions of some paths, and their mask (N, L); L is always the same."""
        return pad_text([self.cache.text(self.captions[index]) for index in indices], self.tokens)

    @property
    def tokens(self) -> int:
        """Tokens of the longest caption; all are padded to it, so that a compiled network sees one shape."""
        if not hasattr(self, "_tokens"):
            self._tokens = max(len(self.cache.text(caption)) for caption in ("", *dict.fromkeys(self.captions)))
        return self._tokens

    def make(self, transformer: PTDiTTransformer3DModel, chunks: Sequence[range], device: torch.device) -> None:
        """Let the teacher make the paths of these chunks.

        Args:
            transformer: The teacher, on the device.
            chunks: From `missing`.
            device: Where the captions go.

        Raises:
            OSError: A file could not be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_json(self.folder / FACTS, self.facts)
        pipe = sampler(transformer, self.base)
        started, done, total = time.monotonic(), 0, sum(map(len, chunks))
        for chunk in chunks:
            size = self.settings.path_batch
            parts = [chunk[first : first + size] for first in range(0, len(chunk), size)]
            states = torch.cat([self._make(pipe, part, device) for part in parts])
            captions = json.dumps(self.captions[chunk.start : chunk.stop])
            write_tensors(self.file(chunk), {"states": states}, {"maker": self.maker, "captions": captions})
            done, spent = done + len(chunk), time.monotonic() - started
            left = human_time((total - done) * spent / done)
            logger.info("%d of %d paths, %.3g per minute, left %s", done, total, 60 * done / spent, left)
            if 0 < self.settings.max_minutes * 60 <= spent:
                return

    def _make(self, pipe: PTDiTPipeline, indices: Sequence[int], device: torch.device) -> Tensor:
        """Return the states (N, S + 1, C, F, H, W) of some paths, float16."""
        settings = self.settings
        noise = torch.stack([self.noise(index) for index in indices])
        text, mask = (each.to(device) for each in self.text(indices))
        options: dict[str, Any] = {}
        if settings.guidance > 1:
            empty, its_mask = (each.to(device) for each in pad_text([self.cache.text("")], self.tokens))
            options["negative_prompt_embeds"] = empty.expand_as(text)
            options["negative_prompt_attention_mask"] = its_mask.expand_as(mask)
        states, every = [noise], settings.teacher_steps // settings.points

        def note(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if (step + 1) % every == 0:
                states.append(tensors["latents"].cpu())
            return {}

        pipe(
            prompt_embeds=text,
            prompt_attention_mask=mask,
            **options,
            latents=noise,
            height=self.side,
            width=self.side,
            num_frames=settings.num_frames,
            num_inference_steps=settings.teacher_steps,
            guidance_scale=settings.guidance,
            callback_on_step_end=note,
            callback_on_step_end_tensor_inputs=["latents"],
            output_type="latent",
        )
        return torch.stack(states, dim=1).half()

    def states(self, index: int, places: Sequence[int]) -> Tensor:
        """Return states (len(places), C, F, H, W) of a path, float32; place p has the noise level `times[p]`.

        Raises:
            OSError: The file cannot be read any more.
        """
        chunk = self.chunk_of(index)
        path = self.file(chunk)
        try:
            if path.name not in self.files:
                self.files[path.name] = safe_open(path, framework="pt").__enter__().get_slice("states")
            rows = self.files[path.name][index - chunk.start : index - chunk.start + 1]
        except (SafetensorError, FileNotFoundError) as error:
            raise OSError(f"{path} cannot be read any more ({error}); remove it, it is made again.") from error
        return rows[0, list(places)].float()

    def chunk_of(self, index: int) -> range:
        """Return the chunk that holds a path."""
        start = index // CHUNK * CHUNK
        return range(start, min(start + CHUNK, self.settings.paths))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}  # worker processes open the files themselves


def pad_text(embeds: Sequence[Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """Return embeddings (L_i, D) as one tensor (N, tokens, D), and its mask (N, tokens), true where a token counts."""
    text = torch.stack([torch.nn.functional.pad(each.float(), (0, 0, 0, tokens - len(each))) for each in embeds])
    lengths = torch.tensor([len(each) for each in embeds])
    return text, torch.arange(tokens)[None] < lengths[:, None]


def sampler(transformer: PTDiTTransformer3DModel, base: BaseModel) -> PTDiTPipeline:
    """Return a pipeline that makes latents of embeddings."""
    parts = {"transformer": transformer, "scheduler": base.scheduler}
    pipe = PTDiTPipeline(tokenizer=None, text_encoder=None, vae=None, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def outline(base: BaseModel) -> PTDiTTransformer3DModel:
    """Return a tiny transformer with the base's windows and patches, for questions about sizes and times."""
    tiny = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 16, "caption_channels": 8}
    return PTDiTTransformer3DModel.from_config({**base.transformer_config, **tiny})


def noise_levels(base: BaseModel, steps: int, side: int, num_frames: int) -> list[float]:
    """Return the noise levels (steps + 1) of a call of so many steps, from 1 down to 0.

    Args:
        base: Has scheduler and patch size.
        steps: Of the call.
        side: Of the pictures, pixels.
        num_frames: Of a video, or 1.
    """
    pipe = sampler(outline(base), base)
    pipe.prepare_timesteps(steps, None, side, side, num_frames)
    return [float(level) for level in pipe.scheduler.sigmas]


def path_facts(base: BaseModel, settings: DistillSettings, side: int, times: list[float]) -> dict[str, Any]:
    """Return everything that paths depend on besides their captions, as plain values."""
    windows = choose_windows(outline(base), "auto", "auto", side // 8, side // 8)
    return {
        "transformer": base.fingerprint("transformer"),
        "scheduler": base.fingerprint("scheduler"),
        "text": base.fingerprint("text_encoder", "tokenizer"),
        "windows": {name: list(value) for name, value in windows.items()}
        | {"shift": base.transformer_config["shift_window"]},
        "times": [round(level, 6) for level in times],
        "guidance": settings.guidance,
        "teacher_steps": settings.teacher_steps,
        "points": settings.points,
        "resolution": side,
        "num_frames": settings.num_frames,
        "seed": settings.seed,
    }


def check_grid(base: BaseModel, settings: DistillSettings, side: int) -> None:
    """Check that the student's steps begin and end where stored states are.

    Raises:
        ValueError: They do not: the scheduler spaces few steps in another way than many.
    """
    fine = noise_levels(base, settings.points, side, settings.num_frames)[:: settings.points // settings.steps]
    coarse = noise_levels(base, settings.steps, side, settings.num_frames)
    if any(abs(one - two) > 1e-4 for one, two in zip(fine, coarse, strict=True)):
        shown = ["/".join(f"{level:.4f}" for level in levels) for levels in (coarse, fine)]
        raise ValueError(
            f"the scheduler of base {base.name!r} samples {settings.steps} steps at the levels {shown[0]}, but states "
            f"on the teacher's paths are at {shown[1]}; use a scheduler without shift_terminal or other spacings."
        )


def make_missing(paths: Paths, settings: DistillSettings, chunks: Sequence[range], dtype: torch.dtype,
                 device: torch.device) -> None:  # fmt: skip
    """Load the teacher and let it make the paths of these chunks."""
    transformer = paths.base.load_transformer(dtype, settings.base_weights, device).eval()
    transformer.set_windows(proxy_mode="mean")
    if settings.base_weights == "none":
        transformer.fuse_linear_layers()
    if settings.compile:
        transformer.compile_repeated_blocks()  # captions differ in length
    with torch.no_grad():
        paths.make(transformer, chunks, device)
    del transformer
    free_memory()
