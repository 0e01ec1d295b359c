"""What the commands do: compose models, data, compression, recovery and evaluation; the only writers of run folders."""
