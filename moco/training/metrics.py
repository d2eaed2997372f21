"""Running sums of the loss and of an objective's metrics, kept on the device until somebody reads them."""

import torch

from moco import distributed
from moco.cli import UserError


def topk_accuracy(logits, targets, k=1):
    """The share in % of the rows of logits (N, K) whose k largest include the target (N,), as a 0-d tensor.

    With fewer than k classes it is 100.
    """
    top = logits.topk(min(k, logits.shape[1])).indices
    return 100 * (top == targets[:, None]).any(1).float().mean()


class MetricSums:
    """Sums over the images of an epoch, from which averages over all images of all processes follow.

    names: metrics that are known beforehand. Every process must have the same ones when sums are reduced, so that a
    process which may get no images needs them.
    """

    def __init__(self, device, names=()):
        self.device, self.names = device, names
        # float64 sums of a float32 mean times its images are exact, whatever their order; MPS has float32 only.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.reset()

    def reset(self):
        """Begin a new epoch."""
        self.sums = {name: torch.zeros((), dtype=self.dtype, device=self.device) for name in self.names}
        self.images = 0
        self.nonfinite_step = torch.zeros((), dtype=torch.int64, device=self.device)  # the first one, from 1; 0: none

    def update(self, loss, metrics, images, step=0):
        """Add a step: its mean loss and mean metrics {name: 0-d tensor}, over a number of images."""
        for name, mean in {"loss": loss, **metrics}.items():
            self.sums[name] = self.sums.get(name, 0) + mean.detach().to(self.dtype) * images
        self.images += images
        is_first = (self.nonfinite_step == 0) & ~loss.detach().isfinite()
        self.nonfinite_step = torch.where(is_first, step + 1, self.nonfinite_step)

    def all_reduce(self, context):
        """The sums over all processes: {name: float, "images": int}. Waits for the device."""
        sums = [*self.sums.values(), torch.tensor(self.images, dtype=self.dtype, device=self.device)]
        *totals, images = distributed.all_reduce_sum(torch.stack(sums), context).tolist()
        return {**dict(zip(self.sums, totals, strict=True)), "images": int(images)}

    def averages(self, context):
        """Mean loss and metrics over exactly the images that all processes saw, and the number of these images.

        Raises UserError where there were none.
        """
        totals = self.all_reduce(context)
        images = totals.pop("images")
        if not images:
            raise UserError("none of the images can be read; see the lines above for the reasons")
        return {**{name: total / images for name, total in totals.items()}, "images": images}

    def load(self, totals):
        """Continue from the sums of all_reduce."""
        self.reset()
        self.images = totals["images"]
        self.sums = {
            name: torch.tensor(total, dtype=self.dtype, device=self.device)
            for name, total in totals.items()
            if name != "images"
        }
