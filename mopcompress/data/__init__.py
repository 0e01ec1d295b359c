"""From a name or a file to documents of tokens.

sources   a file, a folder or a hub id -> rows, each with the place it came from
columns   a row -> an `Example`, whatever its columns are called
splits    `Example`, `Splits`, and the keyed hashes that divide and thin them
examples  `load_examples`: the three above in order
skills    the built-in data set
encoding  `Example` -> tokens, prompt and response kept apart
calibration  plain text, or encoded documents -> windows of tokens
"""
