"""Flagfiles, one per experiment, which `sparsek recipe` shows, and scripts of several stages."""
