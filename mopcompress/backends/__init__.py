"""Other compression libraries as backends, each in a Python environment of its own.

Their pinned versions conflict with each other and with ours, so a library runs in a child process. A worker script
imports its library and nothing of mopcompress; it reads a job, and writes its answer, as JSON and safetensors. Every
weight in the answer is checked here, because none of it is taken on trust.
"""
