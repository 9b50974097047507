"""The published recipes: every number that the papers name, students of the papers' sizes, without weights or data."""

from __future__ import annotations

import pytest
import torch

from dune_fast.distill.objective import ownership
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.engine.config import compose_config
from dune_fast.engine.optimizer import OptimizerConfig
from dune_fast.engine.schedules import learning_rates, scaled_learning_rate
from dune_fast.student import Student

DUNE_TEACHERS = {
    "dino2reg_vitlarge_14": (1024, ("cls", "patch")),
    "mast3r_vitlarge_16": (1024, ("patch",)),
    "multihmr_vitlarge_14_672": (1024, ("patch",)),
}
UNIC_TEACHERS = dict.fromkeys(
    ("dbotft_vitbase_16", "deit3_vitbase_16", "dino_vitbase_16", "ibot_vitbase_16"), (768, ("cls", "patch"))
)
DUNE = ("dune_336", "dune_448", "dune_sp", "dune_lp", "dune_no_sharing", "dune_generic_sharing")
RADIO = ("am_radio", "phi_s")
EPOCH = 1_281_167  # images of ImageNet-1K, the unit of both papers


@pytest.fixture(autouse=True)
def neither_weights_nor_data(monkeypatch, tmp_path):
    monkeypatch.delenv("DUNE_FAST_DATA", raising=False)
    monkeypatch.delenv("DUNE_FAST_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)


def experiment(name: str, *more: str):
    return compose_config([f"experiment={name}", *more])


def on_meta(cfg) -> Student:
    with torch.device("meta"):
        return Student(cfg.student, cfg.projector, cfg.teacher_features)


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def vit_parameters(size: int, patch: int, registers: int, dim: int = 768, depth: int = 12) -> int:
    """A ViT's parameters by hand: patches, cls, positions, registers, blocks with LayerScale, final norm."""
    tokens = dim * (1 + 1 + (size // patch) ** 2 + registers)
    block = 2 * 2 * dim + (dim * 3 * dim + 3 * dim) + (dim * dim + dim) + (8 * dim * dim + 4 * dim + dim) + 2 * dim
    return 3 * patch * patch * dim + dim + tokens + depth * block + 2 * dim


@pytest.mark.parametrize(("name", "size", "patch", "registers"), [
    *((name, 448 if name == "dune_448" else 336, 14, 4) for name in (*DUNE, *RADIO)), ("unic", 224, 16, 0),
])  # fmt: skip
def test_students_have_the_papers_size(name, size, patch, registers):
    cfg = experiment(name)
    student = on_meta(cfg)
    assert (cfg.image_size, cfg.student.patch_size, cfg.student.num_registers) == (size, patch, registers)
    assert (cfg.student.embed_dim, cfg.student.depth, cfg.student.num_heads) == (768, 12, 12)
    assert student.encoder.pos_embed.shape == (1, 1 + (size // patch) ** 2, 768)
    assert round(millions(student.encoder)) == 86
    assert sum(p.numel() for p in student.encoder.parameters()) == vit_parameters(size, patch, registers)


@pytest.mark.parametrize("name", (*DUNE, *RADIO))
def test_dune_distils_three_teachers_as_published(name):
    cfg = experiment(name)
    assert cfg.name == name
    assert {name: tuple(features[:2]) for name, features in cfg.teacher_features.items()} == DUNE_TEACHERS
    dinov2, mast3r, multihmr = (cfg.teachers[teacher] for teacher in DUNE_TEACHERS)
    assert [t.family for t in (dinov2, mast3r, multihmr)] == ["dinov2", "mast3r", "multihmr"]
    assert [t.patch_size for t in (dinov2, mast3r, multihmr)] == [14, 16, 14]
    assert [t.groups for t in (dinov2, mast3r, multihmr)] == [["generic"], ["3d"], ["human"]]
    assert (dinov2.num_registers, dinov2.interpolate_offset, dinov2.interpolate_antialias) == (4, 0.1, False)
    assert mast3r.mean == mast3r.std == [0.5, 0.5, 0.5]
    assert len(cfg.data.datasets) == 19 and not cfg.data.group_weights and cfg.data.crop_scale == [0.4, 1.0]
    assert cfg.standardization.convention == ("none" if name in RADIO else "dune")
    assert cfg.standardization.eps is None
    assert (cfg.standardization.ema_start, cfg.standardization.ema_end) == (1.0, 0.001)
    optimizer = cfg.optimizer
    if name != "phi_s":
        assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ([0.9, 0.99], 1e-15, 0.03)
        assert (optimizer.name, optimizer.min_lr, optimizer.clip_per_parameter) == ("adamw", 1e-6, 1.0)
    assert cfg.student.layer_scale == 1e-4 and cfg.objective.beta == (2.0 if name in RADIO else 1.0)


@pytest.mark.parametrize("name", DUNE)
def test_length_and_learning_rate_of_dune(name):
    cfg = experiment(name)
    second = name == "dune_448"
    assert cfg.train.images == (50 if second else 100) * EPOCH
    assert cfg.train.global_batch == 1024
    assert cfg.steps == (62_558 if second else 125_114)  # 62557.96 and 125113.96, rounded up, both even
    peak = scaled_learning_rate(cfg.optimizer.lr_per_256, cfg.train.global_batch)
    assert peak == pytest.approx(2e-4 if second else 1.2e-3)
    rates = learning_rates(cfg.steps, peak, cfg.optimizer.min_lr, cfg.optimizer.warmup_fraction)
    assert rates.max() == peak and rates.argmax() == int(0.2 * cfg.steps) - 1 and rates[0] == 0
    assert cfg.student_weights == ("runs/dune_336" if second else "")


@pytest.mark.parametrize(
    ("name", "sharing", "owns"),
    [
        ("dune_336", "full", [[1, 1, 1], [1, 1, 1], [1, 1, 1]]),
        ("dune_448", "full", [[1, 1, 1], [1, 1, 1], [1, 1, 1]]),
        ("dune_no_sharing", "none", [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        ("dune_generic_sharing", "generic", [[1, 0, 0], [1, 1, 0], [1, 0, 1]]),
    ],
)
def test_data_sharing_and_dropping(name, sharing, owns):
    cfg = experiment(name)
    assert (cfg.objective.sharing, cfg.objective.drop_probability) == (sharing, 0.5)
    groups = {teacher: t.groups for teacher, t in cfg.teachers.items()}
    own = ownership(groups, ["generic", "3d", "human"], cfg.objective)
    assert own.int().tolist() == owns
    for weights in (cfg.objective.cls, cfg.objective.patch):
        assert (weights.cosine, weights.smooth_l1) == (0.5, 0.5)


@pytest.mark.parametrize("name", ["dune_336", "dune_448", "dune_no_sharing", "dune_generic_sharing"])
def test_transformer_projectors(name):
    cfg = experiment(name)
    assert (cfg.projector.kind, cfg.projector.num_blocks, cfg.projector.mlp_ratio) == ("tp", 1, 4.0)
    student = on_meta(cfg)
    assert student.projectors.blocks == [11]
    for projector in student.projectors.values():
        assert projector.blocks[0].attn.num_heads == 12 and projector.blocks[0].ls1.gamma.shape == (768,)
        assert projector.linear.weight.shape == (1024, 768)
    assert millions(student.projectors) == pytest.approx(3 * 7.877, abs=0.01)


def test_ladder_of_dune_is_on_every_third_block():
    cfg = experiment("dune_lp")
    assert (cfg.projector.kind, cfg.projector.which_blocks) == ("lp", [2, 5, 8, 11])
    projectors = on_meta(cfg).projectors
    patch = projectors["mast3r_vitlarge_16"].patch
    assert list(patch) == ["2", "5", "8", "11"]
    assert [rung.layers[0].out_features for rung in patch.values()] == [768, 768, 768, 3072]
    assert not hasattr(projectors["mast3r_vitlarge_16"], "cls")  # that teacher has none


def test_simple_projectors():
    cfg = experiment("dune_sp")
    assert (cfg.projector.kind, cfg.projector.version) == ("sp", 2)
    projectors = on_meta(cfg).projectors
    assert all(p.layers[-1].out_features == 1024 for p in projectors.values()) and projectors.blocks == [11]
    assert cfg.objective.sharing == "full"


@pytest.mark.parametrize("name", RADIO)
def test_radio_has_two_heads_a_teacher_and_adds_the_losses_of_raw_cls_and_patches(name):
    cfg, phi_s = experiment(name), name == "phi_s"
    assert cfg.projector.kind == "heads" and cfg.projector.patch_head.version == "v2"
    conventions = cfg.standardization.of("cls"), cfg.standardization.of("patch")
    assert conventions == ("none", "phi_s_running" if phi_s else "none")
    objective = cfg.objective
    assert {term: w for term, w in vars(objective.cls).items() if w} == {"cosine": 1.0}
    patch = {term: w for term, w in vars(objective.patch).items() if w}
    assert patch == ({"mse": 1.0} if phi_s else {"cosine": 0.9, "smooth_l1": 0.1})
    assert (objective.drop_probability, objective.tokens) == (0.0, "sum")
    projectors = on_meta(cfg).projectors
    for teacher, projector in projectors.items():
        assert set(projector.token_types) == set(cfg.teachers[teacher].token_types)


@pytest.mark.parametrize("name", ["phi_s", "radio_v25", "radio_v25_high", "c_radio_v4", "c_radio_v4_high"])
def test_phi_s_and_its_successors_train_by_lamb(name):
    cfg = experiment(name)
    frozen = 0 if name == "radio_v25_high" else 5000  # it goes on with a trained student
    assert cfg.optimizer == OptimizerConfig(
        "lamb", lr=1e-3, schedule="cosine", min_lr=0.0, warmup_fraction=0.0, betas=[0.9, 0.999], eps=1e-6,
        weight_decay=0.02, clip_per_parameter=0.0, frozen_trunk_steps=frozen,
    )  # fmt: skip
    rates = cfg.optimizer.rates(cfg.steps, cfg.train.global_batch)
    assert rates[0] == rates.max() == 1e-3 and rates[-1] < 1e-8


def test_unic():
    cfg = experiment("unic")
    assert {name: tuple(features[:2]) for name, features in cfg.teacher_features.items()} == UNIC_TEACHERS
    assert sorted(t.family for t in cfg.teachers.values()) == ["dbotft", "deit3", "dino", "ibot"]
    assert {(t.patch_size, t.image_size) for t in cfg.teachers.values()} == {(16, 224)}
    assert list(cfg.data.datasets) == ["in1k"] and cfg.data.crop_scale == [0.08, 1.0]
    assert cfg.standardization.convention == "unic" and cfg.standardization.eps is None
    assert (cfg.optimizer.eps, cfg.optimizer.clip_per_parameter) == (1e-8, 0.0)
    assert (cfg.objective.sharing, cfg.objective.drop_probability) == ("full", 0.5)
    assert cfg.train.images == 200 * EPOCH
    assert cfg.optimizer.warmup_fraction * cfg.train.images == pytest.approx(10 * EPOCH)
    projectors = on_meta(cfg).projectors
    assert projectors.blocks == list(range(12))
    for projector in projectors.values():
        for token in ("cls", "patch"):
            rungs = getattr(projector, token)
            assert [rung.layers[0].out_features for rung in rungs.values()] == [768] * 11 + [3072]
            assert all(rung.layers[-1].out_features == 768 for rung in rungs.values())


@pytest.mark.parametrize(
    ("name", "images", "batch", "steps", "peak"),
    [
        ("dune_1gpu", 10 * EPOCH, 256, 50_046, 3e-4),
        ("dune_2gpu", 20 * EPOCH, 512, 50_046, 6e-4),
        ("dune_8gpu", 100 * EPOCH, 1024, 125_114, 1.2e-3),
        ("in1k_1gpu", 10 * EPOCH, 256, 50_046, 3e-4),
    ],
)
def test_recipes_for_fewer_gpus_change_what_they_say_and_nothing_else(name, images, batch, steps, peak):
    cfg, paper = experiment(name), experiment("dune_336")
    assert (cfg.train.images, cfg.train.global_batch, cfg.steps, cfg.train.accumulation) == (images, batch, steps, 0)
    assert scaled_learning_rate(cfg.optimizer.lr_per_256, batch) == pytest.approx(peak)
    assert millions(on_meta(cfg)) == millions(on_meta(paper))
    cfg.name, cfg.output_dir, cfg.train = paper.name, paper.output_dir, paper.train
    if name == "in1k_1gpu":
        assert list(cfg.data.datasets) == ["in1k"] and cfg.data.crop_scale == paper.data.crop_scale
        cfg.data = paper.data
    assert cfg == paper


def test_the_tiny_run_is_tiny():
    cfg, demo = experiment("tiny_cpu"), experiment("demo")
    assert cfg.teachers == demo.teachers and cfg.steps < demo.steps and cfg.student.depth == 4
    assert millions(on_meta(cfg)) < 5 and cfg.evaluation.every == 20


def test_a_variant_can_be_changed_from_the_command_line():
    cfg = experiment("dune_448", "student=vit_small14", "train.global_batch=256", "student_weights=other")
    assert (cfg.student.embed_dim, cfg.student.image_size, cfg.student_weights) == (384, 448, "other")
    assert cfg.steps == 250_228


def exchanged(images: int, patches: int) -> list[int]:
    """Bytes of every all-reduce of one update of DUNE's statistics."""
    cfg = experiment("dune_336")
    statistics = TeacherStatistics(cfg.teacher_features)
    shapes = {"cls": (images,), "patch": (images, patches)}
    features = {
        name: {token: torch.randn(*shapes[token], channels) for token in tokens}
        for name, (channels, tokens, *_) in cfg.teacher_features.items()
    }
    calls: list[int] = []
    statistics.update(features, 0.5, lambda packed: calls.append(packed.numel() * packed.element_size()))
    return calls


def test_dunes_four_statistics_take_one_small_all_reduce_whatever_the_batch():
    """Two float64 numbers for each of 4 x 1024 channels and a count: 64 KiB, where gathered features are gigabytes."""
    assert exchanged(2, 4) == exchanged(3, 9) == [4 * (2 * 1024 + 1) * 8]
    gathered = 8 * 128 * (3 * 576 + 1) * 1024 * 4  # 8 GPUs, 128 images each, at 336 px, float32
    assert gathered / 2**30 > 6.7 and sum(exchanged(2, 4)) < gathered / 100_000


def block_parameters(dim: int, hidden: int, qkv_bias: bool = True, layer_scale: bool = False) -> int:
    """A transformer block's by hand."""
    attention = 3 * dim * dim + 3 * dim * qkv_bias + dim * dim + dim
    return 2 * 2 * dim + attention + 2 * dim * hidden + hidden + dim + 2 * dim * layer_scale


def head_parameters(dim: int, channels: int, hidden: int = 1024, inner: int = 2) -> int:
    """RADIO's head v2 by hand: Linear, residual [LN GELU Linear], LN GELU Linear."""
    of_inner = inner * (2 * hidden + hidden * hidden + hidden)
    return dim * hidden + hidden + of_inner + 2 * hidden + hidden * channels + channels


@pytest.mark.parametrize(
    ("name", "student", "shape", "tokens", "cls", "patch"),
    [
        ("radio_v25", "radio_base16", (768, 12, 3072, 16), 8, (1024, 1152, 1536), (1280, 1152, 1536, 1280)),
        ("radio_v25", "radio_huge16", (1280, 32, 5120, 16), 8, (1024, 1152, 1536), (1280, 1152, 1536, 1280)),
        ("radio_v25_high", "radio_base16", (768, 12, 3072, 16), 8, (1024, 1152, 1536), (1280, 1152, 1536, 1280)),
        ("c_radio_v4", "radio_so400m16", (1152, 27, 4304, 16), 8, (1536, 4096), (1536, 4096, 1280)),
        ("c_radio_v4_high", "radio_so400m16", (1152, 27, 4304, 16), 8, (1536, 4096), (1536, 4096, 1280)),
    ],
)
def test_radio_has_heads_and_a_summary_token_for_every_teacher(name, student, shape, tokens, cls, patch):
    """Summary tokens of all sources and registers together are 8; a table of positions is for 2048 px."""
    (dim, depth, hidden, side), built = shape, on_meta(experiment(name, f"student={student}"))
    encoder = 3 * side**2 * dim + (2048 // side) ** 2 * dim + tokens * dim + depth * block_parameters(dim, hidden)
    assert sum(p.numel() for p in built.encoder.parameters()) == encoder
    attention = 2 * block_parameters(dim, 4 * dim, qkv_bias=False, layer_scale=True) * name.startswith("c_")
    heads = sum(head_parameters(dim, channels) for channels in cls)
    heads += sum(attention + head_parameters(dim, channels, inner=0 if attention else 2) for channels in patch)
    assert sum(p.numel() for p in built.projectors.parameters()) == heads
    slots = {name: built.projectors.sources[name] for name in built.projectors}
    assert built.encoder.num_cls == len(set(slots.values())) == len(patch)


def ladder_parameters(dim: int, channels: int, hidden: list[int]) -> int:
    """UNIC's projector of one token type by hand: Linear, GELU, Linear at every block."""
    return sum(dim * h + h + h * channels + channels for h in hidden)


def plain_head_parameters(dim: int, channels: int, hidden: int) -> int:
    """EUPE's head by hand: Linear, LN, GELU, Linear, no bias but LN's."""
    return dim * hidden + 2 * hidden + hidden * channels


PROXY = block_parameters(1536, 8960, layer_scale=True)


@pytest.mark.parametrize(
    ("name", "encoder", "projectors", "shared"),
    [
        ("am_radio", vit_parameters(336, 14, 4), 4 * head_parameters(768, 1024), 0),
        ("phi_s", vit_parameters(336, 14, 4), 4 * head_parameters(768, 1024), 0),
        # no LayerScale; 12 levels with a norm each; three chains of 13 adapters of a quarter of the channels
        ("sak_b", vit_parameters(384, 16, 0) - 12 * 2 * 768, 12 * 2 * 768, 3 * 13 * (2 * 768 * 192 + 192 + 768 + 1)),
        ("unic_l", vit_parameters(336, 14, 0, 1024, 24),
         sum(2 * ladder_parameters(1024, c, [1024] * 23 + [4096]) for c in (1536, 1280)), 0),
        ("eupe_proxy", 3 * 256 * 1536 + 1536 + 1536 * (2 + 256 + 4) + 50 * PROXY + 2 * 1536,
         sum(2 * plain_head_parameters(1536, c, 1536) for c in (1280, 1280, 1152)), 0),
        ("eupe_student", vit_parameters(256, 16, 4), 2 * plain_head_parameters(768, 1536, 3072), 0),
        ("eupe_student_sizes", vit_parameters(512, 16, 4), 2 * plain_head_parameters(768, 1536, 3072), 0),
    ],
)  # fmt: skip
def test_parameters_of_siblings(name, encoder, projectors, shared):
    built = on_meta(experiment(name))
    parts = built.encoder, built.projectors, built.shared
    assert tuple(sum(p.numel() for p in part.parameters()) for part in parts) == (encoder, projectors, shared)
