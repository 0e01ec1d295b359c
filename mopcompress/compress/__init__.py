"""Algorithms applied to a model, block by block."""
