"""MoCo equals the published one step by step, in one process and in two; batch statistics do not identify the keys."""

from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import distributed as dist
from torch import nn
from torch.nn import functional

from moco import distributed
from moco.builder import MoCo, SplitBatchNorm, split_batch_norm
from moco.networks import architectures
from tests.support import forked
from tests.support.golden import DATA
from tests.test_distributed import TWO_PROCESSES

pytestmark = pytest.mark.usefixtures("handlers")


class Encoder(nn.Module):
    """The encoder of the golden values: images to vectors of length num_classes."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Linear(6, num_classes)

    def forward(self, x):
        return self.fc(functional.relu(self.bn(self.conv(x))).mean((2, 3)))


def golden_moco(mlp, **options):
    """The MoCo of the golden values, with weights from the same frozen generator."""
    model = MoCo(Encoder, dim=8, K=32, m=0.9, T=0.2, mlp=mlp, **options)
    state, draws = model.state_dict(), np.random.RandomState(7)
    for name in sorted(state):
        if state[name].is_floating_point() and not name.startswith("encoder_k"):
            values = 0.5 * draws.randn(*state[name].shape)
            state[name].copy_(torch.from_numpy(abs(values) if name.endswith("running_var") else values))
    for name in state:
        if name.startswith("encoder_k"):
            state[name].copy_(state[name.replace("encoder_k", "encoder_q")])
    state["queue"].copy_(functional.normalize(state["queue"], dim=0))
    return model


def golden_steps(context, mlp, training):
    """Three steps on the inputs of the golden values: orders of the keys, logits, and the final state.

    training: False for batch norm in evaluation mode.
    """
    draws = np.random.RandomState(8)
    steps = {"orders": [torch.from_numpy(draws.permutation(8)) for _ in range(3)]}
    orders = iter(steps["orders"])
    original = torch.randperm
    torch.randperm = lambda count, device=None: next(orders)
    network = golden_moco(mlp)
    model = distributed.wrap(network, context).train(training)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(3):
        base = 4 * draws.randn(8, 3, 1, 1)
        images = [torch.from_numpy((base + draws.randn(8, 3, 16, 16)).astype(np.float32)) for _ in range(2)]
        logits, targets = model(*(view.chunk(context.world_size)[context.rank] for view in images))
        steps[f"logits_{step}"] = logits.detach()
        optimizer.zero_grad()
        functional.cross_entropy(logits, targets).backward()
        optimizer.step()
    torch.randperm = original
    return {**steps, "state": network.state_dict()}


CASES = [(0, True), (1, True), (1, False)]  # layers added to the head, batch norm in training mode


def all_cases(args, context):
    """Write the steps of one process in all cases to a file."""
    torch.save(
        [golden_steps(context, *case) for case in CASES], Path(args.out) / f"{context.world_size}_{context.rank}.tar"
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{(number of processes, *case): the steps of each process}."""
    folder = tmp_path_factory.mktemp("outcomes")
    args = Namespace(**{**vars(TWO_PROCESSES), "out": str(folder)})
    all_cases(args, distributed.ProcessContext())
    with forked.launches():
        assert distributed.launch(all_cases, args) == 0
    by_case = {}
    for world in (1, 2):
        by_process = [torch.load(folder / f"{world}_{rank}.tar") for rank in range(world)]
        by_case |= {(world, *case): each for case, each in zip(CASES, zip(*by_process, strict=True), strict=True)}
    return by_case


@pytest.mark.parametrize("mlp", [0, 1])
@pytest.mark.parametrize("world", [1, 2])
def test_three_steps_equal_the_published_ones(outcomes, world, mlp):
    golden = np.load(DATA / f"moco_world{world}_mlp{mlp}.npz")
    by_process = outcomes[world, mlp, True]
    assert np.array_equal(torch.stack(by_process[0]["orders"]), golden["perms"])
    for step in range(3):
        logits = torch.cat([each[f"logits_{step}"] for each in by_process])
        np.testing.assert_allclose(logits, golden[f"logits_{step}"], rtol=1e-4, atol=1e-5)
    state = by_process[0]["state"]
    state |= {f"encoder_{x}.fc": state[f"encoder_{x}.fc{'.2' * mlp}.weight"] for x in "qk"}
    for name in ("queue", "queue_ptr", "encoder_q.fc", "encoder_k.fc", "encoder_k.bn.running_mean"):
        np.testing.assert_allclose(state[name], golden[name], rtol=1e-4, atol=1e-6)


def test_two_processes_equal_one_when_batch_norm_is_in_evaluation_mode(outcomes):
    (single,), two = outcomes[1, 1, False], outcomes[2, 1, False]
    for step in range(3):
        both = torch.cat([each[f"logits_{step}"] for each in two])
        torch.testing.assert_close(both, single[f"logits_{step}"], rtol=1e-4, atol=1e-5)
    for name, value in single["state"].items():
        torch.testing.assert_close(two[0]["state"][name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(two[0]["state"][name], two[1]["state"][name])


def views(n=8, side=16):
    return torch.randn(n, 3, side, side), torch.randn(n, 3, side, side)


def test_the_queue_takes_the_newest_keys_and_wraps_around():
    torch.manual_seed(0)
    model = golden_moco(0).eval()
    before = model.queue.clone()
    written = []
    for step in range(6):
        query, key = views()
        logits, targets = model(query, key)
        keys = functional.normalize(model.encoder_k(key), dim=1)
        queries = functional.normalize(model.encoder_q(query), dim=1)
        l_pos = (queries * keys).sum(1, keepdim=True)
        torch.testing.assert_close(logits, torch.cat([l_pos, queries @ before], 1) / 0.2)
        assert targets.tolist() == [0] * 8
        written.append(keys.T)
        expected = before.clone()
        expected[:, step % 4 * 8 : step % 4 * 8 + 8] = keys.T
        torch.testing.assert_close(model.queue, expected)
        assert model.queue_ptr.tolist() == [(step + 1) % 4 * 8]
        before = model.queue.clone()
    torch.testing.assert_close(model.queue, torch.cat([written[i] for i in (4, 5, 2, 3)], 1))


def test_keys_that_do_not_divide_the_queue_are_refused():
    with pytest.raises(ValueError, match="6 keys per step do not divide a queue of 32"):
        golden_moco(0)(*views(6))


def test_the_gradient_reaches_the_query_encoder_only():
    model = golden_moco(1)
    functional.cross_entropy(*model(*views())).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.encoder_q.parameters())
    assert all(weight.grad is None and not weight.requires_grad for weight in model.encoder_k.parameters())
    assert not model.queue.requires_grad


def test_the_key_encoder_follows_and_keeps_its_batch_norm_in_training():
    model = golden_moco(0)
    with torch.no_grad():
        model.encoder_q.fc.weight += 1
    architectures.train_mode_keep_frozen_bn(model)  # as before every epoch; it puts frozen parts in evaluation mode
    before = model.encoder_k.fc.weight.clone()
    model(*views())
    torch.testing.assert_close(model.encoder_k.fc.weight, before + 0.1)
    assert model.encoder_k.bn.num_batches_tracked == 1


def test_accuracy_is_high_against_a_random_queue_then_low_then_rises_by_learning():
    """The two views of an image share only their red; green and blue are noise."""
    torch.manual_seed(0)
    model, hits = MoCo(Encoder, dim=8, K=160, m=0.98, T=0.2, mlp=True), []
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
    for _ in range(400):
        red = torch.randn(16, 1, 1, 1)
        colors = (torch.cat([red, torch.randn(16, 2, 1, 1)], 1) for _ in range(2))
        logits, targets = model(*(color + 0.3 * torch.randn(16, 3, 8, 8) for color in colors))
        optimizer.zero_grad()
        functional.cross_entropy(logits, targets).backward()
        optimizer.step()
        hits.append((logits.argmax(1) == targets).float().mean().item())
    first, filled, end = hits[0], np.mean(hits[10:30]), np.mean(hits[-50:])
    assert first > 0.6 and filled < 0.2 and end > 0.4, (first, filled, end)


@pytest.mark.parametrize("arch", ["mobilenet_v2", "resnet18", "efficientnet_b0", "vit_b_32", "vgg11"])
def test_any_architecture_gets_its_head(arch):
    with torch.device("meta"):
        model = MoCo(partial(torchvision.models.get_model, arch), dim=16, K=8, mlp=True)
    name = architectures.head_name(model.encoder_q).removesuffix(".2")
    head = model.encoder_q.get_submodule(name)
    assert head[0].in_features == head[0].out_features == head[2].in_features and head[2].out_features == 16
    assert f"encoder_k.{name}.2.bias" in model.state_dict()
    assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))


def test_split_batch_norm_normalizes_parts_separately():
    torch.manual_seed(0)
    plain, split = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    split_batch_norm(split, 3)
    images = torch.randn(8, 6, 5, 5)  # parts of 3, 3 and 2
    statistics = []
    for part, normalized in zip(images.tensor_split(3), split(images).tensor_split(3), strict=True):
        one = nn.BatchNorm2d(6)
        torch.testing.assert_close(one(part), normalized)
        statistics.append((one.running_mean, one.running_var))
    for running, parts in zip((split.running_mean, split.running_var), zip(*statistics, strict=True), strict=True):
        torch.testing.assert_close(running, torch.stack(parts).mean(0))
    assert split.num_batches_tracked == 1
    plain.load_state_dict(split.state_dict())
    torch.testing.assert_close(split.eval()(images), plain.eval()(images))


def test_keys_are_shuffled_over_the_parts_of_split_batch_norm():
    """Otherwise the statistics of a part would identify the keys in it."""
    torch.manual_seed(0)
    model = golden_moco(0, bn_splits=4)
    assert isinstance(model.encoder_q.bn, SplitBatchNorm) and isinstance(model.encoder_k.bn, SplitBatchNorm)
    seen = []
    model.encoder_k.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    query, key = views()
    logits, _ = model(query, key)
    (shuffled,) = seen
    order = [next(i for i in range(8) if torch.equal(key[i], image)) for image in shuffled]
    assert sorted(order) == list(range(8)) and order != list(range(8))
    keys = functional.normalize(model.encoder_k(shuffled), dim=1)[torch.tensor(order).argsort()]
    queries = functional.normalize(model.encoder_q(query), dim=1)
    torch.testing.assert_close(logits[:, 0], (queries * keys).sum(1) / 0.2)
    torch.testing.assert_close(model.queue[:, :8], keys.T)
    assert model.state_dict().keys() == golden_moco(0).state_dict().keys()


def test_images_are_gathered_in_the_precision_of_the_forward_pass(monkeypatch):
    """In bf16, half the bytes; the keys are those of float32 images, which the first convolution rounds alike."""
    gathered = []

    def all_gather(parts, tensor):
        gathered.append(tensor.dtype)
        for part in parts:
            part.copy_(tensor)

    for name, value in {"is_initialized": True, "get_rank": 0, "get_world_size": 2}.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist, "broadcast", lambda *_: None)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    model = MoCo(lambda num_classes: architectures.build("shufflenet_v2_x0_5", num_classes), dim=8, K=8).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        own, _ = model._keys(images)
        expected = functional.normalize(model.encoder_k(torch.cat([images, images])).float(), dim=1)
    assert gathered == [torch.bfloat16, torch.float32]
    assert torch.equal(own, expected[:2])
