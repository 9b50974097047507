"""In which type a teacher computes: what is cast and quantized, what is refused, and that tokens stay the same."""

from __future__ import annotations

import pytest
import torch

from dune_fast.kernels.fp8 import FP8Linear
from dune_fast.kernels.nn.block import SelfAttention
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.precision import prepare, resolve_precision
from dune_fast.teachers.vit import ViTTrunk

CPU = torch.device("cpu")


def vit(**fields) -> TeacherConfig:
    """A drawn ViT of 12 blocks of 192 channels; `layer` says how many run."""
    base = {"family": "dinov2", "weights": "random:0", "num_features": 192, "image_size": 56, "layer": 4}
    return TeacherConfig(**{**base, **fields})


def block_kinds(ensemble) -> list[set[str]]:
    """What the linear layers of each block are."""
    kinds = []
    for block in ensemble.trunks[0].vit.blocks:
        layers = [module for module in block.modules() if isinstance(module, FP8Linear | torch.nn.Linear)]
        kinds.append({"fp8" if isinstance(m, FP8Linear) else str(m.weight.dtype)[6:] for m in layers})
    return kinds


def relative(ours, theirs):
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def test_float8_is_between_the_first_and_the_last_block_that_run():
    ensemble = TeacherEnsemble({"a": vit(precision="fp8", layer=3), "b": vit(precision="fp8", layer=5)}, 14)
    assert block_kinds(ensemble) == [{"bfloat16"}, {"fp8"}, {"fp8"}, {"fp8"}, {"bfloat16"}]  # the other 7 are gone
    trunk = ensemble.trunks[0].vit
    assert trunk.patch_embed.proj.weight.dtype == torch.bfloat16 and trunk.norm.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("precision", "run", "kind"),
    [("auto", None, "float32"), ("auto", torch.bfloat16, "bfloat16"), ("bf16", None, "bfloat16"),
     ("fp32", torch.bfloat16, "float32")],
)  # fmt: skip
def test_auto_follows_the_run_and_the_others_do_not(precision, run, kind, images):
    ensemble = TeacherEnsemble({"a": vit(precision=precision)}, 14, run)
    assert block_kinds(ensemble) == [{kind}] * 4
    outputs = ensemble(images)["a"]
    assert {str(x.dtype)[6:] for x in outputs.values()} == {kind}  # losses read what the norm has written
    full = TeacherEnsemble({"a": vit()}, 14)(images)["a"]
    errors = {token: relative(outputs[token], x) for token, x in full.items()}
    assert all(error == 0 if kind == "float32" else 0 < error < 2e-2 for error in errors.values())


def test_float8_tokens_stay_near_float32(images):
    full = TeacherEnsemble({"a": vit()}, 14)(images)["a"]
    low = TeacherEnsemble({"a": vit(precision="fp8")}, 14)(images)["a"]
    assert all(1e-3 < relative(low[token], x) < 5e-2 for token, x in full.items())  # in fact quantized, and not more


@pytest.mark.parametrize("stream", ["fp32", "bf16"])
def test_the_stream_is_what_was_asked_for_without_a_position_table_too(stream, images):
    """Regression: MASt3R adds no positions to its bf16 embedding, and its stream stayed bf16."""
    cfg = TeacherConfig("mast3r", "random:0", 14, 192, ["patch"], precision="bf16", stream=stream, layer=2)
    ensemble, seen = TeacherEnsemble({"a": cfg}, 14), []
    ensemble.trunks[0].vit.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    ensemble(images)
    assert seen == [{"fp32": torch.float32, "bf16": torch.bfloat16}[stream]]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_bf16_stream_and_gelu_in_the_epilogue_move_less_and_stay_near(precision, images):
    full = TeacherEnsemble({"a": vit()}, 14)(images)["a"]
    plain = TeacherEnsemble({"a": vit(precision=precision)}, 14)
    lean = TeacherEnsemble({"a": vit(precision=precision, stream="bf16", epilogue_gelu=True)}, 14)
    seen = []
    for ensemble in (plain, lean):
        ensemble.trunks[0].vit.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    found = {name: ensemble(images)["a"] for name, ensemble in (("plain", plain), ("lean", lean))}
    assert seen == [torch.float32, torch.bfloat16]
    for token, x in full.items():
        assert not torch.equal(found["lean"][token], found["plain"][token])
        assert relative(found["lean"][token], x) < (2e-2 if precision == "bf16" else 6e-2)


def test_what_belongs_to_bf16_goes_where_the_run_is_in_float32(images):
    """One configuration serves a GPU in bf16 and a CPU in float32."""
    lean = TeacherEnsemble({"a": vit(stream="bf16", epilogue_gelu=True)}, 14)
    full = TeacherEnsemble({"a": vit()}, 14)(images)["a"]
    assert all(torch.equal(x, full[token]) for token, x in lean(images)["a"].items())


def test_a_block_before_one_in_float8_hands_it_what_it_takes(images):
    """Regression: a norm wrote what its own block computes in, float8 rows for a bf16 linear layer."""
    vit_net = TeacherEnsemble({"a": vit(precision="fp8")}, 14).trunks[0].vit
    seen = {}
    for i, block in enumerate(vit_net.blocks):
        block.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, type(args[2]).__name__))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        vit_net.block_outputs(images, [3])
    assert seen == {0: "NoneType", 1: "FP8Rows", 2: "FP8Rows", 3: "Tensor"}


def test_teachers_share_a_trunk_only_if_it_computes_in_one_way():
    configs = {"a": vit(), "b": vit(precision="bf16", layer=2), "c": vit(precision="fp32"), "d": vit(attention="math")}
    ensemble = TeacherEnsemble(configs, 14, torch.bfloat16)
    trunks = [teacher.trunk for teacher in ensemble.teachers.values()]
    assert trunks[0] is trunks[1] and len({id(trunk) for trunk in trunks}) == len(ensemble.trunks) == 3


def test_attention_backend_reaches_every_layer_and_changes_nothing(images):
    plain = TeacherEnsemble({"a": vit()}, 14)
    forced = TeacherEnsemble({"a": vit(attention="math")}, 14)
    assert {m.backend for m in forced.modules() if isinstance(m, SelfAttention)} == {"math"}
    torch.testing.assert_close(forced(images), plain(images), rtol=1e-4, atol=1e-4)


def test_compiled_once_for_every_shape_and_equal(images, monkeypatch):
    """On the tracing backend, which compiles nothing: inductor's C++ takes a minute."""
    plain = torch.nn.Module.compile
    graphs, options = [], []

    def backend(module, example):
        graphs.append(module)
        return module.forward

    def traced(self, **given):
        options.append(given)
        return plain(self, backend=backend, **given)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    ensemble = TeacherEnsemble({"a": vit(compile=True, layer=2), "b": vit(compile=True, layer=1)}, 14)
    exact = TeacherEnsemble({"a": vit(layer=2)}, 14)
    for shape in (images, images[:1], images):
        torch.testing.assert_close(ensemble(shape)["a"], exact(shape)["a"], rtol=1e-4, atol=1e-4)
    assert options == [{"dynamic": False}] and len(graphs) == 2  # one trunk; two shapes, no graph break


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"precision": "fp16"}, "precision is 'fp16'; choose one of auto, bf16, fp8, fp32"),
        ({"precision": "fp8", "layer": 2}, "of 2 blocks that run none is left"),
        ({"precision": "fp8", "family": "module"}, "not the family 'module'.*bf16"),
        ({"stream": "fp16"}, "stream is 'fp16'; choose one of fp32, bf16"),
        ({"precision": "fp32", "stream": "bf16"}, "stream=bf16 and epilogue_gelu are for bf16 and fp8"),
        ({"stream": "bf16", "family": "module"}, "not for the family 'module'"),
        ({"attention": "math", "family": "module"}, "brings its own attention"),
        ({"attention": "flash3"}, "'flash3', which cannot compute.*unknown; choose one of"),
        ({"attention": "cudnn"}, "'cudnn', which cannot compute fp32 with 64 channels a head on cpu.*auto"),
    ],
)
def test_what_cannot_be_had_is_explained(fields, words):
    with pytest.raises(ValueError, match=rf"teachers\.a\..*{words}"):
        TeacherEnsemble({"a": vit(**fields)}, 14)


def test_a_swiglu_has_no_gelu_to_put_into_an_epilogue():
    cfg = ViTConfig(image_size=28, embed_dim=32, depth=1, num_heads=2, mlp="swiglu")
    trunk = ViTTrunk(VisionTransformer(cfg))
    trunk.blocks = {0}
    with pytest.raises(ValueError, match="epilogue_gelu is true, but its blocks have SwiGLU; set it to false"):
        prepare("a", vit(precision="bf16", epilogue_gelu=True), trunk, CPU)


def test_float8_on_an_old_gpu_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old one")
    cfg = vit(precision="fp8", weights="/nowhere")
    with pytest.raises(ValueError, match="compute capability 8.9 or newer; cuda is an old one; choose bf16"):
        resolve_precision("a", cfg, torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve_precision("a", cfg, torch.bfloat16, torch.device("cuda")).precision == "fp8"


def test_half_precision_of_the_run_other_than_bf16_is_refused():
    with pytest.raises(ValueError, match="not in torch.float16"):
        resolve_precision("a", vit(), torch.float16, CPU)
