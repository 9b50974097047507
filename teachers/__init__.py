"""Frozen teachers: their configuration, their weights, and the ensemble that runs them on the student's images."""
