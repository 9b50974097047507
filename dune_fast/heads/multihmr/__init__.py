"""Multi-HMR: one image to the people in it, as SMPL-X bodies."""
