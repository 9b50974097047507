"""The recipes of sibling systems in small, on the proof's teachers, images and tasks."""
