"""One training step as pure functions of tensors: objective, standardization, dropping, sharing."""
