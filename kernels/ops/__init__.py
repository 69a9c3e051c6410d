"""Fused operations for interventions, one folder an op; kernels/README.md says how they are laid out."""
