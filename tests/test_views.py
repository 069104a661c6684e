"""Views: torchvision's pixels on PIL images bit for bit, its distributions, and randomness that depends on the view alone."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import stats
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from mte_bench.data.draws import NUMBERS, TRIES, Draws, clamped_box
from mte_bench.data.sources import ImageSet
from mte_bench.data.transforms import normalise
from mte_bench.errors import CorruptImage, UserError
from pretrain import pixels, views
from pretrain.recipe import View, Views
from pretrain.views import ORDERS, choose, draw_views, make_views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES = [(1, 17, 23), (6, 16, 16), (3, 1, 5), (40, 9, 11)]


def some_planes(n: int, h: int, w: int, seed: int = 0) -> np.ndarray:
    """Half noise, half smooth pictures with flat and saturated parts."""
    draw = np.random.default_rng(seed)
    planes = draw.integers(0, 256, (3, n, h, w), dtype=np.uint8)
    for i in range(0, n, 2):
        small = Image.fromarray(draw.integers(-90, 346, (3, 3, 3)).clip(0, 255).astype(np.uint8))
        planes[:, i] = np.asarray(small.resize((w, h), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    return planes


def to_pil(planes: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(np.ascontiguousarray(image)) for image in planes.transpose(1, 2, 3, 0)]


def from_pil(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).transpose(3, 0, 1, 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_blends_equal_torchvision(name, shape):
    planes = some_planes(*shape)
    adjust = getattr(F, f"adjust_{name}")
    for low, high in ((0, 1), (1, 1.4), (0.2, 3)):
        factors = np.random.default_rng(1).uniform(low, high, shape[0]).astype(np.float32)
        expected = from_pil([adjust(image, float(factor)) for image, factor in zip(to_pil(planes), factors, strict=True)])
        np.testing.assert_array_equal(getattr(pixels, name)(planes, factors), expected)


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_blends_at_their_ends(factor):
    planes = some_planes(2, 8, 8)
    for name in ("brightness", "contrast", "saturation"):
        expected = from_pil([getattr(F, f"adjust_{name}")(image, factor) for image in to_pil(planes)])
        np.testing.assert_array_equal(getattr(pixels, name)(planes, np.full(2, factor, np.float32)), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_hue_grayscale_and_solarize_equal_torchvision(shape):
    planes = some_planes(*shape)
    images = to_pil(planes)
    turns = np.random.default_rng(1).uniform(-0.5, 0.5, shape[0])
    shifts = np.array([int(turn * 255) & 255 for turn in turns], np.uint8)
    turned = [F.adjust_hue(image, float(turn)) for image, turn in zip(images, turns, strict=True)]
    np.testing.assert_array_equal(pixels.hue(planes, shifts), from_pil(turned))
    np.testing.assert_array_equal(pixels.grayscale(planes), from_pil([F.to_grayscale(image, 3) for image in images]))
    for threshold in (0, 1, 128, 256):
        np.testing.assert_array_equal(pixels.solarize(planes, threshold), from_pil([F.solarize(i, threshold) for i in images]))


def test_hue_is_exact_for_every_colour():
    levels = np.arange(256, dtype=np.uint8)
    planes = np.empty((3, 1, 256, 256), np.uint8)
    planes[0, 0], planes[1, 0] = levels[:, None], levels
    for blue in levels:
        planes[2] = blue
        turn = (int(blue) - 128) / 256  # all turns are met on the way
        expected = np.asarray(F.adjust_hue(to_pil(planes)[0], turn)).transpose(2, 0, 1)
        shift = np.array([int(turn * 255) & 255], np.uint8)
        assert (pixels.hue(planes, shift)[:, 0] == expected).all(), blue


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("high", [0.3, 2.0, 6.0])
def test_blur_equals_pil(shape, high):
    planes = some_planes(*shape)
    radii = np.random.default_rng(1).uniform(0.05, high, shape[0])
    filters = [ImageFilter.GaussianBlur(float(radius)) for radius in radii]
    expected = from_pil([image.filter(blur) for image, blur in zip(to_pil(planes), filters, strict=True)])
    np.testing.assert_array_equal(pixels.gaussian_blur(planes, radii.astype(np.float32)), expected)


def by_torchvision(image: Image.Image, view: View, choices: views.Choices) -> torch.Tensor:
    """The reference's chain with given choices: its order, and torchvision's operations on PIL images throughout."""
    left, top, right, bottom = choices.box
    size, mode = [view.size, view.size], InterpolationMode(view.interpolation)
    image = F.resized_crop(image, top, left, bottom - top, right - left, size, mode)
    if choices.flip:
        image = F.hflip(image)
    if choices.order >= 0:
        adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for operation in ORDERS[choices.order]:
            image = adjust[operation](image, choices.factors[operation])
    if choices.grayscale:
        image = F.to_grayscale(image, 3)
    if choices.blur:
        image = image.filter(ImageFilter.GaussianBlur(choices.blur))
    if choices.solarize:
        image = F.solarize(image, view.solarize_threshold)
    return F.normalize(F.to_tensor(image), MEAN, STD)


@pytest.mark.parametrize(("size", "local"), [(32, 12), (75, 96)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_whole_views_equal_the_reference_chain(size, local, interpolation):
    common = {"interpolation": interpolation, "solarize": 0.5}
    settings = Views(
        global1=View(size=size, blur=1.0, **common),
        global2=View(size=size, blur=0.1, **common),
        local=View(size=local, scale=(0.05, 0.4), blur=0.5, **common),
        local_count=3,
    )
    images = [to_pil(some_planes(1, 20 + 3 * i, 90 - 4 * i, seed=i))[0] for i in range(8)]
    images += [to_pil(some_planes(1, size, size, seed=9))[0]]
    keys = [(2, 100 + i) for i in range(len(images))]
    made = [normalise(group, MEAN, STD) for group in make_views(images, keys, settings, Draws(3))]
    assert [group.shape for group in made] == [(2, 9, 3, size, size), (3, 9, 3, local, local)]
    specs = [settings.global1, settings.global2] + [settings.local] * 3
    for i, (image, key) in enumerate(zip(images, keys, strict=True)):
        ours = [view[i] for group in made for view in group]
        for view, spec, numbers in zip(ours, specs, Draws(3).views(*key, 5), strict=True):
            assert torch.equal(view, by_torchvision(image, spec, choose(spec, image.size, numbers)))


def test_jitter_of_strength_zero_is_left_out():
    view = View(size=16, jitter=1.0, jitter_strength=(0.4, 0.4, 0.2, 0.0), grayscale=0, flip=0)
    image = to_pil(some_planes(1, 16, 16))[0]
    numbers = Draws(0).views(0, 0, 1)[0]
    choices = choose(view, image.size, numbers)
    planes = views.crop(image, view, choices).transpose(2, 0, 1)[:, None].copy()
    views.finish(planes, view, [choices])
    expected = image.crop(choices.box).resize((16, 16), Image.Resampling.BICUBIC)
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for operation in ORDERS[choices.order]:
        if operation < 3:  # going to HSV and back would change the pixels even for a turn of 0
            expected = adjust[operation](expected, choices.factors[operation])
    np.testing.assert_array_equal(planes, from_pil([expected]))


def draw_choices(view: View, size: tuple[int, int], count: int) -> list[views.Choices]:
    draws = Draws(7)
    return [choose(view, size, draws.views(1, index, 1)[0]) for index in range(count)]


DINO = (3 / 4, 4 / 3)


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((64, 64), (0.14, 1.0), DINO),
        ((500, 375), (0.05, 0.4), (1.0, 3.0)),
        ((90, 400), (0.3, 1.0), DINO),
        ((30, 300), (0.5, 1.0), DINO),
    ],
)
def test_crops_are_distributed_as_torchvision_s(size, scale, ratio):
    count = 4000
    torch.manual_seed(0)
    image = Image.new("RGB", size)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)], float)
    boxes = np.array([choices.box for choices in draw_choices(View(scale=scale, ratio=ratio), size, count)], float)
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= size[0] and bottom.max() <= size[1]
    ours = np.stack([top, left, bottom - top, right - left], axis=1)
    for name, function in {
        "top": lambda p: p[:, 0],
        "left": lambda p: p[:, 1],
        "height": lambda p: p[:, 2],
        "width": lambda p: p[:, 3],
        "area": lambda p: p[:, 2] * p[:, 3],
        "ratio": lambda p: p[:, 3] / p[:, 2],
    }.items():
        assert stats.ks_2samp(function(ours), function(theirs)).pvalue > 1e-3, name


def test_crops_reach_every_border():
    low, high = ([number] * NUMBERS for number in (0.0, 1 - 2**-53))
    assert choose(View(scale=(0.2, 0.2)), (60, 50), low).box[:2] == (0, 0)
    assert choose(View(scale=(0.2, 0.2)), (60, 50), high).box[2:] == (60, 50)


def test_a_crop_that_never_fits_is_the_central_one():
    image = Image.new("RGB", (1000, 20))
    view = View(scale=(1.0, 1.0))
    top, left, height, width = RandomResizedCrop.get_params(image, view.scale, view.ratio)
    assert {choices.box for choices in draw_choices(view, image.size, 20)} == {(left, top, left + width, top + height)}
    tall = RandomResizedCrop.get_params(Image.new("RGB", (20, 1000)), view.scale, view.ratio)
    assert choose(view, (20, 1000), [0.5] * NUMBERS).box == (tall[1], tall[0], tall[1] + tall[3], tall[0] + tall[2])


def test_jitter_is_distributed_as_torchvision_s():
    count = 4000
    torch.manual_seed(0)
    reference = ColorJitter(0.4, 1.5, 0.2, 0.1)  # contrast's range is cut at 0
    ranges = (reference.brightness, reference.contrast, reference.saturation, reference.hue)
    theirs = np.array([ColorJitter.get_params(*ranges)[1:] for _ in range(count)])
    chosen = draw_choices(View(jitter=1.0, jitter_strength=(0.4, 1.5, 0.2, 0.1)), (64, 64), count)
    ours = np.array([choices.factors for choices in chosen])
    for column in range(4):
        assert ranges[column][0] <= ours[:, column].min() and ours[:, column].max() <= ranges[column][1]
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    orders = np.bincount([choices.order for choices in chosen], minlength=24)
    assert len(orders) == 24 and stats.chisquare(orders).pvalue > 1e-3


def test_probabilities_are_those_of_the_settings():
    count = 4000
    chosen = draw_choices(View(blur=0.1, solarize=0.3), (64, 64), count)
    blurs = [choices.blur for choices in chosen if choices.blur]
    for happened, probability in (
        (sum(choices.flip for choices in chosen), 0.5),
        (sum(choices.order >= 0 for choices in chosen), 0.8),
        (sum(choices.grayscale for choices in chosen), 0.2),
        (len(blurs), 0.1),
        (sum(choices.solarize for choices in chosen), 0.3),
    ):
        assert stats.binomtest(happened, count, probability).pvalue > 1e-3
    assert stats.kstest(blurs, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    never, always = (View(flip=p, jitter=p, grayscale=p, blur=p, solarize=p) for p in (0.0, 1.0))
    for choices in draw_choices(never, (64, 64), 200):
        assert choices[1:3] == (False, -1) and choices[4:7] == (False, 0.0, False)
    for choices in draw_choices(always, (64, 64), 200):
        assert choices.flip and choices.order >= 0 and choices.grayscale and choices.blur >= 0.1 and choices.solarize


def test_numbers_are_uniform_and_independent():
    draws = Draws(5)
    numbers = np.array([draws.views(epoch, index, 3) for epoch in range(4) for index in range(250)])
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    columns = np.corrcoef(numbers.reshape(len(numbers), -1).T)  # between the numbers of one image and all its views
    rows = np.corrcoef(numbers.reshape(len(numbers), -1)[::4])  # between images and epochs
    for matrix, samples in ((columns, 1000), (rows, 108)):
        off = matrix[np.triu_indices(len(matrix), 1)]
        assert abs(off).max() < 5.5 / np.sqrt(samples) and stats.kstest(off * np.sqrt(samples), "norm").pvalue > 1e-4


def test_a_view_depends_on_seed_epoch_image_and_number_only(monkeypatch):
    settings = Views(global1=View(size=16, blur=1.0), global2=View(size=16, solarize=0.2), local=View(size=12), local_count=2)
    images = to_pil(some_planes(7, 20, 24))
    keys = [(1, index) for index in range(7)]
    together = make_views(images, keys, settings, Draws(0))
    monkeypatch.setattr(views, "GROUP", 1)
    for i in (4, 0, 6):
        alone = make_views([images[i]], [keys[i]], settings, Draws(0))
        assert all(torch.equal(group[:, i], own[:, 0]) for group, own in zip(together, alone, strict=True))
    fewer = make_views(images, keys, settings.model_copy(update={"local_count": 1}), Draws(0))
    assert torch.equal(fewer[0], together[0]) and torch.equal(fewer[1], together[1][:1])
    without = make_views(images, keys, settings.model_copy(update={"local_count": 0}), Draws(0))
    assert len(without) == 1 and torch.equal(without[0], together[0])
    same = [images[0]] * 2
    for other, seed in (([(1, 0), (1, 1)], 0), ([(1, 0), (2, 0)], 0)):
        first, second = make_views(same, other, settings, Draws(seed))[0].unbind(1)
        assert not torch.equal(first, second)
    assert not torch.equal(make_views(images, keys, settings, Draws(1))[0], together[0])
    a, b = together[1]
    assert not torch.equal(a, b)  # two local views


def test_every_number_decides_one_thing():
    view = View(scale=(0.2, 0.5), blur=0.5, solarize=0.5, flip=0.5, jitter=0.5, grayscale=0.5)
    numbers = [0.25] * NUMBERS
    plain = choose(view, (64, 64), numbers)
    plain = [*plain.box, plain.flip, plain.order, *plain.factors, plain.grayscale, plain.blur, plain.solarize]
    decides = []
    for place in range(NUMBERS):
        changed = choose(view, (64, 64), [*numbers[:place], 0.75, *numbers[place + 1 :]])
        changed = [*changed.box, changed.flip, changed.order, *changed.factors, changed.grayscale, changed.blur, changed.solarize]
        decides.append(tuple(i for i, (a, b) in enumerate(zip(plain, changed, strict=True)) if a != b))
    tries, rest = decides[: 2 * TRIES], decides[2 * TRIES :]
    assert tries[:2] == [(0, 1, 2, 3)] * 2 and set(tries[2:]) == {()}  # the first try fits
    # top, left, flip, jitter or not, its order, four factors, grayscale, blur or not, its radius, solarize
    assert rest == [(1, 3), (0, 2), (4,), (5,), (5,), (6,), (7,), (8,), (9,), (10,), (11,), (11,), (12,), (), (), ()]


def test_one_setting_leaves_the_other_choices_alone():
    numbers = Draws(0).views(0, 0, 1)[0]
    plain = choose(View(blur=0.0, jitter=1.0), (64, 64), numbers)
    changed = choose(View(blur=1.0, jitter=1.0, scale=(0.9, 1.0)), (64, 64), numbers)
    assert changed.blur > 0 and changed.box != plain.box
    assert changed._replace(blur=plain.blur, box=plain.box) == plain


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale", (0.5, 0.1)),
        ("scale", (0.1, 1.5)),
        ("ratio", (0, 1)),
        ("blur_radius", (2, 1)),
        ("jitter_strength", (0.4, 0.4, 0.2, 0.6)),
    ],
)
def test_settings_that_make_no_view_are_one_clear_error(key, value):
    with pytest.raises(UserError, match=f"^views: .*{key}"):
        View.check({key: value}, "views")


class Pictures(ImageSet):
    """Images in memory; of several the first cannot be read."""

    def __init__(self, count: int):
        self.source, self.split, self.classes = "pictures", "train", ()
        self.labels = np.full(count, -1)

    def name(self, index: int) -> str:
        return f"{index}.jpg"

    def image(self, index: int) -> Image.Image:
        if index == 0 and len(self) > 1:
            raise CorruptImage("/somewhere/0.jpg", "truncated")
        return to_pil(some_planes(1, 40, 60, seed=index))[0]


def test_the_picture_of_views(tmp_path):
    settings = Views(global1=View(size=32), global2=View(size=32), local=View(size=16), local_count=10)
    for name in ("a.png", "b.png"):
        draw_views(tmp_path / name, Pictures(5), settings, seed=0)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.width > 1000 and len(drawn.convert("RGB").getcolors(1 << 24)) > 1000
    draw_views(tmp_path / "one.png", Pictures(1), settings.model_copy(update={"local_count": 0}), seed=0)


def test_clamped_crops_are_one_try_cut_to_the_image():
    """The formula of MAE's ``util/crop.py``; also of images that a crop of the drawn shape does not fit into."""
    generator, scale, ratio, cut = np.random.default_rng(0), (0.08, 1.0), (3 / 4, 4 / 3), 0
    for _ in range(300):
        width, height = generator.integers(1, 60, 2).tolist()
        numbers = generator.random(NUMBERS)
        area = width * height * (0.08 + 0.92 * numbers[0])
        aspect = (3 / 4) * (16 / 9) ** numbers[1]
        w, h = round((area * aspect) ** 0.5) or 1, round((area / aspect) ** 0.5) or 1
        left, top, right, bottom = clamped_box(scale, ratio, (width, height), numbers)
        assert (right - left, bottom - top) == (min(w, width), min(h, height))
        assert (left, top) == (int(numbers[21] * (width - right + left + 1)), int(numbers[20] * (height - bottom + top + 1)))
        cut += w > width or h > height
    assert 30 < cut < 270
