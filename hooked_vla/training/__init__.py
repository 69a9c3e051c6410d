"""Imitation on the tabletop: demonstrations, a vision tower to freeze, and the loop that trains the shipped models."""
