"""Entry points for `torch.hub.load`: DUNE's published models, from a weights file that is already here.

    encoder = torch.hub.load("path/to/dune_fast", "dune_vitbase14_448_encoder", source="local", weights="file.pth")

Without `weights`, `<name>.pth` is taken from the folder $DUNE_FAST_WEIGHTS (`weights` by default); where it is missing,
the error says where to put it. `dune_*` are whole students (`model.projections(images)`), `dune_*_encoder` the encoders
alone; `model(images)` gives the features of both. The spelling `dune_vitbase_14_448` of the published hub works too.
UNIC has no entry point there: `dune_fast.load_encoder("unic")`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

dependencies = ["torch", "safetensors", "hydra"]


def _entry(name: str, encoder_only: bool) -> Callable[..., nn.Module]:
    """One entry point; `name` is the stem of the published file."""

    def build(weights: str | None = None, device: str = "cpu") -> nn.Module:
        import dune_fast

        load = dune_fast.load_encoder if encoder_only else dune_fast.load_model
        return load(weights or name, device=device)

    what = "The encoder" if encoder_only else "Encoder, projectors and teachers' statistics"
    build.__name__ = build.__qualname__ = f"{name}_encoder" if encoder_only else name
    build.__doc__ = (
        f"{what} of {name}, frozen. weights: the file; `{name}.pth` in $DUNE_FAST_WEIGHTS by default. "
        "Raises ValueError with the place for the file if it is not there."
    )
    return build


dune_vitbase14_336 = dune_vitbase_14_336 = _entry("dune_vitbase14_336", False)
dune_vitbase14_448 = dune_vitbase_14_448 = _entry("dune_vitbase14_448", False)
dune_vitbase14_448_paper = dune_vitbase_14_448_paper = _entry("dune_vitbase14_448_paper", False)
dune_vitsmall14_336 = dune_vitsmall_14_336 = _entry("dune_vitsmall14_336", False)
dune_vitsmall14_448 = dune_vitsmall_14_448 = _entry("dune_vitsmall14_448", False)

dune_vitbase14_336_encoder = dune_vitbase_14_336_encoder = _entry("dune_vitbase14_336", True)
dune_vitbase14_448_encoder = dune_vitbase_14_448_encoder = _entry("dune_vitbase14_448", True)
dune_vitbase14_448_paper_encoder = dune_vitbase_14_448_paper_encoder = _entry("dune_vitbase14_448_paper", True)
dune_vitsmall14_336_encoder = dune_vitsmall_14_336_encoder = _entry("dune_vitsmall14_336", True)
dune_vitsmall14_448_encoder = dune_vitsmall_14_448_encoder = _entry("dune_vitsmall14_448", True)
