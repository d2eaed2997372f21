"""Networks open whatever library wrote them, with the features of the bare network to the bit."""

import copy
import json
import re
from argparse import Namespace
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

import linear_decoding
from moco.networks import architectures, checkpoint, finding, opening, vit
from moco.networks.checkpoint import CheckpointError
from tests.support.inputs import save_network
from tests.support.networks import saved, timm_name

VIT = "vit_128x3x2_8"


@cache
def resnet(seed=0):
    """A ResNet-18 as torchvision builds it, with varied batch-norm statistics."""
    torch.manual_seed(seed)
    return architectures.adapt_batch_norm(torchvision.models.resnet18(num_classes=5), [torch.randn(8, 3, 32, 32)])


@cache
def transformer(seed=0):
    torch.manual_seed(seed)
    model = architectures.build(VIT, 5).eval()
    nn.init.normal_(architectures.head(model).weight)
    return model


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features(model):
    return architectures.remove_head(copy.deepcopy(model).eval())(IMAGES)


def trunk(model, prefix="", names=lambda name: name):
    head = architectures.head_name(model)
    return {
        prefix + names(name): value for name, value in model.state_dict().items() if not name.startswith(f"{head}.")
    }


def mlp(prefix, width):
    """A projector or a predictor."""
    return {f"{prefix}.0.weight": torch.randn(8, width), f"{prefix}.2.weight": torch.randn(4, 8)}


def cut(name):
    """The name of a ResNet's tensor in nn.Sequential(*list(resnet.children())[:-1]), as in lightly's examples."""
    first, _, rest = name.partition(".")
    order = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    return f"{order.index(first)}.{rest}"


def old_names(name):
    return name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2")


# format: (the key of the network to choose, {keys of dictionaries, /, prefix or name: what is there}, names of tensors
# other than torchvision's); NET: the trunk of that network, OTHER: of another one, HEAD: a projector
NET, OTHER, HEAD = "the network", "another network", "a projector"
RESNETS = {
    "bare trunk": ("", {"": NET}),
    "released": ("model_state_dict.module", {"model_state_dict/module.": NET, "acc1_list": [1.0]}),
    "torch.compile": ("model._orig_mod", {"model/_orig_mod.": NET}),
    "compiled DataParallel": ("module._orig_mod", {"module._orig_mod.": NET}),
    "MoCo v1": (
        "state_dict.module.encoder_q",
        {"state_dict/module.encoder_q.": NET, "state_dict/module.encoder_q.fc.weight": torch.randn(8, 512)}
        | {"state_dict/module.encoder_k.": OTHER, "state_dict/module.queue_ptr": torch.zeros(1, dtype=torch.long)},
    ),
    "MoCo v2": (
        "state_dict.module.encoder_q",
        {"epoch": 12, "arch": "resnet18", "state_dict/module.encoder_q.": NET, "state_dict/module.encoder_q.fc": HEAD}
        | {"state_dict/module.encoder_k.": OTHER, "state_dict/module.queue": torch.randn(4, 8)},
    ),
    "MoCo v3": (
        "state_dict.module.base_encoder",
        {"arch": "resnet18", "state_dict/module.base_encoder.": NET, "state_dict/module.base_encoder.fc": HEAD}
        | {"state_dict/module.momentum_encoder.": OTHER, "state_dict/module.predictor": HEAD},
    ),
    "SimCLR": ("state_dict.backbone", {"state_dict/backbone.": NET, "state_dict/backbone.fc": HEAD}),
    "BYOL": (
        "online_encoder.net",
        {"online_encoder.net.": NET, "online_encoder.projector.net": HEAD, "target_encoder.net.": OTHER, "net.": NET},
    ),
    "SwAV": (
        "state_dict.module",
        {"state_dict/module.": NET, "state_dict/module.projection_head": HEAD}
        | {"state_dict/module.prototypes.weight": torch.randn(30, 4)},
    ),
    "Barlow Twins, VICReg": ("model.module.backbone", {"model/module.backbone.": NET, "model/module.projector": HEAD}),
    "DINO": (
        "teacher.module.backbone",
        {"teacher/module.backbone.": NET, "teacher/module.head.mlp": HEAD, "student/module.backbone.": OTHER}
        | {"student/module.head.mlp": HEAD, "optimizer/state": {0: {"exp_avg": torch.zeros(2)}}}
        | {"args": Namespace(arch="resnet18", patch_size=16)},
    ),
    "solo-learn": (
        "state_dict.encoder",
        {"pytorch-lightning_version": "1.5.1", "hyper_parameters": {"encoder": "resnet18", "lr": 0.1}}
        | {"state_dict/encoder.": NET, "state_dict/momentum_encoder.": OTHER, "state_dict/projector": HEAD}
        | {"state_dict/classifier.weight": torch.randn(10, 512), "state_dict/classifier.bias": torch.zeros(10)},
    ),
    "lightly": ("state_dict.backbone", {"state_dict/backbone.": NET, "state_dict/backbone_momentum.": OTHER}, cut),
    "Lightning": (
        "state_dict.vision_encoder.model",
        {"state_dict/vision_encoder.model.": NET, "state_dict/text_encoder.embedding.weight": torch.randn(9, 4)},
    ),
    "VISSL": (
        "classy_state_dict.base_model.model.trunk._feature_blocks",
        {"classy_state_dict/base_model/model/trunk/_feature_blocks.": NET}
        | {"classy_state_dict/base_model/model/heads/0.clf": HEAD},
    ),
    "keys that are numbers": ("model", {0: {"conv1.weight": torch.zeros(64, 3, 7, 7)}, "arch": 3, "model/": NET}),
}
TRANSFORMERS = {
    "torchvision": ("", {"": NET}),
    "torchvision 0.12": ("", {"": NET}, old_names),
    "timm": ("", {"": NET}, timm_name),
    "DINO": (
        "teacher.backbone",
        {"student/module.backbone.": OTHER, "student/module.head.mlp": HEAD, "teacher/backbone.": NET}
        | {"teacher/head.mlp": HEAD},
        timm_name,
    ),
    "Mugs": (
        "teacher.module.backbone.encoder",
        {"teacher/module.backbone.encoder.": NET, "student/module.backbone.encoder.": OTHER}
        | {"teacher/module.backbone.relation_block.norm.weight": torch.ones(128)},
        timm_name,
    ),
    "MAE": (
        "model",
        {"model/": NET, "model/mask_token": torch.zeros(1, 1, 64), "model/decoder_pos_embed": torch.zeros(1, 785, 64)}
        | {"model/decoder_blocks.0.norm1.weight": torch.ones(64)},
        timm_name,
    ),
}
FORMATS = [(resnet, *each) for each in RESNETS.items()] + [(transformer, *each) for each in TRANSFORMERS.items()]


def in_format(parts, net, other, names=lambda name: name):
    """The content of a file with two networks in a format of RESNETS or TRANSFORMERS."""
    content = {}
    for path, what in parts.items():
        *keys, last = path.split("/") if isinstance(path, str) else [path]
        level = content
        for key in keys:
            level = level.setdefault(key, {})
        if what is NET or what is OTHER:
            level |= trunk(net if what is NET else other, last, names)
        else:
            level |= mlp(last, architectures.head(net).in_features) if what is HEAD else {last: what}
    return content


@pytest.mark.parametrize(("network", "name", "how"), FORMATS, ids=[f"{name}-{f.__name__}" for f, name, _ in FORMATS])
def test_a_format_opens_with_the_features_of_the_bare_network(tmp_path, network, name, how):
    net, other, (key, parts, *names) = network(0), network(1), how
    path = saved(tmp_path / "net.pth", in_format(parts, net, other, *names))
    fit = opening.find(path)
    assert (fit.arch, fit.n_out, fit.key) == ("resnet18" if network == resnet else VIT, None, key)
    opened = opening.open_model(path, n_out=4)
    assert not opened.has_head and architectures.head(opened.network).out_features == 4
    assert torch.equal(features(opened.network), features(net))
    assert not torch.equal(features(net), features(other))


@pytest.mark.parametrize("change", ["no num_batches_tracked", "double precision"])
def test_weights_of_old_versions_and_other_precision(tmp_path, change):
    if change == "double precision":
        state = {name: value.double() for name, value in trunk(resnet()).items()}
    else:
        state = {name: value for name, value in trunk(resnet()).items() if not name.endswith("num_batches_tracked")}
    path = saved(tmp_path / "net.pth", state)
    assert torch.equal(features(opening.open_model(path).network), features(resnet()))


@pytest.mark.parametrize("names", [lambda name: name, timm_name], ids=["torchvision", "timm"])
@pytest.mark.parametrize("network", [resnet, transformer])
def test_safetensors_open_with_their_head(tmp_path, network, names):
    net = network()
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file({names(name): value for name, value in net.state_dict().items()}, path)
    opened = opening.open_model(path)
    assert opened.has_head and opened.sha256 and architectures.head(opened.network).out_features == 5
    with torch.no_grad():
        assert torch.equal(opened.network.eval()(IMAGES), net(IMAGES))


@pytest.mark.parametrize("arch", ["regnet_y_400mf", "mnasnet0_5", "swin_t", "maxvit_t"])
def test_other_architectures_open_by_their_names_and_resume(tmp_path, arch):
    """MNASNet needs its version, a regular module none; RegNet computes while it is built."""
    torch.manual_seed(0)
    net = torchvision.models.get_model(arch).eval()
    content = {"state_dict": {f"model.{name}": value for name, value in net.state_dict().items()}}
    path = saved(tmp_path / "net.pth", content)
    opened = opening.open_model(path, arch)
    assert opened.arch == arch and opened.has_head
    with pytest.raises(CheckpointError, match="nearest: "):
        opening.find(path)
    with torch.no_grad():
        assert torch.equal(opened.network.eval()(x := torch.randn(1, 3, 224, 224)), net(x))
    resumed = opening.load(architectures.build(arch, 1000), opened.network.state_dict(), path)
    for name, value in opened.network.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    assert opening.find(saved(path, content | {"arch": arch})).arch == arch


@pytest.mark.parametrize(("shallow", "deep"), [("resnet18", "resnet34"), ("resnet50", "resnet101")])
def test_a_deeper_network_is_not_taken_for_the_shallower_one_that_it_contains(tmp_path, shallow, deep):
    for arch in (shallow, deep):
        state = {name: torch.ones(()).expand(shape) for name, shape in finding._trunk(arch)[2].items()}
        assert opening.find(saved(tmp_path / "net.pth", state)).arch == arch


def test_a_linear_head_is_a_classifier_with_or_without_dropout_or_bias(tmp_path):
    state, path = trunk(resnet()), tmp_path / "net.pth"
    weight, bias = torch.randn(7, 512), torch.randn(7)
    with_bias = {"fc.weight": weight, "fc.bias": bias}
    for head in (with_bias, {"fc.1.weight": weight, "fc.1.bias": bias}, {"fc.weight": weight}):
        found = opening.find(saved(path, state | head)).state
        assert torch.equal(found["fc.weight"], weight)
        assert torch.equal(found["fc.bias"], bias if len(head) == 2 else torch.zeros(7))
    for head in (mlp("fc", 512), {"fc.weight": torch.randn(7, 100)}, {"fc.1.weight": weight, "fc.0.weight": weight}):
        assert opening.find(saved(path, state | head)).n_out is None


def test_description_names_the_network_and_what_is_not_used(tmp_path):
    path = saved(tmp_path / "dino.pth", in_format(RESNETS["DINO"][1], resnet(0), resnet(1)))
    description = opening.open_model(path).description
    assert description.startswith(f"resnet18 from {path} (SHA-256 ")
    assert description.endswith(
        "), 224 pixels; network: teacher.module.backbone; not used: student (122), teacher.module.head (2)"
    )
    saved(path, resnet().state_dict())
    assert re.fullmatch(rf"resnet18 from {path} \(SHA-256 \w{{12}}\), 224 pixels", opening.open_model(path).description)


SIZES = {  # what a file holds, and what is beside it -> the size that the network was trained at
    "a trainer's": ({"args": {"image_size": 64}}, {}, 64),
    "a decoded network": ({"image_size": 96}, {}, 96),
    "a published file": ({"acc1_list": [1.0]}, {}, None),
    "others' flags": ({"args": Namespace(image_size=64)}, {}, None),
    "timm's file": ({"pretrained_cfg": {"input_size": (3, 48, 48)}}, {}, 48),
    "timm's folder": ({}, {"config.json": {"pretrained_cfg": {"input_size": [3, 96, 96]}}}, 96),
    "crops": ({}, {"preprocessor_config.json": {"size": {"shortest_edge": 256}, "crop_size": {"height": 64}}}, 64),
    "both": ({}, {"preprocessor_config.json": {"size": 64}, "config.json": {"image_size": 96}}, 64),
    "a network": ({}, {"config.json": {"vision_config": {"image_size": 96}}}, 96),
    "a file of something else": ({}, {"config.json": [1, 2]}, None),
}


@pytest.mark.parametrize("case", SIZES)
def test_images_have_the_size_that_the_network_was_trained_at(tmp_path, case):
    content, beside, size = SIZES[case]
    path = saved(tmp_path / "net.pth", content | {"model": resnet().state_dict()})
    for name, value in beside.items():
        (tmp_path / name).write_text(json.dumps(value))
    opened, given = opening.open_model(path), opening.open_model(path, image_size=32)
    assert opened.image_size == opening.start_size(None, path, None) == (size or 224)
    assert opened.description.endswith(f"), {size or 224} pixels")
    assert given.image_size == opening.start_size(32, path, None) == 32
    assert given.description.endswith(f"), 32 pixels (trained at {size})" if size else "), 32 pixels")


def test_each_network_of_a_run_has_its_own_image_size(frames, tmp_path, empty_figures, capsys):
    for size in (32, 40):
        save_network(tmp_path / f"net_{size}.tar", resnet(), arch="resnet18", args={"image_size": size})
    paths = [str(tmp_path / f"net_{size}.tar") for size in (32, 40)]
    flags = ["--workers", "0", "--device", "cpu", "--save-dir", str(tmp_path / "out"), "--epochs", "1"]
    linear_decoding.main([str(frames), "--model-path", *paths, *flags])
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.endswith("), 32 pixels") and second.endswith("), 40 pixels")
    for path, size in zip(paths, (32, 40), strict=True):
        decoded = opening.open_model(tmp_path / "out" / f"{Path(path).stem}_labeledS_5_iid.tar")
        assert decoded.image_size == size
    record = json.loads((tmp_path / "out" / "args.json").read_text())
    assert record["networks"]["net_40"].endswith("), 40 pixels")


def test_a_key_chooses_among_several_networks(tmp_path):
    other = resnet(1)
    path = saved(tmp_path / "dino.pth", in_format(RESNETS["DINO"][1], resnet(0), other))
    for key in ("student", "student.module.backbone", "student.module"):
        assert torch.equal(opening.find(path, key=key).state["conv1.weight"], other.conv1.weight)
    assert torch.equal(opening.open_model(path, key="student").network.conv1.weight, other.conv1.weight)
    with pytest.raises(CheckpointError, match="--checkpoint-key ema: .*it has teacher.module.backbone, student.module"):
        opening.find(path, key="ema")


def test_several_networks_without_a_rule_are_the_users_choice(tmp_path):
    path = saved(tmp_path / "two.pth", {"left": trunk(resnet(0)), "right": trunk(resnet(1))})
    with pytest.raises(CheckpointError, match=r"several networks \(left, right\); choose one with --checkpoint-key"):
        opening.find(path)
    saved(path, {"left": trunk(resnet(0)), "right": trunk(resnet(0))})
    assert opening.find(path).key == "left"  # any of two equal ones


def test_teacher_and_student_of_different_architectures(tmp_path):
    teacher = torchvision.models.resnet34()
    path = saved(tmp_path / "distilled.pth", {"student": trunk(resnet()), "teacher": trunk(teacher)})
    assert opening.find(path).arch == "resnet34"
    assert opening.find(path, key="student").arch == "resnet18"


def test_moco_v3_small_has_twelve_heads_and_others_six(tmp_path):
    with torch.device("meta"):
        state = vit.build("vit_s_16").state_dict()
    state = {timm_name(name): torch.ones(()).expand(value.shape) for name, value in state.items()}
    for content, arch in (
        ({"state_dict": {f"module.base_encoder.{name}": value for name, value in state.items()}}, "vit_384x12x12_16"),
        ({"arch": "vit_small", "state_dict": state}, "vit_384x12x12_16"),
        ({"args": Namespace(arch="vit_small"), "teacher": state}, "vit_s_16"),
    ):
        assert opening.find(saved(tmp_path / "net.pth", content)).arch == arch


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("norm_pre.weight", (128,), "it has CLIP's GELU or an approximation, as config.json may say; cho"),
        ("fc_norm.weight", (128,), "it has features that are the mean of the patches"),
        ("pre_logits.fc.weight", (128, 128), "it has an MLP between trunk and head"),
        ("dist_token", (1, 1, 128), "it has a distillation token"),
        ("attn_pool.q.weight", (128,), "pooled by attention, as in SigLIP"),
        ("blocks.1.attn.q_norm.weight", (64,), "blocks.1.attn.q_norm.weight is not part of"),
        ("blocks.1.attn.q_bias", (128,), "blocks.1.attn.q_bias is not part of"),  # EVA's
        ("pos_embed", (1, 784, 128), r"pos_embed is \(1, 784, 128\), not \(1, 785, 128\)"),  # without the class token's
    ],
)
def test_other_transformers_are_refused_with_the_reason(tmp_path, name, shape, reason):
    path = saved(tmp_path / "net.pth", trunk(transformer(), "", timm_name) | {name: torch.zeros(shape)})
    with pytest.raises(CheckpointError, match=f"(nearest: {VIT}.*|is not supported): .*{reason}"):
        opening.find(path)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"architectures": ["IJepaModel"]}, {}, "IJepaModel has no class token, as in SigLIP and I-JEPA"),
        (
            {"architectures": ["SiglipVisionModel"]},
            {"vision_model.head.attention.in_proj_weight": torch.zeros(2, 2)},
            "SiglipVisionModel has features pooled by attention, as in SigLIP",
        ),
        ({"architecture": "resnest50d"}, {"conv1.0.weight": torch.zeros(8, 3, 3, 3)}, "it has resnest50d"),
        ({"architecture": "xcit_nano"}, {"a": torch.zeros(2)}, "it has xcit_nano"),
    ],
    ids=["I-JEPA", "SigLIP", "timm's CNN", "timm's transformer"],
)
def test_what_does_not_open_is_named(tmp_path, config, tensors, message):
    is_transformer = "architectures" in config
    state = trunk(transformer(), "vision_model.") if is_transformer else {}
    state.pop("vision_model.class_token", None)
    safetensors.torch.save_file(state | tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{tmp_path} is not supported: {message}; choose another network"):
        opening.find(tmp_path)


def test_layer_scale_multiplies_what_a_block_adds(tmp_path):
    """Against blocks that compute it as the equation has it: x + gamma * f(x)."""
    net = transformer()
    gammas = [[torch.rand(128) + 0.1 for _ in range(2)] for _ in range(3)]
    state = trunk(net, "", timm_name)
    state |= {f"blocks.{i}.ls{k + 1}.gamma": gammas[i][k] for i in range(3) for k in range(2)}
    path = saved(tmp_path / "net.pth", state)
    loaded = opening.open_model(path).network
    assert not opening.find(path).unused
    with torch.no_grad():
        tokens, _ = net.tokens(IMAGES)
        for block, (first, second) in zip(net.encoder.layers, gammas, strict=True):
            inner = block.ln_1(tokens)
            tokens = tokens + first * block.self_attention(inner, inner, inner)[0]
            tokens = tokens + second * block.mlp(block.ln_2(tokens))
        torch.testing.assert_close(features(loaded), net.encoder.ln(tokens)[:, 0])


@pytest.mark.parametrize("side", [8, 37])
def test_positions_of_another_image_size_are_kept_as_they_are(tmp_path, side):
    state = trunk(transformer(), "", timm_name) | {"pos_embed": torch.randn(1, 1 + side * side, 128)}
    path = saved(tmp_path / "net.pth", state)
    loaded = opening.open_model(path).network
    assert torch.equal(loaded.encoder.pos_embedding, state["pos_embed"])
    model = copy.deepcopy(transformer(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    opening.load(model, opening.find(path).state, path, drop_head=True)  # into a model that already has its optimizer
    model(torch.randn(2, 3, 8 * side, 8 * side)).sum().backward()
    optimizer.step()
    assert model.encoder.pos_embedding.shape == (1, 1 + side * side, 128)


def test_misfits_are_listed_for_the_nearest_architecture_and_for_a_model(tmp_path):
    state = resnet().state_dict()
    del state["layer1.0.conv1.weight"]
    state["layer4.2.conv1.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    path = saved(tmp_path / "cifar.pth", {"model": state})
    with pytest.raises(CheckpointError) as error:
        opening.find(path)
    assert str(error.value) == (
        f"{path} does not fit any architecture; nearest: resnet18: model.conv1.weight is "
        "(64, 3, 3, 3), not (64, 3, 7, 7); model.layer1.0.conv1.weight is missing; "
        "model.layer4.2.conv1.weight is not part of resnet18"
    )
    with pytest.raises(CheckpointError) as error:
        opening.load(architectures.build("resnet18", 5), state, path)
    message = str(error.value)
    assert message.startswith(f"{path} does not fit this ResNet: ") and "\n" not in message
    for fault in ('Missing key(s) in state_dict: "layer1.0.conv1.weight"', '"layer4.2.conv1.weight"', "size mismatch"):
        assert fault in message


def test_torchvision_file_with_its_dropout_layer(tmp_path):
    model = torchvision.models.mobilenet_v2(num_classes=5)
    path = saved(tmp_path / "mobilenet_v2.pth", model.state_dict())
    opened, fit = opening.open_model(path), opening.find(path)
    assert (fit.arch, fit.n_out, fit.classes, opened.has_head) == ("mobilenet_v2", 5, None, True)
    assert torch.equal(opened.network.classifier.weight, model.classifier[1].weight)


def test_the_stored_architecture_wins(tmp_path):
    """Over another one that the user names; a stored one that does not fit, or is unknown, does not count."""
    for stored in ("resnet18", "resnet50", "vit_small", 3, None):
        path = saved(tmp_path / "a.tar", {"model_state_dict": resnet().state_dict(), "arch": stored})
        assert opening.find(path).arch == "resnet18"
        if stored == "resnet18":
            assert opening.find(path, "mobilenet_v2").arch == "resnet18"
        else:
            with pytest.raises(CheckpointError, match="is a resnet18, not a mobilenet_v2; omit --model"):
                opening.find(path, "mobilenet_v2")


@pytest.mark.parametrize("classes", [["a", "b"], "abcde", [1, 2, 3, 4, 5], dict.fromkeys("abcde"), None], ids=str)
def test_class_names_that_are_none_are_ignored(tmp_path, classes):
    path = saved(tmp_path / "a.tar", {"model_state_dict": resnet().state_dict(), "classes": classes})
    assert opening.find(path).classes is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_but_read(tmp_path, value):
    """A trainer that resumes reads the file, and checks the weights itself."""
    model = copy.deepcopy(resnet())
    model.layer2[0].bn1.running_var[1] = value
    path = saved(tmp_path / "a.tar", model.state_dict())
    with pytest.raises(CheckpointError, match=r"a.tar are not finite \(layer2.0.bn1.running_var"):
        opening.find(path)
    assert not checkpoint.read(path)["layer2.0.bn1.running_var"].isfinite().all()


def test_head_of_another_size(tmp_path):
    path = saved(tmp_path / "a.tar", resnet().state_dict())
    with pytest.raises(CheckpointError, match="the head of .* has 5 outputs, not 7"):
        opening.open_model(path, n_out=7)
    model = architectures.build("resnet18", 7)
    own_head = model.fc.weight.clone()
    opening.load(model, opening.find(path).state, path, drop_head=True)
    assert torch.equal(model.fc.weight, own_head)


@pytest.mark.parametrize(
    "content", [torch.zeros(3), {}, {"model_state_dict": 3}, {"epoch": 4}, {0: torch.zeros(3)}, [1]], ids=str
)
def test_a_file_without_weights(tmp_path, content):
    with pytest.raises(CheckpointError, match="contains no weights"):
        opening.find(saved(tmp_path / "a.tar", content))
