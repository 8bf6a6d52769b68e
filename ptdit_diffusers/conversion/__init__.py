"""From official checkpoint files to a diffusers folder; `folder.convert` does it.

`keys` knows names of weights, `containers` reads files, `networks` infers configurations and checks them, `text` does
so for T5, `writing` writes weights, `folder` puts it together. Nothing here knows the command line or the pipeline.
"""
