"""Shared maths with hook points on the lines that make the values; no model is named here."""
