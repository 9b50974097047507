"""Proof that the task heads learn: `python -m bench.heads_proof multihmr`."""
