"""MoCo: queries and keys of two views, a key encoder that follows the query encoder slowly, and a queue of past keys.

The design is He, Fan, Wu, Xie & Girshick's (Momentum Contrast for Unsupervised Visual Representation Learning, 2020),
with the two-layer head of Chen, Fan, Girshick & He (Improved Baselines with Momentum Contrastive Learning, 2020).
"""

import copy

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional

from moco import models


class MoCo(nn.Module):
    """Two views of N images to their logits over the right key and K keys of other images.

    base_encoder(num_classes=dim) gives a network with a linear head, such as torchvision's; dropout in it is turned
    off, which would set the two views apart more than the augmentation does. dim: length of queries and keys. K: keys
    in the queue, a multiple of the images a step of all processes. m: momentum of the key encoder. T: temperature of
    the logits. mlp: two layers in the head instead of one. bn_splits: parts of a batch that batch norm normalizes each
    on its own.

    In a state dict: encoder_q, encoder_k, queue (dim, K), whose columns are keys, and queue_ptr (1,), the column of the
    oldest one.
    """

    def __init__(self, base_encoder, dim=128, K=65536, m=0.999, T=0.07, mlp=False, bn_splits=1):  # noqa: N803
        super().__init__()
        self.K, self.m, self.T = K, m, T
        self.encoder_q = base_encoder(num_classes=dim)
        for module in self.encoder_q.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0
        if mlp:
            name, head = models.head_name(self.encoder_q), models.head(self.encoder_q)
            hidden = nn.Linear(head.in_features, head.in_features)
            self.encoder_q.set_submodule(name, nn.Sequential(hidden, nn.ReLU(), head))
        if bn_splits > 1:
            split_batch_norm(self.encoder_q, bn_splits)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", functional.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q, im_k):
        """Logits (N, 1 + K), the right key's first, and targets (N,), all 0, of the views im_q and im_k (N, 3, H, W).

        Each process gives its own N images and gets their logits. The key encoder and the queue go on by one step.
        ValueError if the images of all processes do not divide K.
        """
        self.encoder_k.train(self.training)  # it takes no gradient, but its batch norm is not frozen
        queries = _unit(self.encoder_q(im_q))
        with torch.no_grad():
            self._momentum_update_key_encoder()
            keys, new = self._keys(im_k)
        with torch.autocast(im_q.device.type, enabled=False):  # bf16 would round the logits to 0.06
            right = (queries * keys).sum(1, keepdim=True)
            others = queries @ self.queue.clone()  # the gradient needs the queue as it is before the new keys
            logits = torch.cat([right, others], 1) / self.T
        self._dequeue_and_enqueue(new)
        return logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device)

    def _momentum_update_key_encoder(self):
        """Move the key encoder towards the query encoder: k <- m k + (1 - m) q (He et al., 2020, eq. 2)."""
        torch._foreach_lerp_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.m)

    def _keys(self, images):
        """Keys of this process's images, (N, dim), and of those of all processes in order.

        Every process, and every part that batch norm normalizes on its own, encodes a random choice of all images:
        else a query and its key would share batch statistics, and could be matched by those alone (ibid., section 3.3).
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        images = concat_all_gather(images, world)
        order = torch.randperm(len(images), device=images.device)
        if world > 1:
            dist.broadcast(order, 0)
        shuffled = _unit(self.encoder_k(images[order.view(world, -1)[rank]]))
        keys = concat_all_gather(shuffled, world)[order.argsort()]
        return keys.view(world, -1, keys.shape[1])[rank], keys

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys):
        """Put keys (N, dim) in the place of the oldest ones, without waiting for the device to say where that is."""
        if self.K % len(keys):
            raise ValueError(f"{len(keys)} keys a step do not divide a queue of {self.K}")
        columns = self.queue_ptr + torch.arange(len(keys), device=keys.device)
        self.queue.index_copy_(1, columns, keys.T)
        self.queue_ptr.add_(len(keys)).remainder_(self.K)


def _unit(vectors):
    """vectors (N, dim) of length 1, in float32."""
    return functional.normalize(vectors.float(), dim=1)


def concat_all_gather(tensor, world):
    """The rows of tensor of all processes, in the order of their ranks."""
    if world == 1:
        return tensor
    channels = -1 if tensor.is_contiguous(memory_format=torch.channels_last) else 1  # images stay channels last
    tensor = tensor.movedim(1, channels).contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(parts, tensor)
    return torch.cat(parts).movedim(channels, 1)


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm that in training normalizes parts of the batch each on its own, as so many processes would.

    The running statistics take the mean over the parts.
    """

    def __init__(self, splits, features, **options):
        super().__init__(features, **options)
        self.splits = splits

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        sizes = [len(range(part, len(x), self.splits)) for part in range(self.splits)]
        means, variances = self.running_mean.repeat(self.splits, 1), self.running_var.repeat(self.splits, 1)
        parts = [
            functional.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            for part, mean, variance in zip(x.split(sizes), means, variances, strict=True)
        ]
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        self.num_batches_tracked.add_(1)
        return torch.cat(parts)


def split_batch_norm(network, splits):
    """Put a SplitBatchNorm in the place of every BatchNorm2d of network."""
    norms = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for name, norm in norms:
        split = SplitBatchNorm(splits, norm.num_features, eps=norm.eps, momentum=norm.momentum)
        split.load_state_dict(norm.state_dict())
        network.set_submodule(name, split)
