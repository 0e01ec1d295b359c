"""Perplexity, exact match, ROUGE-L and generated answers of a model, with or without an adapter."""
