"""How far the methods are from independent implementations: the largest difference of values and of gradients.

Same weights and inputs on both sides, float64, on a CPU; takes seconds. Differences are absolute, of numbers around 1.
Prints the table of ``docs/equality.md`` and, as its last line, one JSON object. Tests assert each row.

    python -m benchmarks.equality
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, DINOProjectionHead, MoCoProjectionHead
from lightly.models.utils import get_2d_sincos_pos_embed, update_momentum
from torch import Tensor, nn

from mte_bench.encoders.heads import StackedMLP
from pretrain.methods.base import Method
from pretrain.methods.byol import BYOL
from pretrain.methods.dino import DINO
from pretrain.methods.ibot import IBOT
from pretrain.methods.moby import MoBY
from pretrain.methods.mocov3 import MoCoV3, sine_cosine
from pretrain.mte import over_pairs
from pretrain.optimiser import EMA

WIDTH, HIDDEN, OUTPUT, BATCH, QUEUE = 48, 64, 96, 8, 24
Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Of the student's and the teacher's vectors of each view."""


class Difference(NamedTuple):
    """The largest absolute differences; ``gradient`` is None where there is nothing to differentiate."""

    value: float
    gradient: float | None


def largest(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest absolute difference within ``pairs`` of tensors with the same number of elements."""
    return max((ours.reshape(theirs.shape) - theirs).abs().max().item() for ours, theirs in pairs)


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
    method = IBOT(IBOT.Settings(prototypes=OUTPUT, warmup_teacher_temperature_epochs=0)).double()
    peer = IBOTPatchLoss(OUTPUT, teacher_temp=0.07).double()
    values, gradients = [], []
    for _ in range(4):
        masks = torch.rand(BATCH, 16) < 0.4
        masks[0] = False
        teacher = torch.randn(BATCH, 16, OUTPUT, dtype=torch.float64)
        own = torch.randn(int(masks.sum()), OUTPUT, dtype=torch.float64, requires_grad=True)
        other = own.detach().clone().requires_grad_()
        method.patch_centre.copy_(peer.center.value)
        ours = method.patch_loss(own, teacher, masks, 0)
        theirs = peer(teacher[masks], other, masks.view(BATCH, 4, 4), teacher_temp=torch.tensor(0.07, dtype=torch.float64))
        values.append((ours, theirs))
        gradients.append((torch.autograd.grad(ours, own)[0], torch.autograd.grad(theirs, other)[0]))
    return Difference(largest(values), largest(gradients))


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
    ("iBOT", "patch loss", "lightly `IBOTPatchLoss`"): ibot_patches,
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
