"""Verifiers: they read pictures and compare them with a prompt, from pixels and words only."""
