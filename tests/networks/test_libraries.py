"""Networks of transformers, timm and Meta have the features that these libraries give, at two image sizes."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from moco.networks import architectures, finding, opening, vit
from moco.networks.checkpoint import CheckpointError
from tests.support.golden import DATA, fill
from tests.support.networks import images, weights

GOLDEN = DATA / "libraries.npz"  # what transformers 5.24 and timm 1.0.31 give; see the last test
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
MLP = {"intermediate_size": 128}
UNKNOWN = ("arch", "width", "heads", "eps", "is_cubic")  # of what may be beside a network
DINOV3 = {"num_register_tokens": 4, "hidden_act": "silu"}
TRANSFORMERS = {  # model -> its configuration, beside SMALL
    "ViT": MLP,
    "ViTMAE": MLP | {"mask_ratio": 0.0},
    "ViTMSN": MLP,
    "CLIPVision": MLP,
    "Dinov2": {"mlp_ratio": 2},
    "Dinov2 gated": {"mlp_ratio": 2, "use_swiglu_ffn": True},
    "Dinov2WithRegisters": {"mlp_ratio": 2},
    "DINOv3ViT": MLP | {"num_register_tokens": 4},
    "DINOv3ViT gated": MLP | DINOV3 | {"use_gated_mlp": True},
}
TIMM = {  # architecture -> its options
    "vit_tiny_patch16_224": {"depth": 2, "dynamic_img_size": True},
    "vit_small_patch14_reg4_dinov2": {"depth": 2, "dynamic_img_size": True, "img_size": 224},
    "vit_small_patch16_dinov3": {"depth": 2},
    "vit_small_plus_patch16_dinov3": {"depth": 2},
    "vit_small_patch16_dinov3_qkvb": {"depth": 2},
    "vit_base_patch16_clip_224": {"depth": 2, "dynamic_img_size": True},
    "convnext_tiny": {},
}
LAYOUTS = [*TRANSFORMERS, *TIMM]
ATTENTION = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]


def sizes(layout):
    """The image sizes to test: that of pretraining, and another one."""
    if layout in TRANSFORMERS:
        return 32, 48
    return (224, 280) if "patch14" in layout else (64, 96) if layout.startswith("convnext") else (224, 160)


def features(path, size):
    """The features (2, C) of two images of size x size pixels."""
    network = architectures.remove_head(opening.open_model(path, image_size=size).network).eval()
    with torch.inference_mode():
        return network(images(size)).numpy()


def assert_equal(found, expected):
    """Within 1e-4 of the features' scale. expected: of every 8th feature, where a library's networks are wide."""
    step = found.shape[1] // expected.shape[1]
    np.testing.assert_allclose(found[:, ::step], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def write(path, layout):
    """The network of a layout as its library writes it, with its golden shapes; returns what to open."""
    golden = np.load(GOLDEN)
    state = weights(json.loads(str(golden[f"{layout} shapes"])))
    if layout in TIMM:
        torch.save(state | ({"arch": layout} if "clip" in layout else {}), path / "net.pth")
        return path / "net.pth"
    safetensors.torch.save_file(state, path / "model.safetensors")
    (path / "config.json").write_text(str(golden[f"{layout} config"]))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_equal_those_of_the_library(tmp_path, layout):
    for size in sizes(layout):
        assert_equal(features(write(tmp_path, layout), size), np.load(GOLDEN)[f"{layout} {size}"])


@pytest.mark.parametrize("layout", ATTENTION)
def test_attention_equals_that_of_the_library(tmp_path, layout):
    network = opening.open_model(write(tmp_path, layout)).network.eval()
    for size in sizes(layout):
        with torch.inference_mode():
            maps = vit.attention_maps(network, images(size))
        expected = np.load(GOLDEN)[f"{layout} attention {size}"]
        assert maps[:, ::2].shape == expected.shape
        np.testing.assert_allclose(maps[:, ::2], expected, rtol=1e-4, atol=1e-4 * expected.max())


META = {  # timm's names -> Meta's, of DINOv2 and DINOv3
    "reg_token": "storage_tokens",
    "gamma_1": "ls1.gamma",
    "gamma_2": "ls2.gamma",
    "mlp.fc1_g": "mlp.w1",
    "mlp.fc1_x": "mlp.w2",
}


@pytest.mark.parametrize("layout", ["vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3"])
def test_metas_names_of_dinov3(tmp_path, layout):
    state = torch.load(write(tmp_path, layout))
    renamed = {"rope_embed.periods": torch.zeros(16, dtype=torch.bfloat16), "mask_token": torch.zeros(1, 384)}
    for name, tensor in state.items():
        for timm, meta in META.items():
            name = name.replace(timm, meta)
        renamed[name.replace("mlp.fc2", "mlp.w3") if "plus" in layout else name] = tensor
        if name.endswith("qkv.weight"):  # a bias of zeros, but for the keys', which a mask leaves out
            renamed[name.replace("weight", "bias")] = torch.cat([torch.zeros(384), torch.ones(384), torch.zeros(384)])
            renamed[name.replace("weight", "bias_mask")] = torch.ones(3 * 384)
    torch.save({"teacher": {f"backbone.{name}": value for name, value in renamed.items()}}, tmp_path / "dinov3.pth")
    for size in sizes(layout):
        assert_equal(features(tmp_path / "dinov3.pth", size), np.load(GOLDEN)[f"{layout} {size}"])


def test_a_folder_with_several_files_by_their_index(tmp_path):
    write(tmp_path, "ViT")
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = list(state)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for part, own in parts.items():
        safetensors.torch.save_file({name: state[name] for name in own}, tmp_path / part)
    index = {"weight_map": {name: part for part, own in parts.items() for name in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_equal(features(tmp_path, 32), np.load(GOLDEN)["ViT 32"])
    assert len(opening.open_model(tmp_path).sha256) == 64


def test_a_folder_without_such_files_lists_its_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder; give a checkpoint in it: it has none"):
        opening.open_model(tmp_path)
    (tmp_path / "a.tar").touch()
    with pytest.raises(CheckpointError, match="give a checkpoint in it: a.tar"):
        opening.open_model(tmp_path)


def test_images_are_normalized_by_the_networks_own_mean_and_std(tmp_path):
    path = write(tmp_path, "ViT")
    beside = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(beside))
    assert "mean 0.5 0.4 0.3 and std 0.5 0.25 0.2" in opening.open_model(path).description
    own = features(path, 32)
    (tmp_path / "preprocessor_config.json").unlink()
    plain = architectures.remove_head(opening.open_model(path).network).eval()
    pixels = images(32) * torch.tensor(opening.STD)[:, None, None] + torch.tensor(opening.MEAN)[:, None, None]
    mean, std = (torch.tensor(beside[key])[:, None, None] for key in ("image_mean", "image_std"))
    with torch.inference_mode():
        assert_equal(own, plain((pixels - mean) / std).numpy())


def test_another_mean_is_refused_where_the_first_layer_pads(tmp_path):
    torch.save(architectures.build("resnet18", 3).state_dict() | {"bias": torch.zeros(2)}, tmp_path / "net.pth")
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    with pytest.raises(CheckpointError, match="resnet18 is supported with ImageNet's mean and std only"):
        opening.open_model(tmp_path / "net.pth")


# --- the libraries themselves


def transformers_network(layout, folder=None):
    """A model of transformers: new, or with the weights in a folder; and its features as a function of images."""
    transformers = pytest.importorskip("transformers")
    name = layout.split()[0]
    config = getattr(transformers, f"{name}Config")(**SMALL | TRANSFORMERS[layout])
    kind = getattr(transformers, f"{name}Model")
    model = (kind(config) if folder is None else kind.from_pretrained(folder)).eval()
    options = {} if name.upper().startswith("DINO") else {"interpolate_pos_encoding": True}

    def forward(x):
        if name == "ViTMAE":  # without shuffling
            options["noise"] = torch.arange((x.shape[2] // 8) ** 2).float().expand(len(x), -1)
        output = model(x, **options)
        return output.pooler_output if name == "CLIPVision" else output.last_hidden_state[:, 0]

    return model, forward


def timm_network(layout):
    timm = pytest.importorskip("timm")
    pool = {} if layout.startswith("convnext") else {"global_pool": "token"}
    return timm.create_model(layout, num_classes=0, **pool, **TIMM[layout]).eval()


def timm_attention(model, x):
    """The attention of the class token to the patches in the last block, of every second head: (N, heads / 2, h, w)."""
    layer, weights = model.blocks[-1].attn, []
    layer.fused_attn = False
    with layer.attn_drop.register_forward_hook(lambda *call: weights.append(call[-1])):
        model(x)
    rows = x.shape[2] // model.patch_embed.patch_size[0]
    return weights[0][:, ::2, 0, model.num_prefix_tokens :].unflatten(2, (rows, -1))


def golden(layout, folder):
    """The entries of a layout in libraries.npz: its features and attention at both sizes, names and shapes."""
    if layout in TIMM:
        model = forward = timm_network(layout)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        model.load_state_dict(weights(shapes))
        entries = {}
    else:
        transformers_network(layout)[0].save_pretrained(folder)
        stored = safetensors.torch.load_file(folder / "model.safetensors")
        shapes = {name: tuple(value.shape) for name, value in stored.items()}
        safetensors.torch.save_file(weights(shapes), folder / "model.safetensors", {"format": "pt"})
        _, forward = transformers_network(layout, folder)
        entries = {f"{layout} config": (folder / "config.json").read_text()}
    step = 8 if layout in TIMM else 1
    with torch.inference_mode():
        for size in sizes(layout):
            entries[f"{layout} {size}"] = forward(images(size)).numpy()[:, ::step]
            if layout in ATTENTION:
                entries[f"{layout} attention {size}"] = timm_attention(model, images(size)).numpy()
    return entries | {f"{layout} shapes": json.dumps(shapes)}


@pytest.mark.thorough
@pytest.mark.parametrize("layout", LAYOUTS)
def test_golden_features_are_those_of_the_installed_library(tmp_path, layout):
    """To make libraries.npz anew: np.savez_compressed of golden() of all LAYOUTS."""
    for name, value in golden(layout, tmp_path).items():
        if not isinstance(value, str):
            assert_equal(value, np.load(GOLDEN)[name])


FAMILIES = [*(f"vit_{size}*" for size in ("tiny", "small", "medium", "base")), "deit*", "convnext*", "resne*", "wide_*"]
REFUSED = ["beit*", "eva*", "flexivit*", "test_vit*", "mobilenetv2*"]  # all of them
OTHER_FEATURES = ("resnetblur", "resnetaa", "test_vit")  # with the tensors of others: only a stored arch tells them


@pytest.mark.thorough
@pytest.mark.parametrize("family", [*FAMILIES, *REFUSED])
def test_no_network_of_timm_that_opens_has_other_features(tmp_path, family):
    """Of up to 100 million parameters, with their names stored; prints which open."""
    timm = pytest.importorskip("timm")
    opened = {}
    for name in timm.list_models(family):
        try:
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=0)
        except (NotImplementedError, RuntimeError):  # it computes with tensors while it is built
            continue
        fits = finding._fits(model.state_dict(), None, dict.fromkeys(UNKNOWN) | {"activation": "gelu"})
        if all(fit.faults for fit in fits) or sum(weight.numel() for weight in model.parameters()) > 100e6:
            continue
        pool = {"global_pool": "token"} if hasattr(model, "num_prefix_tokens") else {}
        model = fill(timm.create_model(name, num_classes=0, **pool).eval(), 7)
        torch.save({"arch": name, "state_dict": model.state_dict()}, tmp_path / "net.pth")
        if name.startswith(OTHER_FEATURES):
            with pytest.raises(CheckpointError, match=f"is not supported: it has timm's {name}"):
                opening.open_model(tmp_path / "net.pth")
            continue
        size = model.pretrained_cfg["input_size"][-1]
        with torch.inference_mode():
            expected = model(images(size)).numpy()
        assert np.ptp(expected, axis=0).max() > 1e-3 * np.abs(expected).max(), f"{name}: the same for both images"
        found = features(tmp_path / "net.pth", size)
        opened[name] = np.abs(found - expected).max() / np.abs(expected).max()
    print(opened)
    assert bool(opened) == (family in FAMILIES) and all(difference < 1e-4 for difference in opened.values()), opened
