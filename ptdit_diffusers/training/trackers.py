"""TensorBoard, Weights & Biases and trackio, through accelerate's trackers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

TRACKERS = ("tensorboard", "wandb", "trackio")


def begin_tracking(accelerator: Accelerator, folder: Path, project: str = "ptdit-lora") -> None:
    """Open the trackers that the accelerator was made with (`log_with`), for a run in `folder`.

    TensorBoard's files go to `folder`/tensorboard: accelerate puts them below its `project_dir` under the name of the
    project.
    """
    names, run = [str(tracker) for tracker in accelerator.log_with], {"name": folder.resolve().name}
    project = "tensorboard" if "tensorboard" in names else project
    accelerator.init_trackers(project, init_kwargs={"wandb": {**run, "dir": str(folder)}, "trackio": run})


def track_pictures(accelerator: Accelerator, name: str, pictures: Sequence[Image.Image], step: int) -> None:
    """Log pictures of a step with every tracker."""
    arrays = [np.asarray(picture) for picture in pictures]
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":  # one series per picture, of batches (1, H, W, 3)
            batches = {f"{name}/{index}": array[None] for index, array in enumerate(arrays)}
            tracker.log_images(batches, step=step, dataformats="NHWC")
        elif tracker.name == "trackio":  # accelerate's tracker has no pictures
            from trackio import Image as Logged

            tracker.log({f"{name}/{index}": Logged(array) for index, array in enumerate(arrays)}, step=step)
        else:
            tracker.log_images({name: arrays}, step=step)
