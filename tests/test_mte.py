"""Multi-Token Enhancing as the engine computes it, for a method that knows nothing of it."""

import itertools

import pytest
import torch

from benchmarks.formulas import SMALL, perturbed
from benchmarks.formulas import TINY as MODEL
from mte_bench.encoders.tokens import AuxiliaryTokens
from pretrain import mte
from pretrain.methods.dino import DINO
from pretrain.recipe import Recipe

TINY = {**MODEL, "method": "dino", "method_settings": SMALL}


def branches(recipe: Recipe) -> tuple[DINO, mte.Branch, mte.Branch]:
    torch.manual_seed(0)
    method = DINO(DINO.Settings(**recipe.method_settings))
    return method, *perturbed(recipe, method)


def forward(recipe: Recipe, groups: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    method, student, teacher = branches(recipe)
    method.double()
    targets = mte.targets(method, mte.teacher_vectors(teacher, groups, recipe), 0, recipe)
    return mte.loss(method, student(groups), targets, recipe)


def views(local: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    groups = [torch.randn(2, 4, 3, 32, 32, generator=generator, dtype=torch.float64)]
    return groups + ([torch.randn(local, 4, 3, 16, 16, generator=generator, dtype=torch.float64)] if local else [])


def test_plain_and_enhanced_runs_of_a_seed_start_from_the_same_weights() -> None:
    starts = []
    for recipe in (Recipe(**TINY), Recipe(**TINY, mte={})):
        torch.manual_seed(3)
        starts.append(mte.Branch(recipe, DINO(DINO.Settings(**recipe.method_settings)), student=True).state_dict())
    plain, enhanced = starts
    assert all(torch.equal(enhanced[name], value) for name, value in plain.items())


@pytest.mark.parametrize("local", [0, 3])
def test_teachers_global_token_as_target_gives_the_plain_loss(local: int) -> None:
    groups = views(local)
    plain = forward(Recipe(**TINY), groups)["loss"]
    enhanced = forward(Recipe(**TINY, mte={"target": "global", "weights": (0.0, 1.0)}), groups)
    torch.testing.assert_close(enhanced["loss_global"], plain, rtol=0, atol=0)
    torch.testing.assert_close(enhanced["loss"], plain, rtol=0, atol=0)


def test_equations_4_to_6_by_hand() -> None:
    recipe = Recipe(**TINY, mte={"auxiliary_cls": 2, "pooled": 3, "weights": (0.5, 0.5)})
    groups = views()
    method, student, teacher = branches(recipe)
    method.double()

    def vectors(branch: mte.Branch, view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(branch.auxiliary, AuxiliaryTokens)
        tokens, auxiliary = branch.auxiliary.encode(branch.encoder, view)
        projected = []
        for token in range(5):  # a loop over heads, each with its own matrices
            x = auxiliary[:, token]
            for index, layer in enumerate(branch.heads.layers):
                x = x @ layer.weight[token].T + layer.bias[token]
                x = torch.nn.functional.gelu(x) if index < 2 else x
            projected.append(x)
        return branch.tail(sum(projected) / 5), branch.tail(branch.head(tokens.global_token.unsqueeze(0))[0])

    fused, glob = zip(*(vectors(student, view) for view in groups[0]), strict=True)
    target = [torch.softmax(vectors(teacher, view)[0] / 0.04, -1) for view in groups[0]]

    def cross_entropy(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        terms = [-(target[q] * torch.log_softmax(outputs[v] / 0.1, -1)).sum(-1).mean() for q, v in ((0, 1), (1, 0))]
        return sum(terms) / 2

    targets = mte.targets(method, mte.teacher_vectors(teacher, groups, recipe), 0, recipe)
    found = mte.loss(method, student(groups), targets, recipe)
    torch.testing.assert_close(found["loss_fused"], cross_entropy(fused))
    torch.testing.assert_close(found["loss_global"], cross_entropy(glob))
    torch.testing.assert_close(found["loss"], (cross_entropy(fused) + cross_entropy(glob)) / 2)


def test_no_gradient_reaches_the_teacher_and_all_of_the_student() -> None:
    recipe = Recipe(**TINY, mte={})
    method, student, teacher = branches(recipe)
    method.double()
    targets = mte.targets(method, mte.teacher_vectors(teacher, views(2), recipe), 0, recipe)
    mte.loss(method, student(views(2)), targets, recipe)["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    without = [name for name, p in student.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []


VARIANTS = {
    "heads": ["independent", "shared"],
    "fusion": ["mean", "sum", "normalised-mean", "concat"],
    "pooling": ["shared-pointwise", "independent", "scalar", "average", "max", "tokenlearner", "tokenlearner-v1.1"],
    "sight": ["everything", "not-global", "not-each-other", "patches-and-self"],
    "pool_normalise": ["none", "sigmoid", "softmax"],
    "pool_input": ["normalised", "raw"],
    "ten_input": ["raw", "normalised"],
    "pool_activation": ["gelu", "none"],
    "local_views": ["both", "global"],
    "cut_attention": [True, False],
    "pooled_norm": [True, False],
    "ten": [True, False],
    "pooled": [0, 1],
    "auxiliary_cls": [0, 1],
    "ten_depth": [2],
    "fuse_global": [False, True],
    "tails": ["shared", "fused", "each"],
    "statistics": ["target", "both"],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in VARIANTS.items() for v in values])
def test_every_setting_trains(key: str, value: object) -> None:
    parts = forward(Recipe(**TINY, mte={key: value}), views(2))
    parts["loss"].backward()
    assert torch.isfinite(parts["loss"])


def test_every_setting_changes_the_loss() -> None:
    """A switch that changes nothing is not connected."""
    for key, values in VARIANTS.items():
        if key in ("heads", "ten_depth", "statistics"):
            continue
        if key == "fusion":  # prototypes normalise what they get, so that sum and mean agree by design
            values = ["mean", "normalised-mean", "concat"]
        losses = [forward(Recipe(**TINY, mte={key: value}), views(2))["loss_fused"].item() for value in values]
        for a, b in itertools.combinations(losses, 2):
            assert a != pytest.approx(b, rel=1e-9), (key, values, losses)
