"""YAML files that Hydra composes. A package, so that a wheel holds them."""
