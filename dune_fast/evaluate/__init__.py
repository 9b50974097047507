"""What a student has learned: held-out agreement with its teachers, figures."""
