"""The command `ptdit` in one of several processes, of which the second has a fault that the variable FAULT names."""

import os
import signal
import sys
from typing import Any

import torch

from ptdit_diffusers import cli
from ptdit_diffusers.commands import generate, loading
from ptdit_diffusers.commands.terminal import UserError


def cannot_load(plan: Any) -> None:
    raise UserError("the model cannot be loaded here")


def load_faulty(plan: Any) -> Any:
    """Load the model with a layer that fails, in the middle of a forward, while others wait for this device."""
    pipe = loading.load_rest(plan)
    fault = os.environ["FAULT"]

    def fail(*_: Any) -> None:
        if fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        os.kill(os.getpid(), signal.SIGKILL)

    if fault == "NaN":
        torch.nn.init.constant_(pipe.transformer.transformer_blocks[1].ff.net[2].bias, torch.nan)
    elif fault in ("memory", "kill"):
        pipe.transformer.transformer_blocks[1].ff.register_forward_hook(fail)
    return pipe


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        generate.load_rest = cannot_load if os.environ["FAULT"] == "load" else load_faulty
        if os.environ["FAULT"] == "prompt":
            sys.argv[2] = "a blue square"
    sys.exit(cli.main())
