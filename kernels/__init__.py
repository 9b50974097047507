"""Fused operations of the distillation step: one operation a file, a plain reference beside every kernel.

`nn/` has the layers made of them. Imports torch and triton alone; nothing here knows of teachers or training.
"""
