"""Other libraries that compress, each in a Python environment of its own.

Their pins conflict with each other and with ours, so a library runs in a child process: `worker.py` scripts know their
library and nothing of mopcompress; a job goes there as JSON and safetensors, and its answer comes back the same way.
What came back is counted and checked here, for none of it is taken on trust.
"""
