"""The commands: they compose recipe, models, data, compression, recovery and evaluation, and write all run folders."""
