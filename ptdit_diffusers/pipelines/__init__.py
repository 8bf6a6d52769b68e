"""Text to image, video and views, image to image and inpainting, as pipelines and as modular blocks."""

import diffusers  # noqa: F401 (first of all: the import hook then registers our classes, for which it imports this folder)
