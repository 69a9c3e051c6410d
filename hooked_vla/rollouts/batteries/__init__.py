"""Batteries: prompts and images changed in named ways, and arms that show a policy the changed ones."""
