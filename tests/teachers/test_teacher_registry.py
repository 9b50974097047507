"""Configurations: every file of the group is valid, and every mistake is answered with what to change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dune_fast import teachers
from dune_fast.teachers.config import TeacherConfig, check_config
from dune_fast.teachers.registry import UnknownTeacherError, build_teacher, families, family_class
from dune_fast.teachers.vit import ViTTeacher

CONFIGS = sorted((Path(teachers.__file__).resolve().parents[1] / "configs" / "teachers").glob("*.yaml"))


PARAMETERS = {192: 5.5, 384: 21.8, 768: 86, 1024: 304, 1280: 632, 1536: 1136}  # millions, ViT-T, S, B, L, H and g
OTHERS = {
    ("dinov3", 1280): 840, ("dinov3", 4096): 6716, ("sam", 768): 89.7, ("sam", 1024): 308.3, ("sam", 1280): 637,
    ("siglip", 768): 93, ("siglip", 1152): 428, ("siglip", 1536): 1163, ("depth_anything", 384): 24.8,
    ("depth_anything", 768): 97.5, ("depth_anything", 1024): 335.3,
}  # fmt: skip
"""As published for networks that are larger or other than a plain ViT of their width: gated MLPs, necks, pooling."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_file_has_typed_fields_and_all_that_matter(path):
    loaded = OmegaConf.load(path)
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TeacherConfig), loaded))
    assert isinstance(cfg, TeacherConfig)
    assert cfg.family in families()
    assert set(loaded) <= set(TeacherConfig.__dataclass_fields__)
    needed = {"family", "weights", "patch_size", "num_features", "token_types", "mean", "std", "groups"}
    assert needed <= set(loaded)
    check_config(path.stem, cfg)
    assert set(cfg.token_types) <= set(family_class(cfg.family).token_types)
    if issubclass(family_class(cfg.family), ViTTeacher) and not cfg.weights.startswith(("asset:", "runs/")):
        assert (tuple(cfg.mean), tuple(cfg.std)) == family_class(cfg.family).statistics
        assert cfg.url.startswith("https://") or cfg.family == "dinov3"  # for who accepts its terms
        assert cfg.image_size is not None
        assert cfg.num_registers is not None or path.stem == "unic_vitl14" or cfg.family == "radio"  # not published
        if cfg.projected:
            return  # its channels are not those that the sizes go by; the same file without `projected` is another's
        with torch.device("meta"):
            vit = family_class(cfg.family).network(family_class(cfg.family).architecture(cfg))
        width = vit.cfg.embed_dim
        parameters = OTHERS.get((cfg.family.removesuffix("_v2"), width)) or PARAMETERS[width]
        assert family_class(cfg.family).width(vit.cfg) == cfg.num_features
        assert abs(sum(p.numel() for p in vit.parameters()) / 1e6 - parameters) < 0.02 * parameters


def test_unknown_family_is_answered_with_the_close_ones(toy_config):
    with pytest.raises(UnknownTeacherError, match=r"teachers\.a\.family is 'xfeet'.*did you mean 'xfeat'\?.*onnx_vit"):
        build_teacher("a", toy_config(family="xfeet"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_types": ["cls", "register"]}, r"teachers\.a\.token_types"),
        ({"token_types": []}, r"teachers\.a\.token_types"),
        ({"mean": [0.5]}, r"teachers\.a\.mean"),
        ({"std": [0.5, 0.0, 0.5]}, r"teachers\.a\.std"),
        ({"patch_size": 0}, r"teachers\.a\.patch_size"),
        ({"layer": 0}, r"teachers\.a\.layer"),
        ({"weights": "random:many"}, "random:NUMBER"),
        ({"weights": "nowhere.safetensors"}, "no weights file nowhere.safetensors"),
        ({"family": "xfeat", "token_types": ["cls", "patch"]}, "has patch only"),
    ],
)
def test_contradiction_names_the_field(toy_config, fields, message):
    with pytest.raises(ValueError, match=message):
        build_teacher("a", toy_config(**fields))


def test_seed_decides_the_weights(toy_config):
    a, b, c = (build_teacher("t", toy_config(weights=f"random:{seed}")).trunk.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a)


def test_every_teacher_can_be_put_into_a_run():
    from dune_fast.engine.config import compose_config

    own = [f"+teachers@teachers.{path.stem}={path.stem}" for path in CONFIGS]
    changed = [f"teachers.{path.stem}.interpolate_offset=0.0" for path in CONFIGS]
    teachers = compose_config(["experiment=demo", *own, *changed]).teachers
    for path in CONFIGS:
        assert teachers[path.stem].interpolate_offset == 0.0 and "$" not in teachers[path.stem].weights
