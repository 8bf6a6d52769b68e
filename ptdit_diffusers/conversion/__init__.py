"""From official checkpoint files to a diffusers folder; `folder.convert` does it.

`keys` knows names of weights, `containers` reads files, `networks` infers configurations and checks them, `text` does
so for T5, `hub` fetches what is not on this machine, `writing` writes weights, `folder` puts it together. `quantize`
makes smaller copies. Nothing here knows the command line or the pipeline.
"""

import diffusers  # noqa: F401 (first of all: the import hook then registers our classes, for which it imports this folder)
