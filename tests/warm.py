"""What the process is made to know from which tests fork: modules of ours, the fonts of plots, names of weights.

A fork then begins to work at once. Nothing here computes with tensors: threads would not survive the fork. Modules
that tests run with `-m` are not among them: Python warns of those that are there already.
"""

import tempfile
from contextlib import suppress
from pathlib import Path

import lora.precompute  # noqa: F401
import lora.task  # noqa: F401
import ptdit_diffusers.commands.generate  # noqa: F401
import ptdit_diffusers.pipelines.pipeline_ptdit  # noqa: F401
import ptdit_diffusers.training.own_data.prepare  # noqa: F401
import ptdit_diffusers.training.own_data.task  # noqa: F401
from ptdit_diffusers.training.record import append_log, plot_curve

with tempfile.TemporaryDirectory() as folder:
    append_log(Path(folder, "log.jsonl"), {"step": 1, "loss": 1.0, "lr": 1.0})
    plot_curve(Path(folder, "log.jsonl"), Path(folder, "loss.png"))

with suppress(ImportError):  # a table that is made at the first load of a model
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("t5")
