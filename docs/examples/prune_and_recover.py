"""Prune half of a model's weights, train two adapters for the rest, and compare them on the same test rows.

Run it with `python docs/examples/prune_and_recover.py [MODEL [OUTPUT_FOLDER]]`.
Without arguments it takes the built-in SmolLM2-135M and about eight minutes of two
CPU cores; it needs no network.
"""

import sys
from pathlib import Path

from mopcompress import bench, load_recipe

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/example")
small = model != "smollm2"  # a model of your own is tried out in seconds

settings = {"model": model, "ratios": (0.5,), "methods": ("sparsegpt",), "arms": ("none", "single", "mop")}
if small:
    settings |= {"train_rows": 24, "validation_rows": 8, "test_rows": 12, "max_length": 256, "max_seq_length": 64}
    settings |= {"num_calibration_samples": 4}

rows = bench(load_recipe(None, settings), folder)  # a run that was stopped is resumed
for row in rows:
    print(f"{row.setting:>14}  {row.arm:<8} perplexity {row.perplexity:10.2f}  trained {row.trained_parameters:>8}")
print(f"the report with intervals, costs and plots: {folder / 'report.html'}")
