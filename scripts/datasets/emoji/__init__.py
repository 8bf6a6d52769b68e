"""Emoji of four icon sets with captions: packages -> icons -> pictures -> selection, captions and split -> shards.

Nothing of the data is in the repository: `python -m scripts.emoji fetch` gets five packages by name and checksum.
"""
