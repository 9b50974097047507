"""Fused operations of the distillation step: one operation a file, a plain reference beside every kernel.

Imports torch and triton alone. Nothing here knows of models, teachers or training.
"""

IS_DUNE_FAST = True  # checked by `import dune_fast`: another distribution installs a package of this name
