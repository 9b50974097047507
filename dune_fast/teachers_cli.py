"""`dune-fast teachers list | show NAME | fetch NAME | verify FILE | drift [OVERRIDES]`."""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf
from rich.table import Column

from dune_fast.console import add_command, console, table
from dune_fast.engine.overrides import config_names
from dune_fast.teacher_files import load_teacher_config, presence
from dune_fast.teachers.local_paths import local

_NAME_IT = "If timm has the model, name it: --model NAME"
_SHOWN = 12  # names of tensors, per kind of fault


def list_teachers(args: argparse.Namespace) -> int:
    """A table of all configured teachers."""
    names = sorted(config_names("teachers"))
    name_column = Column("name", min_width=max(map(len, names)))  # a name cut short is of no use
    rows = table(name_column, "family", "patch", "channels", "tokens", "weights here?")
    for name in names:
        cfg = load_teacher_config(name)
        tokens = ", ".join(cfg.token_types)
        rows.add_row(name, cfg.family, str(cfg.patch_size), str(cfg.num_features), tokens, presence(cfg))
    console().print(rows)
    return 0


def show(args: argparse.Namespace) -> int:
    """A teacher's resolved configuration and its network's architecture."""
    from dune_fast.teachers.registry import family_class
    from dune_fast.teachers.vit import ViTTeacher
    from dune_fast.teachers.weights import weights_path

    cfg = load_teacher_config(args.name)
    text = OmegaConf.to_yaml(OmegaConf.structured(cfg), resolve=True)
    family = family_class(cfg.family)
    about = f"weights here: {presence(cfg)}\n{family.__name__}: {inspect.cleandoc(family.__doc__ or '')}"
    text += "\n" + textwrap.indent(about, "# ", lambda _: True) + "\n"
    if issubclass(family, ViTTeacher):
        try:
            here = presence(cfg) == "yes"
            architecture = family.read_file(weights_path(cfg.weights), cfg)[0] if here else family.architecture(cfg)
            text += OmegaConf.to_yaml(OmegaConf.create({"architecture": asdict(architecture)}))
        except ValueError as error:
            text += f"# architecture not known: {error}\n"
    elif cfg.model:
        text += f"# the architecture is {cfg.model}'s, with the arguments {cfg.model_args}\n"
    sys.stdout.write(text)
    return 0


def fetch(args: argparse.Namespace) -> int:
    """Gets a teacher's weights: resumed after an interruption, checked for their size and hash."""
    from dune_fast.teachers.assets import asset_path
    from dune_fast.teachers.config import RANDOM
    from dune_fast.teachers.containers import check_archive, read_safetensors
    from dune_fast.teachers.files import DownloadError, cache_dir, download, file_sha256, locked

    cfg = load_teacher_config(args.name)
    if cfg.weights.startswith("asset:"):
        sys.stdout.write(f"{asset_path(cfg.weights)}\n")
        return 0
    if cfg.weights.startswith(RANDOM):
        raise ValueError(f"{args.name} needs no file: its weights are drawn ({cfg.weights})")
    target = Path(cfg.weights).expanduser()
    if target.is_file():
        sys.stdout.write(f"{target} is there already; `dune-fast teachers verify {target}` says what it is\n")
        return 0
    if not cfg.url:
        raise ValueError(
            f"{args.name} has no address that may be fetched from; get the file from its publisher (see the comment in "
            f"configs/teachers/{args.name}.yaml) and put it at {target}"
        )
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(cache_dir() / "locks" / f"{target.name}.lock", args.name):
            if not target.is_file():  # another process may have done it while this one waited
                download(cfg.url, target, part, cfg.bytes, cfg.sha256, args.name)
    except DownloadError as error:
        raise ValueError(
            f"{args.name} could not be fetched: {error}. Without a connection, get {cfg.url} elsewhere and put it at "
            f"{target}; what has arrived so far is kept for the next try"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{args.name}: cannot write {target}: {error}; free some space, or set DUNE_FAST_WEIGHTS to another folder"
        ) from error
    try:
        read_safetensors(target) if target.suffix == ".safetensors" else check_archive(target)
    except ValueError:
        target.unlink()
        raise
    sys.stdout.write(f"{target}\nsha256: {file_sha256(target)}\n")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Says what a file is, which tensors are missing, surplus or of the wrong shape, and what it computes."""
    from dune_fast.teachers.verify import inspect_file

    report = inspect_file(args.file, args.num_heads, args.model)
    write = sys.stdout.write
    write(f"{report.path}: {report.container}, {report.tensors} tensors, {report.values:,} values\n")
    if report.family is None:
        write(
            f"of no known family: no teacher by its tensors' names. {_NAME_IT}; an own network is a teacher of the "
            "family module\n"
        )
        return 1
    write(f"family: {report.family}\n")
    if report.family == "timm":
        cfg, others = report.config, report.models[1:]
        assert cfg is not None
        write(f"model: {cfg.model}{', or with the same tensors: ' if others else ''}{', '.join(others)}\n")
        size = "" if cfg.image_size is None else f", images of {cfg.image_size} px"
        write(
            f"  patches of {cfg.patch_size} px, {cfg.num_features} channels, "
            f"tokens {', '.join(cfg.token_types)}{size}\n"
            f"  mean {list(cfg.mean)}, std {list(cfg.std)}: those of timm's first weights of this model\n"
            f"as a teacher: '+teachers.NAME=timm:{cfg.model}@{report.path}'\n"
        )
    elif report.architecture is None:
        write(f"not usable: {report.problem}\n{_NAME_IT}\n")
        return 1
    for key, value in (asdict(report.architecture) if report.architecture else {}).items():
        write(f"  {key}: {value}\n")
    fit = report.fit
    assert fit is not None
    for kind, names in (
        ("missing", fit.missing), ("wrong shape", fit.misshapen), ("unsound", fit.unsound),
        ("no place inside the network", report.unplaced), ("ignored", fit.surplus),
    ):  # fmt: skip
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        write(f"{kind}: {len(names)}{': ' if names else ''}{', '.join(names[:_SHOWN])}{more}\n")
    if report.unplaced:
        write("not usable: without the tensors that have no place, the features would be others than the file's\n")
    if not report.sound and report.family != "timm":
        write(f"{_NAME_IT}\n")
    if projected := sorted({key.split(".")[1] for key in fit.surplus if key.startswith("projectors.")}):
        write(f"with projectors: a student distilled from {', '.join(projected)}\n")
    for token, numbers in report.fingerprint.items():
        write(f"fingerprint {token}: " + ", ".join(f"{k} {v:+.5f}" for k, v in numbers.items()) + "\n")
    return 0 if report.sound else 1


def drift(args: argparse.Namespace) -> int:
    """Compares a run's teachers, as they would train, with float32, on images of its training data.

    The status is 2 if one of them differs by more than is allowed.
    """
    import torch

    from dune_fast.dali_pipelines.loader import TrainLoader
    from dune_fast.engine.config import compose_config
    from dune_fast.engine.devices import autocast_dtype
    from dune_fast.teachers.drift import MIN_IMAGES, check_drift, drift_rows, measure_drift
    from dune_fast.teachers.ensemble import TeacherEnsemble

    if args.images < MIN_IMAGES:
        raise ValueError(f"--images is {args.images}; at least {MIN_IMAGES} are needed")
    cfg = compose_config(args.overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = autocast_dtype(cfg.train.precision, device)
    teachers = TeacherEnsemble(cfg.teachers, cfg.student.patch_size, dtype, device)
    with TrainLoader(cfg.data, cfg.image_size, args.images, 0, 1, cfg.train.seed, device) as loader:
        found = measure_drift(teachers, next(loader.batches(0)).images)
    out, rows = console(), table("teacher", "tokens", "precision", "drift", "worst token", "limit", "")
    for row in drift_rows(found):
        rows.add_row(*row)
    if found:
        out.print(rows)
    exact = [name for name, teacher in teachers.teachers.items() if teacher.config.precision == "fp32"]
    if exact:
        out.print(f"in float32, so nothing to compare: {', '.join(exact)}")
    check_drift(found)
    return 0


def add_parser(commands: argparse._SubParsersAction) -> None:
    """The command `teachers` and its own commands."""
    parser = commands.add_parser("teachers", help="list, show, fetch, verify and compare teachers", description=__doc__)
    own = parser.add_subparsers(dest="teachers_command", required=True, metavar="COMMAND")
    add_command(own, "list", list_teachers, "all configured teachers")

    sub = add_command(own, "show", show, "configuration and architecture")
    sub.add_argument("name", metavar="NAME", help="a file in configs/teachers, e.g. dinov2_vitl14_reg")

    sub = add_command(own, "fetch", fetch, "get the weights")
    sub.add_argument("name", metavar="NAME", help="a file in configs/teachers")

    sub = add_command(own, "verify", verify, "say what a weights file is")
    sub.add_argument("file", type=local, metavar="FILE", help="a .pth, .pt or .safetensors file, or a run's folder")
    sub.add_argument("--model", default="", help="the model of timm that it is of, where its tensors do not show it")
    sub.add_argument("--num-heads", type=int, default=None, help="attention heads, where they are not channels / 64")

    sub = add_command(own, "drift", drift, "compare low precision with float32")
    sub.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra overrides, as of `dune-fast distill`")
    sub.add_argument("--images", type=int, default=8, help="how many to compare on (default: 8)")
