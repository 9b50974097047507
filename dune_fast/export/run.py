"""One export: write, read back with the library it is for, compare, and only then keep."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors import safe_open

from dune_fast.engine.config import load_config
from dune_fast.export import TARGETS, to_dune, to_hf, to_onnx, to_radio, to_safetensors, to_theia, to_timm
from dune_fast.export.check import ExportError, compare, encoder_outputs, sizes
from dune_fast.export.dinov2_alike import resizes_alike
from dune_fast.kernels.nn.radio import RADIOViT
from dune_fast.load import load_encoder, load_model, locate
from dune_fast.teachers.local_paths import local_path
from dune_fast.teachers.run_files import AVERAGE, Manifest, is_checkpoint
from dune_fast.teachers.weights import folder_weights

_MODULES = {
    "timm": to_timm, "hf": to_hf, "onnx": to_onnx, "safetensors": to_safetensors, "dune": to_dune, "radio": to_radio,
    "theia": to_theia,
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """A finished export."""

    target: str
    """Key of TARGETS."""
    files: tuple[Path, ...]
    """What was written."""
    difference: float
    """Largest difference between the independent reader's output and ours, over the output's largest value."""
    every_size: bool
    """Whether other image sizes than the model's own agree too."""
    notes: tuple[str, ...] = ()
    """What a reader of the files should know, in sentences."""


def export(source: str | os.PathLike, target: str, output: Path | None = None) -> Exported:
    """Writes a trained model in another format and proves it.

    Args:
        source: a run's or a checkpoint's folder, a file or a published name, as `dune_fast.load_encoder` takes.
        target: one of TARGETS.
        output: folder for the files; `export/TARGET` in the run's folder or beside the file, by default
            (`export/step_N/TARGET` for a checkpoint). Files of an earlier export are replaced once the new ones have
            passed.

    Raises:
        ExportError: the target cannot express the model, a package is missing, or what the independent library reads
            back differs by more than LIMIT; nothing is left behind then.
        ValueError: the source cannot be loaded.
    """
    if target not in TARGETS:
        raise ExportError(f"there is no export target {target!r}; choose one of {', '.join(TARGETS)}")
    path = locate(source)
    output = _default_folder(path) / target if output is None else local_path(output, "--output")
    if output.exists() and not output.is_dir():
        raise ExportError(f"{output} is a file; --output names the folder that the export goes to")
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    try:
        part = Path(tempfile.mkdtemp(prefix=".export-", dir=existing))
    except OSError as error:
        raise ExportError(f"cannot write to {existing} ({error}); choose another folder with --output") from error
    try:
        difference, every_size, notes = _write_and_compare(path, target, part)
        output.mkdir(parents=True, exist_ok=True)
        files = [written.replace(output / written.name) for written in sorted(part.iterdir())]
    except OSError as error:
        raise ExportError(f"the export to {output} failed: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Exported(target, tuple(files), difference, every_size, notes)


def _default_folder(path: Path) -> Path:
    """Where exports of a model go. A checkpoint's own folder goes when it is pruned."""
    if is_checkpoint(path) and path.parent.name == "checkpoints":
        return path.parents[1] / "export" / path.name
    return (path if path.is_dir() else path.parent) / "export"


def _steps(path: Path) -> int:
    """Training steps behind a model; 0 where nothing says them."""
    if not path.is_dir():
        return 0
    found = folder_weights(path, "student.safetensors")
    return Manifest.read(found).step if found.is_dir() else load_config(path / "config.yaml").steps


def _average(path: Path) -> dict[str, str]:
    """Metadata that the weights are an average (`train.ema`), as the run's files have it; none where they are not."""
    if path.is_dir():
        path = folder_weights(path, "encoder.safetensors", "model.safetensors")
    if path.is_dir():
        manifest = Manifest.read(path)
        return {AVERAGE: str(manifest.config["train"]["ema"])} if manifest.averaged else {}
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return {key: value for key, value in (file.metadata() or {}).items() if key == AVERAGE}


def _write_and_compare(path: Path, target: str, part: Path) -> tuple[float, bool, tuple[str, ...]]:
    """(largest relative difference, whether all sizes were compared, what to say)."""
    notes: list[str] = []
    if target == "dune":
        model = load_model(path)
        to_dune.write(model, part, _steps(path), _average(path))
        encoder, reference = model.encoder, to_dune.dune_outputs(model)
        if others := [name for name in model.teachers if name not in to_dune.TEACHERS]:
            notes.append(
                f"its own code reads the encoder; the whole model once TEACHER_CFG there knows {', '.join(others)}"
            )
    elif target == "theia":
        model = load_model(path)
        to_theia.write(model, part, _average(path))
        encoder, reference = model.encoder, to_theia.theia_outputs(model)
    elif target == "radio":
        model = load_model(path)
        to_radio.write(model, part, _steps(path), _average(path))
        encoder, reference = model.encoder, to_radio.reference(model)
    else:
        encoder = load_encoder(path)
        _MODULES[target].write(encoder, part, _average(path))
        reference = partial(encoder_outputs, encoder)
    alike = isinstance(encoder, RADIOViT) or resizes_alike(encoder.cfg)
    every_size = target != "theia" and (target not in ("timm", "hf") or alike)
    if target == "theia":
        notes.append("its translators are for images of one size, so other sizes were not compared")
    elif not every_size:
        notes.append(
            f"{target} resizes the position table by size and with antialias, this encoder otherwise: features agree "
            "at the image size it was trained for, at others they differ slightly"
        )
    try:
        reader = _MODULES[target].read(part)
    except ExportError:
        raise
    except Exception as error:  # every library has its own ways to refuse a file
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ExportError(f"the {target} export cannot be read back and was removed: {reason}") from error
    difference = compare(reader, reference, sizes(encoder, native_only=not every_size), target)
    return difference, every_size, tuple(notes)
