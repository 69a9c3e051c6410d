"""Processors of families whose public entry point is not LeRobot's: one file each, holding PROCESSOR."""
