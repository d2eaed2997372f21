"""Sums of losses and hits over many steps, which stay on the device until somebody looks at them."""

import torch

from moco import distributed
from moco.cli import UserError


def new(device):
    """Empty totals (5,): sum of losses, correct among the first 1 and 5, images, the first step not finite."""
    return torch.zeros(5, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def count(totals, loss, logits, targets, step=0):
    """Add a step to totals: its mean loss, and logits (N, K) for targets (N,)."""
    hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
    totals[0] += loss * len(targets)
    totals[1] += hits[:, 0].sum()
    totals[2] += hits.sum()
    totals[3] += len(targets)
    totals[4] = torch.where((totals[4] == 0) & ~loss.isfinite(), step + 1, totals[4])


def averages(totals, context):
    """Mean loss, top-1 %, top-5 % and the number of images, over exactly the images that all processes saw.

    UserError where they saw none.
    """
    loss, top1, top5, images, _ = distributed.all_reduce_sum(totals, context).tolist()
    if not images:
        raise UserError("not one of the images can be read; the lines above say why")
    return {"loss": loss / images, "acc1": 100 * top1 / images, "acc5": 100 * top5 / images, "images": int(images)}
