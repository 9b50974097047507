"""Images for distillation: what they are (`datasets`), in which order they come (`order`), what is done to them
(`augmentation`, `pipeline`) and how they reach the device (`loader`). Annotations are never read.
"""
