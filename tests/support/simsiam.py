"""SimSiam (Chen & He, 2021), as a user adds an objective: a head, a loss, and the trainer's page."""

import torch
from torch import nn
from torch.nn import functional

from moco.data import augment, loader
from moco.data.folders import FrameFolder
from moco.networks import architectures
from moco.training import engine
from moco.training.run import Run


class SimSiam(nn.Module):
    def __init__(self, arch, dim=16):
        super().__init__()
        self.encoder = architectures.build(arch, dim)
        self.predictor = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, views):
        z = [self.encoder(view) for view in views]
        return z, [self.predictor(each) for each in z]


def objective(model, images, _):
    (z1, z2), (p1, p2) = model(images)
    similarity = [functional.cosine_similarity(p, z.detach()).mean() for p, z in ((p1, z2), (p2, z1))]
    return -sum(similarity) / 2, {"std": functional.normalize(z1, dim=1).std(0).mean()}


def train(args, context):
    frames = FrameFolder(args.data)
    sampler = loader.EpochSampler(len(frames), args.batch_size, args.seed, context, drop_last=True)
    recipe = augment.RECIPES["moco_v2"]
    batches = loader.FrameLoader(frames, recipe, args.image_size, sampler, context.device, views=2)
    torch.manual_seed(args.seed)
    model = engine.prepare(SimSiam("shufflenet_v2_x0_5"), context, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    metadata = {"arch": "shufflenet_v2_x0_5", "images": len(frames)}
    run = Run(vars(args), context, model, optimizer, "simsiam_{epoch}.tar", metadata)
    for _ in run.epochs():
        run.end_epoch(engine.train_one_epoch(run, model, batches, optimizer, objective))
