"""One file per checkpoint family: a literal SPEC at the published size, and TINY, its small sibling."""
