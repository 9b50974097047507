"""Fused operations of the distillation step: one operation a file, a plain reference beside every kernel.

Imports torch and triton alone. Nothing here knows of models, teachers or training.
"""
