"""DINO's loss, centre and head against lightly's, on the same inputs and weights."""

import pytest
import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead

from pretrain.methods.dino import DINO
from pretrain.mte import over_pairs

K = 96


def make_method(**values: object) -> DINO:
    return DINO(DINO.Settings(prototypes=K, **values))


@pytest.mark.parametrize("views", [2, 6])
@pytest.mark.parametrize("epoch", [0, 1, 4, 7])
def test_loss_gradient_and_centre_equal_lightly(views: int, epoch: int) -> None:
    torch.manual_seed(0)
    method = make_method(
        warmup_teacher_temperature=0.04, teacher_temperature=0.07, warmup_teacher_temperature_epochs=5, centre_momentum=0.9
    ).double()
    peer = DINOLoss(K, warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=5).double()
    peer.teacher_temp_schedule = torch.linspace(0.04, 0.07, 5, dtype=torch.float64)
    for _ in range(3):  # the centre of a step is the next one's
        teacher = torch.randn(2, 8, K, dtype=torch.float64)
        students = torch.randn(views, 8, K, dtype=torch.float64)
        ours, theirs = students.clone().requires_grad_(), students.clone().requires_grad_()
        loss = over_pairs(method, list(ours), [method.target(view, epoch) for view in teacher])
        expected = peer(list(teacher), list(theirs), epoch=epoch)
        loss.backward()
        expected.backward()
        method.update([teacher.flatten(0, 1)], [])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(method.centre, peer.center[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_head_equals_lightly(norm_last_layer: bool, batch_norm: bool) -> None:
    torch.manual_seed(0)
    method = make_method(hidden=64, bottleneck=32, norm_last_layer=norm_last_layer, batch_norm_in_head=batch_norm)
    head, tail = method.head(48, 1).double(), method.tail(student=True).double()
    peer = DINOProjectionHead(48, 64, 32, K, batch_norm=batch_norm, norm_last_layer=norm_last_layer).double()
    linear = [layer for layer in peer.layers if isinstance(layer, torch.nn.Linear)]
    with torch.no_grad():
        for ours, theirs in zip(head.layers, linear, strict=True):
            theirs.weight.copy_(ours.weight[0])
            if theirs.bias is not None:
                theirs.bias.copy_(ours.bias[0])
        peer.last_layer.weight_v.copy_(tail.weight_v)
        peer.last_layer.weight_g.copy_(tail.weight_g)
    x = torch.randn(10, 48, dtype=torch.float64)
    ours, theirs = tail(head(x.unsqueeze(0)).squeeze(0)), peer(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    target = torch.randn_like(ours)
    (ours * target).sum().backward()
    (theirs * target).sum().backward()
    torch.testing.assert_close(tail.weight_v.grad, peer.last_layer.weight_v.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(head.layers[0].weight.grad[0], peer.layers[0].weight.grad, rtol=1e-6, atol=1e-9)
    assert (tail.weight_g.grad is None) == norm_last_layer
    if not norm_last_layer:
        torch.testing.assert_close(tail.weight_g.grad, peer.last_layer.weight_g.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_independent_heads_equal_single_heads(batch_norm: bool) -> None:
    torch.manual_seed(0)
    method = make_method(hidden=64, bottleneck=32, batch_norm_in_head=batch_norm)
    stack, single = method.head(48, 5).double(), method.head(48, 1).double()
    x = torch.randn(5, 7, 48, dtype=torch.float64)
    together = stack(x)
    for copy in range(5):
        with torch.no_grad():
            for to, source in zip(single.layers, stack.layers, strict=True):
                to.weight.copy_(source.weight[copy : copy + 1])
                to.bias.copy_(source.bias[copy : copy + 1])
        torch.testing.assert_close(together[copy], single(x[copy : copy + 1])[0], rtol=1e-12, atol=1e-12)
    assert not torch.equal(stack.layers[0].weight[0], stack.layers[0].weight[1])


def test_prototypes_are_frozen_for_the_first_epochs_only() -> None:
    method = make_method(freeze_last_layer=2)

    class Branch(torch.nn.Module):
        tails = (method.tail(student=True),)

    assert len(list(method.without_gradient(Branch(), 1))) == 2
    assert not list(method.without_gradient(Branch(), 2))
