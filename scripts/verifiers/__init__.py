"""Reads pictures of the drawn world and judges them against a prompt, from pixels and words only."""
