"""Compression of a model, block by block, with the methods of `mopcompress.algorithms`."""
