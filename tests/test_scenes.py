"""Scenes: the same drawing every time, exact masks, real layouts on disk."""

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mte_bench import cli
from mte_bench.data import scenes, scenes_cache, scenes_formats
from mte_bench.data.scenes import CLASSES, KINDS, Drawing, draw, draw_many
from mte_bench.data.scenes_formats import LAYOUTS, run_lengths, taxonomy, write_scenes
from mte_bench.data.sources import open_source
from mte_bench.errors import UserError

DATA = Path(__file__).resolve().parent.parent / ".data"
DRAWERS: list[Callable[[int], Drawing]] = [lambda i: draw(0, "train", i, 64), lambda i: draw_many(0, "train", i, 96, 128)]


def test_every_class_has_a_silhouette_and_a_pattern_of_its_own() -> None:
    assert len(set(CLASSES)) == len({kind.shape for kind in KINDS}) == len({kind.pattern for kind in KINDS}) == 10


@pytest.mark.parametrize("drawer", DRAWERS)
def test_a_drawing_is_determined_by_its_arguments(drawer: Callable[[int], Drawing]) -> None:
    first, again, other = drawer(3), drawer(3), drawer(13)
    assert np.array_equal(first.image, again.image)
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(first.things, again.things, strict=True))
    assert not np.array_equal(first.image, other.image)


def test_seeds_and_splits_share_no_image() -> None:
    images = [draw(seed, split, i, 32).image.tobytes() for seed in (0, 1) for split in ("train", "val") for i in range(40)]
    assert len(set(images)) == len(images)


def test_classes_take_turns() -> None:
    assert [draw(5, "val", index, 32).things[0].label for index in range(23)] == [index % 10 for index in range(23)]


@pytest.mark.parametrize("drawer", DRAWERS)
@pytest.mark.parametrize("index", range(12))
def test_masks_are_where_a_surface_shows(drawer: Callable[[int], Drawing], index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn one class's surface into its two colours in turn: the image changes inside that class's masks and nowhere else."""
    drawing = drawer(index)
    assert drawing.things
    label = drawing.things[-1].label

    def with_surface(value: float) -> Drawing:
        monkeypatch.setitem(scenes.PATTERNS, KINDS[label].pattern, lambda p, q: np.full_like(p, value))
        return drawer(index)

    one, other = with_surface(-9.0), with_surface(9.0)
    change = np.abs(one.image.astype(int) - other.image).max(axis=2)
    shown = np.any([thing.mask for thing in drawing.things if thing.label == label], axis=0)
    inside, near = _shrunk(shown), ~_shrunk(~shown, 2)  # edges are soft, and a point may fade out
    assert inside.any() and (change[inside] > 0).mean() > 0.98  # both colours may be clipped
    if len(drawing.things) == 1 or not drawing.clutter.any():
        assert change[~near].max(initial=0) < np.median(change[inside]) / 4


def _shrunk(mask: np.ndarray, by: int = 1) -> np.ndarray:
    padded = np.pad(mask, by, mode="edge")
    height, width = mask.shape
    shifts = [padded[y : y + height, x : x + width] for y in range(2 * by + 1) for x in range(2 * by + 1)]
    return np.all(shifts, axis=0)


def test_things_do_not_overlap_and_clutter_is_none_of_them() -> None:
    hidden = 0
    for index in range(60):
        drawing = draw_many(1, "train", index, 80, 100)
        together = np.sum([drawing.clutter, *(thing.mask for thing in drawing.things)], axis=0)
        assert together.max() <= 1
        assert all(thing.mask.any() for thing in drawing.things)
        hidden += len(drawing.things) > 1
    assert hidden > 20


def test_pixels_do_not_solve_it() -> None:
    """k-NN on raw pixels stays at or under 45 %; the full measurement is benchmarks/scenes_difficulty.py."""
    train, val = open_source("scenes?train=1500", "train"), open_source("scenes?val=400", "val")

    def features(images: object) -> np.ndarray:
        x = np.asarray(images.pixels, np.float32).reshape(len(images.pixels), -1) / 255 - 0.5  # type: ignore[attr-defined]
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    similarity = features(val) @ features(train).T
    nearest = np.argsort(-similarity, axis=1)[:, :10]
    votes = np.zeros((len(val), 10))
    rows = np.arange(len(val))[:, None]
    np.add.at(votes, (np.broadcast_to(rows, nearest.shape), train.labels[nearest]), np.exp(similarity[rows, nearest] / 0.07))
    assert 0.10 < (votes.argmax(axis=1) == val.labels).mean() <= 0.45


# --- as a source ----------------------------------------------------------------------------------------------------


def test_scenes_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = open_source("scenes?val=15&size=32&seed=4", "val")
    assert len(first) == 15 and first.image(7).size == (32, 32)
    assert np.array_equal(np.asarray(first.image(7)), draw(4, "val", 7, 32).image)
    monkeypatch.setattr(scenes_cache, "draw", None)
    again = open_source("scenes?seed=4&size=32&val=15", "val")
    assert again.fingerprint == first.fingerprint and np.array_equal(np.asarray(again.image(7)), np.asarray(first.image(7)))


def test_a_drawing_that_was_broken_off_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def broken(seed: int, split: str, index: int, size: int) -> Drawing:
        if index == 9:
            raise KeyboardInterrupt
        return draw(seed, split, index, size)

    monkeypatch.setattr(scenes_cache, "draw", broken)
    with pytest.raises(KeyboardInterrupt):
        open_source("scenes?train=12&size=32", "train")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images = open_source("scenes?train=12&size=32", "train")
    assert np.array_equal(np.asarray(images.image(11)), draw(0, "train", 11, 32).image)


def test_the_fingerprint_tells_drawings_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = ["scenes?train=10&size=32", "scenes?train=11&size=32", "scenes?train=10&size=33", "scenes?train=10&size=32&seed=1"]
    marks = [open_source(spec, "train").fingerprint for spec in specs]
    monkeypatch.setattr(scenes_cache, "VERSION", scenes.VERSION + 1)
    marks.append(open_source(specs[0], "train").fingerprint)
    assert len(set(marks)) == 5


# --- on disk --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=list(LAYOUTS))
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    return request.param, write_scenes(tmp_path / "out", request.param, train=12, val=7, size=48, seed=2)


def test_what_is_written_can_be_read_as_a_source(written: tuple[str, Path]) -> None:
    layout, folder = written
    for split, count in (("train", 12), ("val", 7)):
        images = open_source(f"{layout}:{folder}", split)  # type: ignore[arg-type]
        assert len(images) == count
        for index in range(count):
            assert min(images.image(index).size) == 48
    labelled = layout in ("imagefolder", "inat")
    train = open_source(f"{layout}:{folder}", "train")
    assert sorted(train.labels.tolist()) == (sorted(i % 10 for i in range(12)) if labelled else [-1] * 12)


def test_an_image_folder_holds_the_drawings_of_the_source(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "out", "imagefolder", train=10, val=2, size=48, seed=2)
    for index in range(10):
        on_disk = np.asarray(Image.open(folder / "train" / CLASSES[index] / f"train_{index:06d}.jpg")).astype(int)
        assert np.abs(on_disk - draw(2, "train", index, 48).image).mean() < 12  # JPEG


def test_inat_has_the_taxonomy_of_the_real_one(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "out", "inat", train=10, val=3, size=32)
    categories = json.loads((folder / "categories.json").read_text())
    ranks = ("kingdom", "phylum", "class", "order", "family", "genus", "specific_epithet", "supercategory", "name", "id")
    assert all(set(ranks) <= set(category) for category in categories)
    assert [len({category[rank] for category in categories}) for rank in ranks] == [1, 2, 3, 3, 6, 10, 10, 3, 10, 10]
    for child, parent in (("class", "phylum"), ("family", "order"), ("genus", "family")):
        assert all(len({c[parent] for c in categories if c[child] == name}) == 1 for name in {c[child] for c in categories})
    content = json.loads((folder / "val2018.json").read_text())
    assert {"info", "licenses", "images", "annotations", "categories"} <= set(content)
    assert all(image["width"] == image["height"] == 32 for image in content["images"])


def test_coco_is_read_by_pycocotools_with_the_masks_that_were_drawn(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO  # type: ignore[import-untyped]

    folder = write_scenes(tmp_path / "out", "coco", train=3, val=8, size=64)
    api = COCO(folder / "annotations" / "instances_val2017.json")
    assert len(api.getImgIds()) == 8 and len(api.getCatIds()) == 10
    for index, image_id in enumerate(sorted(api.getImgIds())):
        entry = api.loadImgs(image_id)[0]
        drawing = draw_many(0, "val", index, 64, 85)
        assert Image.open(folder / "val2017" / entry["file_name"]).size == (entry["width"], entry["height"]) == (85, 64)
        annotations = api.loadAnns(api.getAnnIds(imgIds=image_id))
        for annotation, thing in zip(annotations, drawing.things, strict=True):
            mask = api.annToMask(annotation).astype(bool)
            assert np.array_equal(mask, thing.mask)
            assert annotation["area"] == mask.sum() and annotation["iscrowd"] == 0
            assert api.loadCats(annotation["category_id"])[0]["name"] == CLASSES[thing.label]
            x, y, width, height = map(int, annotation["bbox"])
            box = np.zeros_like(mask)
            box[y : y + height, x : x + width] = True
            assert not (mask & ~box).any()
            assert mask[y].any() and mask[y + height - 1].any() and mask[:, x].any() and mask[:, x + width - 1].any()


def test_run_lengths_by_hand() -> None:
    assert run_lengths(np.array([[0, 1], [1, 1]], bool)) == [1, 3]
    assert run_lengths(np.array([[1, 0], [0, 0]], bool)) == [0, 1, 3]
    assert run_lengths(np.array([[0, 0], [1, 0]], bool)) == [1, 1, 2]


def test_ade20k_annotations_are_the_masks_that_were_drawn(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "out", "ade20k", train=4, val=3, size=64)
    for index in range(4):
        labels = Image.open(folder / "annotations" / "training" / f"ADE_train_{index + 1:08d}.png")
        assert labels.mode == "L" and labels.size == (85, 64)
        values, drawing = np.asarray(labels), draw_many(0, "train", index, 64, 85)
        assert values.max() <= 11 and np.array_equal(values == 0, drawing.clutter)
        for label in range(10):
            masks = [thing.mask for thing in drawing.things if thing.label == label]
            assert np.array_equal(values == label + 1, np.any(masks, axis=0) if masks else np.zeros((64, 85), bool))
    with open(folder / "objectInfo11.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["Idx", "Ratio", "Train", "Val", "Stuff", "Name"]
    assert [row["Name"] for row in rows] == [*CLASSES, "ground"]
    assert rows[-1]["Train"] == "4" and 0.9 < sum(float(row["Ratio"]) for row in rows) <= 1.0005


@pytest.mark.parametrize("layout", ["coco", "ade20k"])
def test_one_thing_in_an_image_is_the_large_one_of_the_source_and_two_are_at_most_two(tmp_path: Path, layout: str) -> None:
    images = {"coco": "train2017/*.jpg", "ade20k": "images/training/*.jpg"}[layout]
    folder = write_scenes(tmp_path / "one", layout, train=3, val=1, size=64, things=1)
    single = write_scenes(tmp_path / "single", "imagefolder", train=3, val=1, size=64)
    drawn = {path.read_bytes() for path in single.glob("train/*/*.jpg")}
    assert {path.read_bytes() for path in folder.glob(images)} == drawn and len(drawn) == 3
    if layout == "coco":
        write_scenes(tmp_path / "two", layout, train=30, val=1, size=32, things=2)
        for name, most in (("one", 1), ("two", 2)):
            content = json.loads((tmp_path / name / "annotations" / "instances_train2017.json").read_text())
            counts = Counter(annotation["image_id"] for annotation in content["annotations"])
            assert max(counts.values()) == most


def test_things_are_for_layouts_of_several(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--things 2: images of inat have one thing each"):
        write_scenes(tmp_path / "out", "inat", train=1, val=1, things=2)
    with pytest.raises(UserError, match="--things 0: at least 1"):
        write_scenes(tmp_path / "out", "coco", train=1, val=1, things=0)


@pytest.mark.shared_data
def test_the_layouts_have_the_keys_of_real_data_sets(tmp_path: Path) -> None:
    inat = write_scenes(tmp_path / "inat", "inat", train=2, val=2, size=32)
    coco = write_scenes(tmp_path / "coco", "coco", train=2, val=2, size=32)
    ade20k = write_scenes(tmp_path / "ade20k", "ade20k", train=2, val=2, size=32)
    pairs = [
        (inat / "val2018.json", DATA / "monkeys_inat" / "val2018.json"),
        (coco / "annotations" / "instances_val2017.json", DATA / "coco_mini" / "annotations" / "instances_val2017.json"),
    ]
    for ours, theirs in ((json.loads(a.read_text()), json.loads(b.read_text())) for a, b in pairs):
        assert set(ours) == set(theirs)
        for part in ("images", "annotations", "categories"):
            missing = set(theirs[part][0]) - set(ours[part][0])
            assert missing <= {"coco_url", "flickr_url", "date_captured"}
    header = (DATA / "ade20k_sample" / "objectInfo150.csv").read_text().splitlines()[0]
    assert (ade20k / "objectInfo11.csv").read_text().splitlines()[0] == header
    real = Image.open(DATA / "ade20k_sample" / "annotations" / "validation" / "ADE_val_00000001.png")
    assert Image.open(ade20k / "annotations" / "validation" / "ADE_val_00000001.png").mode == real.mode


def test_every_class_has_its_place_in_the_taxonomy() -> None:
    assert len({taxonomy(kind)["name"] for kind in KINDS}) == len(KINDS)


def test_nothing_is_left_of_a_writing_that_was_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> Drawing:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scenes_formats, "draw", broken)
    with pytest.raises(UserError, match="No space left on device"):
        write_scenes(tmp_path / "out", "imagefolder", train=2, val=2)
    assert not list(tmp_path.iterdir())


# --- the command ----------------------------------------------------------------------------------------------------


def test_write_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    options = ["--format", "inat", "--train", "6", "--val", "3", "--size", "32"]
    assert cli.main(["data", "write", "scenes", "--out", out, *options]) == 0
    capsys.readouterr()
    assert cli.main(["data", "inspect", f"inat:{out}", "--json"]) == 0
    train, val = json.loads(capsys.readouterr().out)
    assert (train["images"], val["images"]) == (6, 3) and len(train["classes"]) == 6  # those of which train shows any
    assert train["fingerprint"] == open_source(f"inat:{out}", "train").fingerprint != val["fingerprint"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "cooc"], "unknown layout (did you mean 'coco'?)"),
        (["--train", "0"], "--train 0: at least 1"),
        (["--size", "8"], "--size 8: at least 16"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, error_line: Callable[..., str]) -> None:
    assert message in error_line("data", "write", "scenes", "--out", str(tmp_path / "out"), *arguments)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, error_line: Callable[..., str]) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert "already there and not empty" in error_line("data", "write", "scenes", "--out", str(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "precious"
