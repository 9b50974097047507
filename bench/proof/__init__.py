"""Does it distil? Real teachers into a ViT-Ti/14 on two CPU cores, measured on images nobody was trained on.

`python -m bench.proof` makes the images (`scenes`), trains and evaluates every cell (`cells`, `evaluation`), and
writes the table (`table`) to results/proof/.
"""
