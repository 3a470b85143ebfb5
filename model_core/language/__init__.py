"""Decoding with the language model: positions, cache, a lean forward."""
