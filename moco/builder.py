"""MoCo: queries and keys from two views, a slowly moving key encoder, and a queue of past keys.

He, Fan, Wu, Xie & Girshick, Momentum Contrast for Unsupervised Visual Representation Learning (2020); the two-layer
head is from Chen, Fan, Girshick & He, Improved Baselines with Momentum Contrastive Learning (2020).
"""

import copy

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional

from moco.networks import architectures


class MoCo(nn.Module):
    """Maps two views of N images to logits over the positive key and K negative keys.

    base_encoder(num_classes=dim) returns a network with a linear head, such as torchvision's. Its dropout is disabled,
    because dropout would make the two views differ more than the augmentation does. dim: length of queries and keys.
    K: number of keys in the queue, a multiple of the images per step over all processes. m: momentum of the key
    encoder. T: temperature of the logits. mlp: a head of two layers instead of one. bn_splits: number of parts of a
    batch that batch norm normalizes separately.

    State dict: encoder_q, encoder_k, queue (dim, K), whose columns are keys, and queue_ptr (1,), the column of the
    oldest key.
    """

    def __init__(self, base_encoder, dim=128, K=65536, m=0.999, T=0.07, mlp=False, bn_splits=1):  # noqa: N803
        super().__init__()
        self.K = K
        self.m = m
        self.T = T
        self.encoder_q = base_encoder(num_classes=dim)
        architectures.disable_dropout(self.encoder_q)
        if mlp:
            name = architectures.head_name(self.encoder_q)
            head = architectures.head(self.encoder_q)
            hidden = nn.Linear(head.in_features, head.in_features)
            self.encoder_q.set_submodule(name, nn.Sequential(hidden, nn.ReLU(), head))
        if bn_splits > 1:
            split_batch_norm(self.encoder_q, bn_splits)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", functional.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q, im_k):
        """Logits (N, 1 + K), the positive key first, and targets (N,), all 0, for views im_q and im_k (N, 3, H, W).

        Each process passes its own N images and gets their logits. Updates the key encoder and the queue. ValueError
        if the images of all processes do not divide K.
        """
        self.encoder_k.train(self.training)  # it has no gradients, but its batch norm is not frozen
        queries = _unit(self.encoder_q(im_q))
        with torch.no_grad():
            self._momentum_update_key_encoder()
            keys, all_keys = self._keys(im_k)
        with torch.autocast(im_q.device.type, enabled=False):  # bf16 would round the logits to 0.06
            l_pos = (queries * keys).sum(1, keepdim=True)
            l_neg = queries @ self.queue.clone()  # the gradient needs the queue without the new keys
            logits = torch.cat([l_pos, l_neg], 1) / self.T
        self._dequeue_and_enqueue(all_keys)
        return logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device)

    def _momentum_update_key_encoder(self):
        """Move the key encoder towards the query encoder: k <- m k + (1 - m) q (He et al., 2020, eq. 2)."""
        torch._foreach_lerp_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.m)

    def _keys(self, images):
        """Keys (N, dim) of this process's images, and those of all processes in order of rank.

        Images are shuffled over processes and over the parts that batch norm normalizes separately. Otherwise a query
        and its key would share batch statistics, which alone would identify the key (He et al., 2020, section 3.3).
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        device = images.device.type
        if world > 1 and torch.is_autocast_enabled(device):  # as the first convolution would do: half the bytes to send
            images = images.to(torch.get_autocast_dtype(device))
        images = concat_all_gather(images, world)
        order = torch.randperm(len(images), device=images.device)
        if world > 1:
            dist.broadcast(order, 0)
        shuffled = _unit(self.encoder_k(images[order.view(world, -1)[rank]]))
        keys = concat_all_gather(shuffled, world)[order.argsort()]
        return keys.view(world, -1, keys.shape[1])[rank], keys

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys):
        """Replace the oldest keys in the queue by keys (N, dim); does not wait for the device."""
        if self.K % len(keys):
            raise ValueError(f"{len(keys)} keys per step do not divide a queue of {self.K}")
        columns = self.queue_ptr + torch.arange(len(keys), device=keys.device)
        self.queue.index_copy_(1, columns, keys.T)
        self.queue_ptr.add_(len(keys)).remainder_(self.K)


def _unit(vectors):
    """vectors (N, dim) scaled to unit length, in float32."""
    return functional.normalize(vectors.float(), dim=1)


def concat_all_gather(tensor, world):
    """The rows of tensor from all processes, in order of rank."""
    if world == 1:
        return tensor
    channels = -1 if tensor.is_contiguous(memory_format=torch.channels_last) else 1  # images stay channels last
    tensor = tensor.movedim(1, channels).contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(parts, tensor)
    return torch.cat(parts).movedim(channels, 1)


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm that normalizes parts of a training batch separately, as that many processes would.

    The running statistics are updated by the mean over the parts.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        means = self.running_mean.repeat(self.splits, 1)
        variances = self.running_var.repeat(self.splits, 1)
        parts = [
            functional.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            for part, mean, variance in zip(x.tensor_split(self.splits), means, variances, strict=True)
        ]
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        self.num_batches_tracked.add_(1)
        return torch.cat(parts)


def split_batch_norm(network, splits):
    """Make every BatchNorm2d of network a SplitBatchNorm."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__, module.splits = SplitBatchNorm, splits
