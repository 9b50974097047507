"""The one transformer (student, teachers, projectors) and the projectors."""
