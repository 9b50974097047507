"""Runs on one or several machines: starting them, asking them to stop."""
