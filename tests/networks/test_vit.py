"""Vision transformers: image sizes, attention, names of architectures; see test_libraries for their features."""

import pytest
import torch
import torchvision
from torch import nn

from moco.cli import UserError
from moco.networks import architectures, vit
from tests.support.networks import images

CLIP = {"antialias": False, "pre_norm": True, "quick_gelu": True}


def test_output_equals_torchvision_to_the_bit():
    torch.manual_seed(0)
    theirs = torchvision.models.vit_b_32().eval()
    nn.init.normal_(theirs.heads.head.weight)
    ours = architectures.build("vit_b_32", 1000).eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(224)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_interpolated_positions_keep_their_order():
    """Positions that rise from left to right, or from top to bottom, do so at every size."""
    grid = torch.arange(16.0).repeat(16, 1)
    embedding = torch.cat([torch.full((1, 1, 2), 7.0), torch.stack([grid, grid.T], -1).reshape(1, 256, 2)], 1)
    for side in (5, 16, 31):
        positions = vit._interpolate(embedding, side, side, True)
        assert positions[0, 0].tolist() == [7, 7]
        columns, rows = positions[0, 1:].unflatten(0, (side, side)).unbind(-1)
        assert (columns.diff(dim=1) > 0).all() and columns.diff(dim=0).abs().max() < 1e-4
        assert (rows.diff(dim=0) > 0).all() and rows.diff(dim=1).abs().max() < 1e-4


def test_attention_of_the_class_token_in_the_last_block():
    torch.manual_seed(0)
    model, x = architectures.build("vit_128x3x2_8", 5).eval(), images(40)[:, :, :, :32]
    with torch.no_grad():
        attention = vit.attention_maps(model, x)
        inputs = []
        model.encoder.layers[-1].ln_1.register_forward_hook(lambda *call: inputs.append(call[-1]))
        model(x)
        layer = model.encoder.layers[-1].self_attention
        query, key, _ = (inputs[0] @ layer.in_proj_weight.T + layer.in_proj_bias).chunk(3, dim=-1)
        for head in range(2):
            part = slice(64 * head, 64 * head + 64)
            expected = (query[:, :1, part] @ key[:, :, part].mT / 8).softmax(-1)[:, 0, 1:]
            torch.testing.assert_close(attention[:, head].flatten(1), expected)
    assert attention.shape == (2, 2, 5, 4)


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("vit_s_16", vit.Size(384, 12, 6, 16, 1536)),
        ("vit_384x12x12_16", vit.Size(384, 12, 12, 16, 1536)),
        ("vit_s_16_glu_reg4_rope_eps1e-05", vit.Size(384, 12, 6, 16, 1536, True, 4, True, eps=1e-5)),
        ("vit_b_14_mlp1024_cubic_pre_quick", vit.Size(768, 12, 12, 14, 1024, **CLIP)),
    ],
)
def test_a_name_spells_the_size(arch, size):
    assert vit.parse(arch) == size and size.name == arch


@pytest.mark.parametrize("arch", ["vit_x_16", "vit_s_0", "vit_100x2x3_8", "vit_b_16x", ""])
def test_other_names_are_unknown(arch):
    assert vit.parse(arch) is None
    with pytest.raises(UserError, match="unknown architecture"):
        architectures.arch_name(arch)


def test_torchvision_names_the_same_networks():
    for arch in ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"):
        with torch.device("meta"):
            theirs, ours = torchvision.models.get_model(arch), vit.build(arch)
        shapes = ({name: value.shape for name, value in network.state_dict().items()} for network in (theirs, ours))
        assert next(shapes) == next(shapes)
        assert theirs.encoder.layers[0].num_heads == ours.encoder.layers[0].num_heads
