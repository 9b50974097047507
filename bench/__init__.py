"""Measurements and comparisons, run from a checkout as `python -m bench.NAME`. They are not installed."""
