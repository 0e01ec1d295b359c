"""Causal language models: where they come from, how they are stored, and how they are taken apart."""
