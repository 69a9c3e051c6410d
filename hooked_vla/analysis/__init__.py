"""What a hooked model represents and computes: metrics, statistics, patching, probes, subspaces, attention, lenses."""
