"""`lora.train` under FSDP2 on the CPU, where accelerate by itself does not share weights."""

from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from lora.train import main

begin = AcceleratorState.__init__


def begin_sharded(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    """accelerate's own beginning, then what it does at this point on GPUs."""
    first = not self.initialized
    begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if first:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


AcceleratorState.__init__ = begin_sharded

if __name__ == "__main__":
    raise SystemExit(main())
