"""What stands between the student and a teacher: one file a kind, a table of kinds in `base.py`."""
