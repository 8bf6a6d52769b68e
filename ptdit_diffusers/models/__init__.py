"""The models as diffusers loads, saves and runs them."""

import diffusers  # noqa: F401 (first of all: the import hook then registers our classes, for which it imports this folder)
