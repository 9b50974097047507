"""Proof that the task heads learn, on a frozen encoder and drawn data: `python -m bench.heads_proof NAME`."""
