"""Heads at work: images in, files and pictures out."""
