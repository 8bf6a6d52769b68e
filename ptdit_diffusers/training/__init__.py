"""Training of the embedded model: one generic loop (loop.py) and one file per stage (text, vae, transformer)."""
