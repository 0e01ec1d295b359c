"""`bench`: a grid of cells, its manifest and its rows."""
