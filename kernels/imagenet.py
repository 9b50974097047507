"""ImageNet's channel statistics, apart from everything that imports torch: commands read them before it is imported."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Channel means of RGB images in [0, 1]; the student's images are normalised with them."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Channel deviations that belong to `IMAGENET_MEAN`."""
