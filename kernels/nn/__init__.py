"""Layers made of the fused operations: the block and the Vision Transformer of student, teachers and projectors.

Also what stands around them: patch embedding, preprocessing, and which images of a batch a teacher gets.
"""
