"""From official checkpoint files to a diffusers folder; `folder.convert` does it.

`containers` reads files, `networks` opens transformer and VAE and checks them, `text` does so for T5, `hub` fetches
what is not on this machine, `writing` writes weights, `folder` puts it together. `single_file` loads checkpoint files
without a folder, `quantize` makes smaller copies. Names of weights and configurations are those of `core`.
"""

import diffusers  # noqa: F401 (first of all: the import hook then registers our classes, for which it imports this folder)
