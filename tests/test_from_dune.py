"""The page for users of the published code: its tables name what there is. Its commands: tests/test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

from dune_fast.engine.config import compose_config

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "from_dune.md").read_text()


def test_the_overrides_of_the_table_compose_alone_and_together():
    table = PAGE.partition("## Runs")[2].partition("## Scalars")[0]
    cells = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")][1:]
    codes = [code for cell in cells for code in re.findall(r"`([^`]+)`", cell)]
    found = [code for code in codes if re.fullmatch(r"[a-z_.0-9]+=\S+", code)]
    assert len(found) > 35
    usable = [code for code in found if code not in ("student_weights=FILE",)]
    groups = [code for code in usable if "." not in code.partition("=")[0] and code.startswith(("student=", "data="))]
    for code in groups:
        compose_config(["experiment=dune_336", code])
    # one value for a field: the later ones of `objective` are alternatives
    fields = {code.partition("=")[0]: code for code in usable if code not in groups}
    cfg = compose_config(["experiment=dune_336", *fields.values()])
    assert cfg.optimizer.betas == [0.9, 0.99] and cfg.train.images == 128_116_700


def test_scalars_of_the_page_are_those_that_a_step_gives():
    from dune_fast.distill import step
    from dune_fast.engine import distillation, trainer

    source = "".join(Path(module.__file__).read_text() for module in (step, distillation, trainer))
    for name in ("loss", "share", "kept", "gradient_norm/max", "gradient_norm/global", "ema_momentum"):
        assert name in source and f"`{name}" in PAGE.replace("`/global`", "`gradient_norm/global`")


def test_names_of_the_page_are_those_of_the_encoder():
    from dune_fast.kernels.nn.vit import VisionTransformer
    from dune_fast.load import DistilledModel

    part = PAGE.partition("| of the published encoder")[2].partition("## Differences")[0]
    rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("|") and "the same" in line]
    names = [name for row in rows for name in re.findall(r"`([a-z_]+)`", row)]
    assert len(names) == 9 and all(hasattr(VisionTransformer, name) for name in names)
    assert hasattr(DistilledModel, "projections") and hasattr(VisionTransformer, "transform")
