"""Judges of emoji: small networks, trained on true pictures alone, that name what a picture shows and its style."""
