"""Experiments as data: a TOML file says what is run and which rules it must pass; a report says what was measured."""
