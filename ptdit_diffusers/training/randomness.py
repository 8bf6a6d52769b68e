"""Random numbers as pure functions of integers, so that a run can stop and resume anywhere."""

from enum import IntEnum

import numpy as np
import torch

HELD_OUT_SEED = 2**31  # of what training never sees: apart from every training seed


class Stream(IntEnum):
    """What random numbers are for: the number that follows the seed of a run.

    The values are those of runs that were made earlier, so that these can be repeated. Kinds of runs that never share
    a seed (a LoRA, the stages of an embedded model) may share values.
    """

    # a LoRA
    LORA_ORDER = 1  # of the samples of an epoch
    LORA_SAMPLE = 2  # latents, noise, time, mirroring and dropped captions
    LORA_PROXIES = 3
    LORA_DROPOUT = 4
    LORA_HELD_OUT = 30  # noise of the held-out loss
    # a student of few steps
    PATH_NOISE = 5  # from which a path of the teacher starts
    PATH_ORDER = 6  # of the paths of an epoch
    PATH_PLACE = 7  # on a path: segments, and points in them
    FEW_STEPS = 8  # what stages draw besides
    # a training on one's own data
    OWN_MEMBERS = 20  # order of the samples of a bucket
    OWN_BATCHES = 21  # order of the buckets of an epoch
    OWN_SAMPLE = 22  # latents, noise, caption, mirroring
    OWN_TIMES = 23  # of a batch
    OWN_HELD_OUT = 24  # noise and times of the held-out loss
    OWN_TEXT = 25  # words that are masked
    OWN_VAE = 26  # crops
    # both of these
    CAPTION = 32  # orders of tags, and wildcards
    CROP = 33  # places of crops
    # stage "text"
    TEXT_POOL = 0  # scenes
    TEXT_BATCH = 1
    TEXT_IDLE_WORDS = 2
    # stages "transformer", "dit" and "diffit"
    PART = 6  # which part of the data a step takes
    SAMPLES = 7  # and their captions
    NOISE = 8  # and times
    SHEET = 9
    HELD_OUT_NOISE = 10
    # stages "vae" and "decoder"
    VAE_SCALE = 998  # pictures that the scaling factor is measured on
    VAE_SHEET = 999


def numpy_generator(*seeds: int) -> np.random.Generator:
    """Return a generator for the non-negative integers given, for example (seed, rank, step)."""
    return np.random.default_rng(seeds)


def torch_generator(*seeds: int) -> torch.Generator:
    """Return a CPU generator for the non-negative integers given, for example (seed, rank, step)."""
    return torch.Generator().manual_seed(mix(*seeds))


def mix(*seeds: int) -> int:
    """Return one 63-bit seed made of several, without the collisions of sums."""
    return int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1)
