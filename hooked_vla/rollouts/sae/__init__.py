"""Sparse autoencoders where rollouts are needed: activations on policy or from data sets, and the commands."""
