"""Linear segmentation and depth on patch tokens: what `dune-fast evaluate --task segmentation | depth` trains."""
