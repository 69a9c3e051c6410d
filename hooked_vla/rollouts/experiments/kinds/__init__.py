"""Kinds of experiments: each module has Settings and run(context, settings); definitions name it."""
