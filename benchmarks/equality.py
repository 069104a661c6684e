"""How far the methods are from independent implementations: the largest difference of values and of gradients.

Same weights and inputs on both sides, float64, on a CPU; takes seconds. Differences are absolute, of numbers around 1.
Prints the table of ``docs/equality.md`` and, as its last line, one JSON object. Tests assert each row.

    python -m benchmarks.equality
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, DINOProjectionHead, MoCoProjectionHead
from lightly.models.utils import get_2d_sincos_pos_embed, update_momentum
from timm.data.mixup import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from benchmarks.formulas import (
    SMALL,
    TINY,
    WITH_LABELS,
    Difference,
    hssl_step,
    ibot_step,
    largest,
    of_functions,
    supervised_step,
    token_fuser,
    token_learner,
    worst,
)
from mte_bench.encoders.encoder import EncoderSpec, build_encoder
from mte_bench.encoders.heads import StackedMLP
from mte_bench.encoders.tokens import TENLayer
from mte_bench.training.seeded import seeded
from pretrain.methods.base import Method
from pretrain.methods.byol import BYOL
from pretrain.methods.dino import DINO
from pretrain.methods.hssl import HSSL
from pretrain.methods.ibot import IBOT
from pretrain.methods.moby import MoBY
from pretrain.methods.mocov3 import MoCoV3, sine_cosine
from pretrain.methods.supervised import Supervised
from pretrain.mte import over_pairs
from pretrain.optimiser import EMA

WIDTH, HIDDEN, OUTPUT, BATCH, QUEUE = 48, 64, 96, 8, 24
Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Of the student's and the teacher's vectors of each view."""


def of_losses(ours: Loss, theirs: Loss, after: Callable[[Tensor], None] = lambda keys: None, steps: int = 8) -> Difference:
    """Of two losses over some steps; ``after`` gets the teacher's vectors of a step, ``2*b k``."""
    values, gradients = [], []
    for _ in range(steps):
        teacher = torch.randn(2, BATCH, OUTPUT, dtype=torch.float64)
        own = torch.randn(2, BATCH, OUTPUT, dtype=torch.float64, requires_grad=True)
        other = own.detach().clone().requires_grad_()
        values.append((ours(list(own), list(teacher)), theirs(list(other), list(teacher))))
        for value in values[-1]:
            value.backward()
        gradients.append((own.grad, other.grad))
        after(teacher.flatten(0, 1))
    return Difference(largest(values), largest(gradients))  # type: ignore[arg-type]


def of_modules(ours: nn.Module, theirs: nn.Module, shared: list[tuple[Tensor, Tensor]]) -> Difference:
    """Of two modules' outputs, and of the gradients of their inputs and of ``shared`` parameters, which are made equal."""
    with torch.no_grad():
        for own, other in shared:
            other.copy_(own.reshape(other.shape))
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    outputs = ours(x), theirs(y)
    direction = torch.randn_like(outputs[0])
    for output in outputs:
        (output * direction).sum().backward()
    gradients = [(a.grad, b.grad) for a, b in [(x, y), *shared] if a.requires_grad]
    return Difference(largest([outputs]), largest(gradients))  # type: ignore[arg-type]


class Rows(nn.Module):
    """A head of one copy (and a tail), ``b in`` to ``b out``."""

    def __init__(self, head: nn.Module, tail: nn.Module | None = None):
        super().__init__()
        self.head, self.tail = head, tail or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.head(x.unsqueeze(0)).squeeze(0))


def layers(ours: StackedMLP, theirs: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The parameters of an MLP and a peer's, for those that both have. A bias that only the peer has becomes 0.

    Before batch normalisation a bias changes nothing, so that it may be ours alone.
    """
    pairs = []
    for kind, own in ((nn.Linear, list(ours.layers)), (nn.BatchNorm1d, [n for n in ours.norms if n.state_dict()])):
        others = [layer for layer in theirs.modules() if isinstance(layer, kind)]
        for a, b in zip(own, others[: len(own)], strict=True):
            for name in ("weight", "bias"):
                mine, other = getattr(a, name), getattr(b, name)
                if kind is nn.BatchNorm1d:
                    nn.init.normal_(mine, 1, 0.1)
                if mine is not None and other is not None:
                    pairs.append((mine, other))
                elif other is not None:
                    nn.init.zeros_(other)
    return pairs


def of_mlps(ours: nn.Module, theirs: nn.Module) -> Difference:
    """Of a head or a predictor and a peer's."""
    assert isinstance(ours, StackedMLP)
    ours, theirs = ours.double(), theirs.double()
    rows = Rows(ours) if type(ours) is StackedMLP else ours
    return of_modules(rows, theirs, layers(ours, theirs))


def engine(method: Method, epoch: int = 0) -> Loss:
    """A method's loss as it is trained with."""
    return lambda student, teacher: over_pairs(method, student, [method.target(view, epoch) for view in teacher])


def dino_loss() -> Difference:
    values = {"teacher_temperature": 0.07, "warmup_teacher_temperature_epochs": 5, "centre_momentum": 0.9}
    method = DINO(DINO.Settings(prototypes=OUTPUT, **values)).double()
    peer = DINOLoss(OUTPUT, warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=5).double()
    peer.teacher_temp_schedule = torch.linspace(0.04, 0.07, 5, dtype=torch.float64)
    return of_losses(engine(method, 2), lambda own, keys: peer(keys, own, epoch=2), after=lambda keys: method.update([keys], []))


def dino_head() -> Difference:
    method = DINO(DINO.Settings(prototypes=OUTPUT, hidden=HIDDEN, bottleneck=16, norm_last_layer=False))
    head, tail = method.head(WIDTH, 1).double(), method.tail(student=True).double()
    peer = DINOProjectionHead(WIDTH, HIDDEN, 16, OUTPUT, norm_last_layer=False).double()
    assert isinstance(head, StackedMLP)
    prototypes = [(getattr(tail, name), getattr(peer.last_layer, name)) for name in ("weight_v", "weight_g")]
    return of_modules(Rows(head, tail), peer, [*layers(head, peer.layers), *prototypes])


def ibot_patches() -> Difference:
    """In and after the warm-up of the temperature.

    The peer's centre sees masked patches only, so ours is put in; its weights of patches are float32, which is exact where
    the masked patches of an image are a power of 2.
    """
    method = IBOT(IBOT.Settings(prototypes=OUTPUT, warmup_teacher_temperature_epochs=6)).double()
    peer = IBOTPatchLoss(OUTPUT).double()
    counts = torch.tensor([0, 1, 2, 4, 8, 16, 4, 2])  # an image without masks adds nothing, and counts
    values, gradients = [], []
    for epoch in (0, 3, 5, 9):
        temperature = torch.linspace(0.04, 0.07, 6, dtype=torch.float64)[min(epoch, 5)]
        masks = torch.rand(BATCH, 16).argsort(1) < counts.unsqueeze(1)
        teacher = torch.randn(BATCH, 16, OUTPUT, dtype=torch.float64)
        own = torch.randn(int(masks.sum()), OUTPUT, dtype=torch.float64, requires_grad=True)
        other = own.detach().clone().requires_grad_()
        peer.center.center = method.patch_centre.clone()
        ours = method.patch_loss(own, teacher, masks, epoch)
        theirs = peer(teacher[masks], other, masks.view(BATCH, 4, 4), teacher_temp=temperature)
        values.append((ours, theirs))
        gradients.append((torch.autograd.grad(ours, own)[0], torch.autograd.grad(theirs, other)[0]))
        centre = 0.9 * method.patch_centre + 0.1 * teacher.mean(1).mean(0)
        method.update([torch.randn(2 * BATCH, OUTPUT, dtype=torch.float64)], [teacher])
        values.append((method.patch_centre.clone(), centre))
    return Difference(largest(values), largest(gradients))


def hssl_companion() -> Difference:
    """Three blocks on an encoder's patch map; the peer's first block loses its shortcut by subtraction."""
    spec = EncoderSpec(**{key: TINY[key] for key in ("arch", "image_size", "patch_size")}, options=TINY["arch_options"])
    encoder = build_encoder(spec).double()
    companion: Any = HSSL(HSSL.Settings(**SMALL)).companion(encoder, 0.0).double()
    peers: list[Any] = [ConvNeXtBlock(24, ls_init_value=None, norm_layer=nn.LayerNorm).double() for _ in range(3)]
    weights: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for ours, theirs in zip(companion.blocks, peers, strict=True):
            layers = ((ours.depthwise, theirs.conv_dw), (ours.norm, theirs.norm))
            for own, other in (*layers, (ours.mlp[0], theirs.mlp.fc1), (ours.mlp[2], theirs.mlp.fc2)):
                for parameter in own.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
                other.load_state_dict(own.state_dict())
                weights += zip(own.parameters(), other.parameters(), strict=True)
            assert theirs.norm.eps == ours.norm.eps == 1e-5
    tokens = encoder(torch.randn(3, 3, 32, 32, dtype=torch.float64))
    x = tokens.raw_patches.transpose(1, 2).reshape(3, 24, 4, 4)
    x = peers[2](peers[1](peers[0](x) - x)).mean((2, 3))
    found = companion(tokens)
    expected = nn.functional.layer_norm(x, (24,), companion.norm.weight, companion.norm.bias, 1e-6)
    direction = torch.randn_like(found)
    embedding: Any = encoder.model.pos_embed
    own, other = (
        torch.autograd.grad((out * direction).sum(), [embedding, *(pair[side] for pair in weights)], retain_graph=True)
        for side, out in enumerate((found, expected))
    )
    return Difference(largest([(found, expected)]), largest(zip(own, other, strict=True)))


def supervised_loss() -> Difference:
    peer = SoftTargetCrossEntropy()
    return of_losses(
        engine(Supervised(Supervised.Settings(), OUTPUT)),
        lambda own, keys: (peer(own[0], keys[0].softmax(-1)) + peer(own[1], keys[1].softmax(-1))) / 2,
    )


def supervised_smoothing() -> Difference:
    """Smoothed by 1/8 over 32 classes, which float32, as timm's targets are, holds exactly."""
    method, labels = Supervised(Supervised.Settings(mixup=0, cutmix=0, smoothing=0.125), 32), torch.randint(32, (7,))
    images = torch.randn(1, 7, 3, 8, 8)
    same, targets = method.labels(images, labels, 3)
    own = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    other = own.detach().clone().requires_grad_()
    ours, theirs = over_pairs(method, [own], [targets]), LabelSmoothingCrossEntropy(0.125)(other, labels)
    gradients = torch.autograd.grad(ours, own)[0], torch.autograd.grad(theirs, other)[0]
    return Difference(largest([(ours, theirs), (same, images)]), largest([gradients]))


def supervised_mixing() -> Difference:
    """Images and targets of mixup and CutMix, over the seeds of 40 steps."""
    method, peer = Supervised(Supervised.Settings(), OUTPUT), Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=OUTPUT)
    images, labels = torch.randn(1, BATCH, 3, 16, 16), torch.randint(OUTPUT, (BATCH,))
    pairs: list[tuple[Tensor, Tensor]] = []
    for seed in range(40):
        with seeded(seed):
            theirs = peer(images[0].clone(), labels)
        pairs += zip(method.labels(images.clone(), labels, seed), theirs, strict=True)
    return Difference(largest(pairs), None)


def ten() -> Difference:
    layer = TENLayer(24, heads=3, mlp_ratio=4.0).double()
    peer = nn.MultiheadAttention(24, 3, batch_first=True).double()

    def with_peer(aux: Tensor, patches: Tensor) -> Tensor:
        projections = [layer.query.weight, *layer.key_value.weight.chunk(2)]
        weights = {"in_proj_weight": torch.cat(projections), "in_proj_bias": torch.cat([layer.query.bias, layer.key_value.bias])}
        weights |= {"out_proj.weight": layer.project.weight, "out_proj.bias": layer.project.bias}
        queries, seen = layer.norm_query(aux), layer.norm_patches(patches)
        aux = aux + torch.func.functional_call(peer, weights, (queries, seen, seen))[0]
        return aux + layer.mlp(layer.norm_mlp(aux))

    return of_functions(
        layer, layer, with_peer, torch.randn(2, 4, 24, dtype=torch.float64), torch.randn(2, 9, 24, dtype=torch.float64)
    )


def byol_loss() -> Difference:
    cosine = NegativeCosineSimilarity()
    return of_losses(
        engine(BYOL(BYOL.Settings())),
        lambda own, keys: 2 + 2 * cosine(own[0], keys[1]) + 2 + 2 * cosine(own[1], keys[0]),
    )


def moco_loss() -> Difference:
    """Against the definition, image by image: -log of the softmax of cosines, times twice the temperature."""
    temperature = 0.2

    def formula(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for query, key in ((queries[0], keys[1]), (queries[1], keys[0])):
            for index, row in enumerate(query):
                shares = [torch.exp(torch.dot(row, other) / (row.norm() * other.norm()) / temperature) for other in key]
                total = total - torch.log(shares[index] / sum(shares)) / len(query) * 2 * temperature
        return total

    return of_losses(engine(MoCoV3(MoCoV3.Settings())), formula)


def moby_loss() -> Difference:
    """Over steps that fill the queues more than twice."""
    method = MoBY(MoBY.Settings(output=OUTPUT, queue=QUEUE)).double()
    peers = [NTXentLoss(temperature=0.2, memory_bank_size=(QUEUE, OUTPUT)).double() for _ in range(2)]
    for peer, queue in zip(peers, method.queues, strict=True):
        peer.memory_bank.bank = queue.clone()
    return of_losses(
        engine(method),
        lambda own, keys: peers[1](own[0], keys[1]) + peers[0](own[1], keys[0]),
        after=lambda keys: method.update([keys], []),
    )


def moco_positions() -> Difference:
    """The peer's table begins with the column. Ours is float32, as the reference's."""
    peer = torch.from_numpy(get_2d_sincos_pos_embed(WIDTH, 7, cls_token=False)).chunk(2, dim=1)
    return Difference(largest([(sine_cosine(7, 7, WIDTH), torch.cat([peer[1], peer[0]], dim=1))]), None)


def ema() -> Difference:
    student, ours = nn.Linear(WIDTH, OUTPUT).double(), nn.Linear(WIDTH, OUTPUT).double()
    theirs = nn.Linear(WIDTH, OUTPUT).double()
    theirs.load_state_dict(ours.state_dict())
    for momentum in (0.99, 0.996, 1.0):
        EMA(ours, student).update(momentum)
        update_momentum(student, theirs, momentum)
    return Difference(largest(zip(ours.parameters(), theirs.parameters(), strict=True)), None)


SIZES = {"hidden": HIDDEN, "output": WIDTH}
PEER_SIZES = (WIDTH, HIDDEN, WIDTH)
COMPARISONS: dict[tuple[str, str, str], Callable[[], Difference]] = {
    ("DINO", "loss and centre", "lightly `DINOLoss`"): dino_loss,
    ("DINO", "head and prototypes", "lightly `DINOProjectionHead`"): dino_head,
    ("iBOT", "patch loss and centre", "lightly `IBOTPatchLoss`"): ibot_patches,
    ("iBOT", "whole step", "the formula"): lambda: worst(ibot_step(local) for local in (0, 2)),
    ("BYOL", "loss", "lightly `NegativeCosineSimilarity`"): byol_loss,
    ("BYOL", "projection", "lightly `BYOLProjectionHead`"): lambda: of_mlps(
        BYOL(BYOL.Settings(**SIZES)).head(WIDTH, 1), BYOLProjectionHead(*PEER_SIZES)
    ),
    ("BYOL", "predictor", "lightly `BYOLPredictionHead`"): lambda: of_mlps(
        BYOL(BYOL.Settings(**SIZES)).tail(student=True), BYOLPredictionHead(*PEER_SIZES)
    ),
    ("MoCo v3", "loss", "the definition, image by image"): moco_loss,
    ("MoCo v3", "projection", "lightly `MoCoProjectionHead`, 3 layers"): lambda: of_mlps(
        MoCoV3(MoCoV3.Settings(**SIZES)).head(WIDTH, 1), MoCoProjectionHead(*PEER_SIZES, num_layers=3, batch_norm=True)
    ),
    ("MoCo v3", "predictor", "lightly `MoCoProjectionHead`, 2 layers"): lambda: of_mlps(
        MoCoV3(MoCoV3.Settings(**SIZES)).tail(student=True), MoCoProjectionHead(*PEER_SIZES, num_layers=2, batch_norm=True)
    ),
    ("MoCo v3", "table of positions", "lightly `get_2d_sincos_pos_embed`, column first"): moco_positions,
    ("MoBY", "loss and queues", "lightly `NTXentLoss`, a memory bank per view"): moby_loss,
    ("MoBY", "projection", "lightly `BYOLProjectionHead`"): lambda: of_mlps(
        MoBY(MoBY.Settings(**SIZES)).head(WIDTH, 1), BYOLProjectionHead(*PEER_SIZES)
    ),
    ("MoBY", "predictor", "lightly `BYOLPredictionHead`"): lambda: of_mlps(
        MoBY(MoBY.Settings(**SIZES)).tail(student=True), BYOLPredictionHead(*PEER_SIZES)
    ),
    ("HSSL", "companion", "timm `ConvNeXtBlock`"): hssl_companion,
    ("HSSL", "whole step, plain and with MTE", "the formula"): lambda: worst(
        hssl_step(local, enhanced) for local in (0, 2) for enhanced in (False, True)
    ),
    ("Supervised", "loss", "timm `SoftTargetCrossEntropy`"): supervised_loss,
    ("Supervised", "smoothed labels", "timm `LabelSmoothingCrossEntropy`"): supervised_smoothing,
    ("Supervised", "mixup and CutMix", "timm `Mixup`"): supervised_mixing,
    ("Supervised", "whole step, plain and equations 7 to 9", "the formula"): lambda: worst(map(supervised_step, WITH_LABELS)),
    ("MTE", "TEN", "torch `MultiheadAttention`"): ten,
    ("TokenLearner", "v1", "the formula"): lambda: token_learner("v1"),
    ("TokenLearner", "v1.1", "the formula"): lambda: token_learner("v1.1"),
    ("TokenLearner", "TokenFuser", "the formula"): token_fuser,
    ("all", "EMA of the teacher", "lightly `update_momentum`"): ema,
}


def main() -> None:
    rows = []
    print("| method | part | peer | value | gradient |\n|---|---|---|---:|---:|")
    for (method, part, peer), compare in COMPARISONS.items():
        torch.manual_seed(0)
        value, gradient = compare()
        print(f"| {method} | {part} | {peer} | {value:.0e} | {'' if gradient is None else f'{gradient:.0e}'} |")
        rows.append({"method": method, "part": part, "peer": peer, "value": value, "gradient": gradient})
    print(json.dumps({"benchmark": "equality", "differences": rows}))


if __name__ == "__main__":
    main()
