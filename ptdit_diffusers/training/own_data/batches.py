"""The samples of a step with their random numbers: pure functions of (seed, number), for any number of processes.

Letters: B samples, C latent channels, F H W latent frames, rows, columns.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ptdit_diffusers.training.base_model import BaseModel
from ptdit_diffusers.training.data.captions import CaptionChoices
from ptdit_diffusers.training.data.order import Order, places
from ptdit_diffusers.training.data.shards import BadShardError, Encoded, held_out, members_by_bucket, where
from ptdit_diffusers.training.objective import shifted_times
from ptdit_diffusers.training.own_data.settings import OwnDataSettings
from ptdit_diffusers.training.own_data.text import CachedText, OnlineText
from ptdit_diffusers.training.randomness import Stream, numpy_generator, torch_generator

logger = logging.getLogger(__name__)

QUARTERS = 4  # shares of the times, each with a loss of its own in the log
NAMED = 5  # samples named in a message
BAD_SHARDS = "bad_shards.jsonl"  # file in the folder of a run


class LostBucketError(Exception):
    """All shards of a bucket are bad."""


@dataclass
class StageData:
    """What a stage trains on, and what it never sees."""

    encoded: Encoded
    members: dict[int, np.ndarray]  # of every bucket
    held_out: np.ndarray  # numbers of samples
    order: Order


def stage_data(settings: OwnDataSettings, versions: Sequence[Path]) -> list[StageData]:
    """Return the data of every stage.

    Args:
        settings: Of the run.
        versions: Of the encoded data, of each stage.

    Raises:
        ValueError: A stage has no samples.
    """
    found = []
    for number, (stage, version) in enumerate(zip(settings.stages, versions, strict=True)):
        encoded = Encoded(version, stage.resolution)
        hidden = held_out(encoded.index["group"], settings.data.validation, settings.seed)
        members = members_by_bucket(encoded.index, where(encoded.index, stage.where) & ~hidden)
        try:
            order = Order(members, encoded.index["shard"], (settings.seed, number), stage.batch)
        except ValueError as error:
            raise ValueError(f"stage {number + 1} of resolution {stage.resolution}: {error}") from error
        found.append(StageData(encoded, members, np.flatnonzero(hidden), order))
    return found


class OwnBatches(Dataset):
    """One process's part of every batch, by the number of the micro-batch; it holds no model that is trained."""

    def __init__(
        self,
        settings: OwnDataSettings,
        base: BaseModel,
        stages: list[StageData],
        texts: Sequence[OnlineText | CachedText],
        rank: int,
        processes: int,
    ) -> None:
        """Read which shards were found to be bad before.

        Raises:
            ValueError: A batch has fewer samples than there are processes times accumulation.
        """
        self.settings, self.stages, self.texts, self.rank = settings, stages, texts, rank
        self.choices = CaptionChoices.of(settings.data)
        self.scaling, self.ratio = base.scaling_factor, base.time_ratio
        self.parts = settings.run.accumulation * processes
        for number, stage in enumerate(settings.stages):
            if stage.batch < self.parts:
                raise ValueError(
                    f"stages[{number}].batch={stage.batch} is less than {processes} processes x accumulation="
                    f"{settings.run.accumulation}; nearest: {self.parts}."
                )
        self.bad = {line["shard"] for line in read_bad_shards(settings.folder)}

    def place_of(self, index: int) -> tuple[int, int, int]:
        """Return stage, step within the stage, and part of the batch that a micro-batch is."""
        step, micro = divmod(index, self.settings.run.accumulation)
        stage, step = self.settings.stage_at(step)
        processes = self.parts // self.settings.run.accumulation
        return stage, step, micro * processes + self.rank

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return latents and noise (B, C, F, H, W), time (B,), text, and weights that make the sum of all processes'
        losses the mean over the whole batch: `weight` (), and `quarters` (QUARTERS, B) for shares of the times. Where
        transparency is a mask, also `area` (B, 1, F, H, W), the weight of each place.
        """
        stage, step, part = self.place_of(index)
        data, batch, seed = self.stages[stage], self.settings.stages[stage].batch, self.settings.seed
        mine = places(batch, part, self.parts)
        order = numpy_generator(seed, Stream.OWN_TIMES, stage, step).permutation(batch)  # spreads the times evenly
        bucket, rows = self.rows(stage, step, mine)
        mine = order[mine.start : mine.stop]
        shares = torch.tensor((mine + np.array([row.pop("share") for row in rows])) / batch, dtype=torch.float32)
        captions, numbers = ([row.pop(name) for row in rows] for name in ("caption", "number"))
        text = self.texts[stage].rows(captions, numbers)
        quarter, counts = mine * QUARTERS // batch, np.bincount(order * QUARTERS // batch, minlength=QUARTERS)
        if batch >= QUARTERS:  # a smaller batch has no sample in some of them
            quarters = (np.arange(QUARTERS)[:, None] == quarter) * (self.parts / counts)[:, None]
            text["quarters"] = torch.tensor(quarters, dtype=torch.float32)
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        frames, height, width = data.encoded.buckets[bucket]
        return {
            **tensors,
            "time": shifted_times(shares, **self.settings.times.distribution(self.ratio((frames, height, width)))),
            "weight": torch.tensor(self.parts / batch),
            **text,
        }

    def rows(self, stage: int, step: int, mine: range) -> tuple[int, list[dict[str, Any]]]:
        """Return the bucket of a step, and its samples at these places; of another bucket where all of it is bad.

        Raises:
            OSError: No shard can be read any more.
        """
        data, first = self.stages[stage], step * self.settings.stages[stage].batch
        wanted, begin = data.order.bucket(step)
        names = sorted(data.order.streams)
        for bucket in names[names.index(wanted) :] + names[: names.index(wanted)]:
            members = data.order.streams[bucket].take(begin + mine.start, len(mine))
            try:
                pairs = zip(mine, members, strict=True)
                return bucket, [self.row(stage, first + place, int(member), bucket) for place, member in pairs]
            except LostBucketError:
                continue
        raise OSError(f"no shard of {data.encoded.version} can be read any more; encode the data again")

    def row(self, stage: int, number: int, member: int, bucket: int) -> dict[str, Any]:
        """Return one sample: `number` counts the samples of the stage and seeds all that is random about it."""
        settings, data = self.settings.data, self.stages[stage]
        seeds = (self.settings.seed, Stream.OWN_SAMPLE, stage, number)
        choice, generator = numpy_generator(*seeds), torch_generator(*seeds)
        mirrored = settings.flip and choice.random() < 0.5
        dropped, share = choice.random() < settings.caption_dropout, choice.random()
        which = mirrored, int(choice.integers(settings.crops)) if settings.crops > 1 else 0
        member, mean, std = self.latents(data, member, bucket, *which)
        area = {"area": data.encoded.area(member, *which)} if settings.alpha_mask else {}
        line = data.encoded.caption_lines(member)
        weights = np.array(line["weights"])
        form = int(choice.choice(len(weights), p=weights / weights.sum())) if weights.sum() else 0
        return {
            "latents": (mean + std * torch.randn(mean.shape, generator=generator)) * self.scaling,
            "noise": torch.randn(mean.shape, generator=generator),
            "share": share,
            "caption": "" if dropped else self.caption(line["captions"][form], stage, number),
            "number": -1 if dropped else int(data.encoded.index["text"][member]) + form,
            **area,
        }

    def caption(self, text: str, *seeds: int) -> str:
        """Return a caption with everything chosen that may be chosen in it."""
        if not self.choices:
            return text
        return self.choices.draw(text, numpy_generator(self.settings.seed, Stream.CAPTION, *seeds))

    def latents(
        self, data: StageData, member: int, bucket: int, mirrored: bool, crop: int
    ) -> tuple[int, Tensor, Tensor]:
        """Return a sample with its latents; in place of one whose shard is bad, the next one of a good shard.

        The choice depends on nothing but the sample and the bad shards, so all processes agree without a message.

        Raises:
            LostBucketError: No shard of the bucket can be read.
        """
        members, encoded = data.members[bucket], data.encoded
        begin = int(np.flatnonzero(members == member)[0]) if self.bad else 0
        for step in range(len(members)):
            tried = member if step == 0 else int(members[(begin + step) % len(members)])
            shard = int(encoded.index["shard"][tried])
            if self.name_of(encoded, shard) in self.bad:
                continue
            try:
                return (tried, *encoded.latents(tried, mirrored, crop))
            except BadShardError as error:
                self.note_bad(encoded, shard, str(error))
                begin = int(np.flatnonzero(members == member)[0])
        raise LostBucketError

    @staticmethod
    def name_of(encoded: Encoded, shard: int) -> str:
        """Return a name of a shard that is the same in every process."""
        return "/".join(encoded.shards[shard][:2])

    def note_bad(self, encoded: Encoded, shard: int, reason: str) -> None:
        """Remember a bad shard, also for a resume of the run."""
        name = self.name_of(encoded, shard)
        count = int((encoded.index["shard"] == shard).sum())
        logger.warning("%s: its %d samples are replaced by others of the same size", reason, count)
        self.bad.add(name)
        line = json.dumps({"shard": name, "samples": count, "reason": reason}) + "\n"
        file = os.open(self.settings.folder / BAD_SHARDS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, line.encode())  # in one piece: other processes write, too
        finally:
            os.close(file)

    def describe(self, step: int) -> str:
        """Return the names of the first samples of a step."""
        stage, step = self.settings.stage_at(step)
        data = self.stages[stage]
        _, members = data.order.members(step)
        names = [data.encoded.caption_lines(int(member))["name"] for member in members[:NAMED]]
        return ", ".join(names) + (", ..." if len(members) > NAMED else "")


def read_bad_shards(folder: Path) -> list[dict[str, Any]]:
    """Return which shards a run found to be bad, each once."""
    path = folder / BAD_SHARDS
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return list({line["shard"]: line for line in lines}.values())
