"""The samples of batch n and its random numbers: pure functions of (seed, n).

So a run can stop and resume anywhere, and the global batch does not depend on the number of processes.
Letters: B samples, C latent channels, F H W latent frames, rows, columns, L text tokens, D text width.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ptdit_diffusers.pipelines.ptdit_text import join_text
from ptdit_diffusers.training.data.order import places
from ptdit_diffusers.training.held_out import TOGETHER
from ptdit_diffusers.training.objective import sample_times, shifted_times
from ptdit_diffusers.training.randomness import Stream, mix, numpy_generator, torch_generator
from ptdit_diffusers.training.times import Times

from .cache import MIRRORED, Cache
from .config import LoRASettings
from .samples import Sample


class Plan:
    """Order of the samples: an epoch goes through all of them `repeats` times, and every batch is of one bucket.

    A bucket that does not fill its last batch is repeated from its start, so that no sample is left out.
    """

    def __init__(self, samples: list[Sample], settings: LoRASettings, global_batch: int) -> None:
        self.seed, self.global_batch = settings.seed, global_batch
        self.buckets: dict[tuple[int, int, int], list[int]] = {}
        sets = settings.data_sets()
        for index, sample in enumerate(samples):
            times = settings.prior_repeats if sample.prior else sets[sample.data_set].repeats
            if not sample.held_out:
                self.buckets.setdefault(sample.bucket, []).extend([index] * times)
        self.per_epoch = sum(math.ceil(len(members) / global_batch) for members in self.buckets.values())
        self.epoch, self.order = -1, []

    def batch(self, number: int) -> list[int]:
        """Return the indices of the samples in global batch `number`."""
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self._shuffled(epoch)
        return self.order[place]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        choice, batches = numpy_generator(self.seed, Stream.LORA_ORDER, epoch), []
        for _, members in sorted(self.buckets.items()):
            order = [members[i] for i in choice.permutation(len(members))]
            size = math.ceil(len(order) / self.global_batch) * self.global_batch
            order = (order * math.ceil(size / len(order)))[:size]
            batches += [order[i : i + self.global_batch] for i in range(0, size, self.global_batch)]
        return [batches[i] for i in choice.permutation(len(batches))]


class CachedBatches(Dataset):
    """One process's part of every batch, by the number of the batch; it reads the cache and holds no model."""

    def __init__(self, cache: Cache, settings: LoRASettings, rank: int, processes: int, global_batch: int = 0) -> None:
        """Plan the batches.

        Args:
            cache: Filled.
            settings: Of the run.
            rank, processes: Which part of every batch this is, of how many.
            global_batch: Samples of a batch, of all processes together; 0 = `batch_size` for each of them. A run that
                began with another number of processes keeps its batches.
        """
        self.cache, self.settings, self.sets = cache, settings, settings.data_sets()
        self.samples = cache.samples
        self.masked = any(each.alpha_mask for each in self.sets)
        self.plan = Plan(self.samples, settings, global_batch or settings.batch_size * processes)
        self.places = places(self.plan.global_batch, rank, processes)
        self.share = len(self.places) * processes / self.plan.global_batch  # parts may differ in size
        self.scaling = cache.base.scaling_factor

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return latents and noise (B, C, F, H, W), time (B,) in 0..1, text as `joined_texts`,
        weight (B,), with which the mean over all processes is that of the whole batch, and a seed per sample for
        random proxies. Where transparency is a mask, also
        `area` (B, 1, F, H, W), the weight of each place.
        """
        members = self.plan.batch(number)
        rows = [self._row(self.samples[members[place]], number, place) for place in self.places]
        texts = joined_texts([row.pop("text") for row in rows])
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        seeds = [mix(self.settings.seed, Stream.LORA_PROXIES, number, place) for place in self.places]
        return {**batch, **texts, "seeds": seeds}

    def _row(self, sample: Sample, number: int, place: int) -> dict[str, Tensor]:
        settings = self.settings if sample.prior else self.sets[sample.data_set]
        seeds = self.settings.seed, Stream.LORA_SAMPLE, number, place
        choice, generator = numpy_generator(*seeds), torch_generator(*seeds)
        mirrored = sample.mirrored and choice.random() < 0.5
        dropped = choice.random() < settings.caption_dropout
        texts = (sample.text, *sample.more_texts)
        text = texts[choice.integers(len(texts))] if sample.more_texts else sample.text
        crops = (sample.latents, *sample.more_latents)
        key = crops[choice.integers(len(crops))] if sample.more_latents else sample.latents
        key += MIRRORED if mirrored else ""
        mean, std = self.cache.get(key, "mean"), self.cache.get(key, "std")
        latents = (mean + std * torch.randn(mean.shape, generator=generator)) * self.scaling
        time = sample_times(
            (), generator, **Times.of(settings).distribution(self.cache.base.time_ratio(sample.bucket))
        )
        area = {"area": area_of(self.cache, sample, key, settings)} if self.masked else {}
        return {
            "latents": latents,
            "noise": torch.randn(mean.shape, generator=generator),
            "time": time,
            "text": self.cache.read_text(self.cache.text_key("") if dropped else text),
            "weight": torch.tensor((settings.prior_weight if sample.prior or settings.is_reg else 1.0) * self.share),
            **area,
        }


def joined_texts(texts: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """Return texts of a cache as a batch.

    Args:
        texts: Embeddings (L, D) or token ids (L,), of different lengths.

    Returns:
        `text` (B, L, D), or `ids` (B, L) for the text encoder, with `mask` (B, L), true where a token counts, or None
        where all do.
    """
    if texts[0].ndim == 2:
        text, mask = join_text([each[None] for each in texts], [None] * len(texts))
        return {"text": text, "mask": mask}
    mask = pad_sequence([torch.ones_like(each, dtype=torch.bool) for each in texts], batch_first=True)
    return {"ids": pad_sequence(list(texts), batch_first=True), "mask": None if bool(mask.all()) else mask}


def area_of(cache: Cache, sample: Sample, key: str, settings: LoRASettings) -> Tensor:
    """Return the weight (1, F, H, W) of each place of a sample: its opacity where that is a mask, else 1."""
    if settings.alpha_mask and not sample.prior:
        return cache.get(key, "area")
    return torch.ones_like(cache.get(key, "mean")[:1])


def fixed_batches(cache: Cache, settings: LoRASettings, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield samples, by their numbers, always with the same noise and with times that are spread evenly.

    Latents are the means; batches are of one bucket, with the entries of `CachedBatches` but for weights.
    """
    by_bucket: dict[tuple[int, int, int], list[int]] = {}
    sets = settings.data_sets()
    masked = any(each.alpha_mask for each in sets)
    for place, number in enumerate(numbers):
        by_bucket.setdefault(cache.samples[number].bucket, []).append(place)
    for bucket, places_in in sorted(by_bucket.items()):
        times = Times.of(settings).distribution(cache.base.time_ratio(bucket))
        for begin in range(0, len(places_in), TOGETHER):
            part = places_in[begin : begin + TOGETHER]
            samples = [cache.samples[numbers[place]] for place in part]
            means = [cache.get(sample.latents, "mean") for sample in samples]
            seeds = [mix(settings.seed, Stream.LORA_HELD_OUT, place) for place in part]
            noise = [torch.randn(means[0].shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            shares = torch.tensor([(place + 0.5) / len(numbers) for place in part])
            texts = joined_texts([cache.read_text(sample.text) for sample in samples])
            areas = [area_of(cache, sample, sample.latents, sets[sample.data_set]) for sample in samples if masked]
            yield {
                "latents": torch.stack(means) * cache.base.scaling_factor,
                "noise": torch.stack(noise),
                "time": shifted_times(shares, **times),
                **texts,
                "seeds": seeds,
                **({"area": torch.stack(areas)} if masked else {}),
            }


def describe_epoch(batches: CachedBatches) -> str:
    """Return one line: samples and batches of an epoch."""
    filled = {bucket: len(members) for bucket, members in batches.plan.buckets.items()}
    again = sum(-number % batches.plan.global_batch for number in filled.values())
    plan = batches.plan
    held_out = sum(sample.held_out for sample in batches.samples)
    line = f"{sum(filled.values())} samples per epoch in {plan.per_epoch} batches of {plan.global_batch}"
    line += f"; {held_out} held out" if held_out else ""
    return line + (f"; {again} of them twice, to fill the last batch of a bucket" if again else "")
