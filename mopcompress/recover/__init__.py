"""Recovery: prompts and gates trained on a frozen compressed model."""
