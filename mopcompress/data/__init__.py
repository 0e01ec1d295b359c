"""Data of a run, from a name or a file to documents of tokens.

sources       a file, a folder or a hub id -> rows, each with its origin
columns       a row -> an `Example`, for every known layout of columns
splits        `Example`, `Splits`, and keyed hashes that divide and thin them
examples      `load_examples`: the three above in order
skills        the built-in data set
encoding      `Example` -> `Document`: tokens, with prompt and response apart
dataset       `EncodedDataset`: the encoded splits of a run, filtered and counted
text_windows  plain text, or documents -> windows of tokens
"""
