"""`--to theia`: `model.safetensors` in the names of Theia's released models: encoder and translators."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dune_fast.export.check import ExportError, Reader, encoder_outputs
from dune_fast.export.to_safetensors import PLAIN, save
from dune_fast.kernels.nn.encoders import family_of
from dune_fast.load import DistilledModel
from dune_fast.projectors.theia import ConvHead, Translator
from dune_fast.released_theia import load_theia, published_state
from dune_fast.teachers.architecture import HEAD_DIM

FILE = "model.safetensors"


def _refuse_unlike(model: DistilledModel) -> None:
    """ExportError if the container has no names for this model."""
    student, projectors = model.student, model.student.projectors
    cfg = student.encoder.cfg
    grid = cfg.image_size // cfg.patch_size
    demands = {
        "an encoder of the family theia (student.family=theia)": family_of(cfg) == "theia",
        "no LayerScale (student.layer_scale: null)": cfg.layer_scale is None,
        f"attention heads of {HEAD_DIM} channels (student.num_heads)": cfg.embed_dim == HEAD_DIM * cfg.num_heads,
        "translators that read tokens after the final norm (student.normed=true)": student.normed,
        "lconv translators (projector=theia, projector.translator=lconv)": all(
            isinstance(p, Translator) and ("patch" not in p.token_types or _is_lconv(p)) for p in projectors.values()
        ),
        f"translators of the {grid} x {grid} patches of its positions (projector.source_grid=0)": all(
            getattr(p, "source", grid) == grid for p in projectors.values()
        ),
    }
    for what, given in demands.items():
        if not given:
            raise ExportError(f"Theia's container needs {what}: export this run to safetensors instead")


def _is_lconv(projector: Translator) -> bool:
    return isinstance(projector.patch, ConvHead) and not hasattr(projector, "shared")


def write(model: DistilledModel, folder: Path, about: Mapping[str, str] = PLAIN) -> None:
    """Writes `model.safetensors`; `about` is metadata."""
    _refuse_unlike(model)
    save(folder / FILE, published_state(model.student), {"format": "pt", **about})


def theia_outputs(model: DistilledModel) -> Reader:
    """All tokens after the final norm, and what every translator makes of them."""

    def run(images: Tensor) -> dict[str, Tensor]:
        projections = model.projections(images)
        named = {f"{name}.{token}": x for name, tokens in projections.items() for token, x in tokens.items()}
        return {**encoder_outputs(model.encoder, images), **named}

    return run


def read(folder: Path) -> Reader:
    """The container, read as any published one."""
    return theia_outputs(DistilledModel(*load_theia(folder / FILE)).eval())

