"""Benchmarks of attention, training steps and generation, and the reports of their records."""
