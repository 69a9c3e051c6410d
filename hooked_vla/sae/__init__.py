"""Sparse autoencoders; what edits need of one is in `splice`."""
