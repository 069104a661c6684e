"""Sources: what they find, in which order, with which labels; what they say when something is missing."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader

from mte_bench.data.sources import KINDS, Split, open_source, parse_source, require_classes, take
from mte_bench.errors import CorruptImage, UserError
from source_files import class_folders, picture, shards

DATA = Path(__file__).resolve().parent.parent / ".data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "set", {"train": {"cat": 5, "ant": 7, "bee": 3}, "val": {"cat": 2, "bee": 2}})


# --- specs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("scenes", "scenes"),
        ("scenes?val=20&train=10", "scenes?train=10&val=20"),
        ("some/where", "imagefolder:some/where"),
        ("imagefolder:/a b/c?images=3", "imagefolder:/a b/c?images=3"),
        ("C:\\images", "imagefolder:C:\\images"),
        ("tar:shard-0??.tar?val=other-?.tar", "tar:shard-0??.tar?val=other-?.tar"),
        ("tar:{split}-{000..146}.tar", "tar:{split}-{000..146}.tar"),
        ("inat:data?year=2019&per_class=4", "inat:data?per_class=4&year=2019"),
    ],
)
def test_a_spec_and_its_canonical_form_mean_the_same(spec: str, canonical: str) -> None:
    assert str(parse_source(spec)) == canonical
    assert parse_source(canonical) == parse_source(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cooc:path", "unknown kind 'cooc' (did you mean 'coco'?)"),
        ("scens", "no folder 'scens'"),
        ("scenes:path", "takes no path"),
        ("inat", "write it as inat:PATH"),
        ("scenes?sized=32", "unknown option 'sized' of scenes (did you mean 'size'?)"),
        ("scenes?size=big", "'size' is a whole number"),
        ("scenes?size=4", "at least 16"),
        ("scenes?train=0", "'train' is a whole number from 1"),
        ("scenes?images=3&per_class=2", "not both"),
        ("scenes?train_share=0.1&train_list=x", "give train_share or train_list, not both"),
        ("scenes?train=40&val=20&size=16&train_share=1.5", "'train_share' is above 0 and at most 1, got '1.5'"),
        ("scenes?train=40&val=20&size=16&train_share=a", "'train_share' is above 0 and at most 1, got 'a'"),
        ("scenes?train=40&val=20&size=16&train_list=/nowhere/list", "train_list /nowhere/list: cannot be read (No such file"),
        ("scenes?size=", "key=value"),
        ("/nowhere/at/all", "no folder '/nowhere/at/all'"),
        ("tar:/nowhere/*.tar", "no file matches"),
        ("tar:/nowhere/{0..2}.tar", "3 of 3 shards are missing, first '/nowhere/0.tar'"),
    ],
)
def test_a_mistaken_spec_is_one_line_that_says_what_to_mend(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        open_source(spec, "train")
    assert "\n" not in str(error.value)


# --- image folders --------------------------------------------------------------------------------------------------


def test_an_image_folder_is_read_as_torchvision_reads_it(folder: Path) -> None:
    (folder / "train" / "ant" / "deeper").mkdir()
    picture(1).save(folder / "train" / "ant" / "deeper" / "x.PNG")
    (folder / "train" / "ant" / "notes.txt").write_text("not an image")
    ours, theirs = open_source(str(folder), "train"), ImageFolder(str(folder / "train"))
    assert list(ours.classes) == theirs.classes
    expected = {Path(path).relative_to(folder).as_posix(): label for path, label in theirs.samples}
    assert {ours.name(i): int(ours.labels[i]) for i in range(len(ours))} == expected
    for index in range(len(ours)):
        assert np.array_equal(np.asarray(ours.image(index)), np.asarray(pil_loader(str(folder / ours.name(index)))))


def test_labels_of_val_are_those_of_train_even_if_val_lacks_a_class(folder: Path) -> None:
    val = open_source(str(folder), "val")
    assert val.classes == ("ant", "bee", "cat")
    assert val.labels.tolist() == [1, 1, 2, 2]
    (folder / "val" / "dog").mkdir()
    picture(0).save(folder / "val" / "dog" / "0.jpg")
    with pytest.raises(UserError, match="val/dog has no counterpart in train"):
        open_source(str(folder), "val")


def test_test_stands_in_for_val(folder: Path) -> None:
    (folder / "val").rename(folder / "test")
    assert open_source(str(folder), "val").name(0) == "test/bee/000.jpg"


def test_files_straight_in_the_split_have_no_class(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    picture(0).save(tmp_path / "train" / "a.jpg")
    images = open_source(str(tmp_path), "train")
    assert images.classes == () and images.labels.tolist() == [-1]
    with pytest.raises(UserError, match="no class labels"):
        require_classes(images)


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no train/ folder"):
        open_source(str(tmp_path), "train")
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="no images in"):
        open_source(str(tmp_path), "train")
    with pytest.raises(UserError, match="has no val/ or test/ folder"):
        open_source(str(tmp_path), "val")
    picture(0).save(tmp_path / "train" / "a" / "0.jpg")
    with pytest.raises(UserError, match="only one class"):
        require_classes(open_source(str(tmp_path), "train"))


def test_a_link_to_a_folder_above_ends(folder: Path) -> None:
    (folder / "train" / "ant" / "loop").symlink_to(folder / "train")
    assert len(open_source(str(folder), "train")) >= 15


def test_a_link_that_leads_nowhere_is_an_image_that_is_missing(folder: Path) -> None:
    there = len(open_source(str(folder), "train"))
    (folder / "train" / "ant" / "lost.jpg").symlink_to("nowhere.jpg")
    images = open_source(str(folder), "train")
    assert len(images) == there + 1
    (lost,) = [index for index in range(len(images)) if images.name(index).endswith("lost.jpg")]
    with pytest.raises(CorruptImage, match=r"lost\.jpg: not readable as an image \(No such file"):
        images.image(lost)


# --- fingerprints, subsets, pickles ---------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_name_size_and_label_only(folder: Path) -> None:
    first = open_source(str(folder), "train").fingerprint
    assert re.fullmatch("[0-9a-f]{16}", first)
    moved = folder.with_name("elsewhere")
    shutil.copytree(folder, moved)
    assert open_source(str(moved), "train").fingerprint == first

    def changed(change: Callable[[Path], object]) -> str:
        copy = folder.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy / "train")
        return open_source(str(copy), "train").fingerprint

    others = [
        changed(lambda train: (train / "ant" / "000.jpg").rename(train / "ant" / "999.jpg")),
        changed(lambda train: (train / "ant" / "000.jpg").rename(train / "bee" / "999.jpg")),
        changed(lambda train: (train / "ant" / "000.jpg").unlink()),
        changed(lambda train: (train / "ant" / "000.jpg").write_bytes((train / "ant" / "000.jpg").read_bytes() + b"\0")),
        changed(lambda train: (train / "cat").rename(train / "dog")),
    ]
    assert len({first, *others}) == 6


def test_subsets_are_balanced_nested_and_repeatable(folder: Path) -> None:
    def names(option: str, count: int) -> list[str]:
        images = open_source(f"{folder}?{option}={count}", "train")
        assert images.subset == f"{option}={count}"
        return [images.name(i) for i in range(len(images))]

    def per_class(chosen: list[str]) -> list[int]:
        return [sum(f"/{name}/" in file for file in chosen) for name in ("ant", "bee", "cat")]

    assert per_class(names("per_class", 2)) == [2, 2, 2]
    assert per_class(names("per_class", 6)) == [6, 3, 5]
    assert sorted(per_class(names("images", 8))) == [2, 3, 3]
    assert len(names("images", 1000)) == 15
    for option in ("per_class", "images"):
        assert names(option, 3) == names(option, 3)
        assert set(names(option, 2)) < set(names(option, 3))
    marks = {open_source(f"{folder}?images={count}", "train").fingerprint for count in (3, 4, 5)}
    assert len(marks) == 3


def test_a_subset_of_images_without_labels(folder: Path) -> None:
    flat = folder / "flat"
    flat.mkdir()
    shutil.move(folder / "train" / "ant", flat / "train")
    assert len(take(open_source(str(flat), "train"), "images", 4)) == 4


@pytest.mark.parametrize("kind", ["imagefolder", "scenes", "subset", "tar"])
def test_a_pickled_set_gives_the_same_images_and_is_small(kind: str, folder: Path, tmp_path: Path) -> None:
    shards(tmp_path)
    spec = {
        "imagefolder": str(folder),
        "scenes": "scenes?train=20&size=32",
        "subset": f"{folder}?images=4",
        "tar": f"tar:{tmp_path}/{{split}}-{{0..1}}.tar",
    }[kind]
    images = open_source(spec, "train")
    images.image(0)
    sent = pickle.dumps(images)
    assert len(sent) < 10_000
    there = pickle.loads(sent)
    assert there.fingerprint == images.fingerprint
    for index in (0, len(images) - 1):
        assert there.name(index) == images.name(index)
        assert np.array_equal(np.asarray(there.image(index)), np.asarray(images.image(index)))


# --- iNaturalist, COCO, ADE20K --------------------------------------------------------------------------------------


@pytest.fixture
def inat(tmp_path: Path) -> Path:
    (tmp_path / "train_val2018" / "Aves" / "7").mkdir(parents=True)
    categories = [{"id": 7, "name": "7", "supercategory": "Aves"}, {"id": 2, "name": "2", "supercategory": "Aves"}]
    for split, count in (("train", 4), ("val", 2)):
        files = [f"train_val2018/Aves/7/{split}{i}.jpg" for i in range(count)]
        for i, name in enumerate(files):
            picture(i).save(tmp_path / name)
        content = {
            "images": [{"id": 10 + i, "file_name": name} for i, name in enumerate(files)],
            "annotations": [{"id": i, "image_id": 10 + i, "category_id": 7 if i % 2 else 2} for i in reversed(range(count))],
            "categories": categories,
        }
        (tmp_path / f"{split}2018.json").write_text(json.dumps(content))
    (tmp_path / "categories.json").write_text(json.dumps([{"id": 7, "name": "Pica pica"}, {"id": 2, "name": "Parus major"}]))
    return tmp_path


def test_inat_names_what_is_missing(inat: Path) -> None:
    with pytest.raises(UserError, match=r"no train2019.json; there is year=2018"):
        open_source(f"inat:{inat}?year=2019", "train")
    (inat / "train_val2018/Aves/7/train3.jpg").unlink()
    with pytest.raises(UserError, match=r"names 1 files that are not in .*, first 'train_val2018/Aves/7/train3.jpg'"):
        open_source(f"inat:{inat}", "train")
    (inat / "val2018.json").write_text('{"images": [')
    with pytest.raises(UserError, match="cannot be read as JSON"):
        open_source(f"inat:{inat}", "val")
    (inat / "val2018.json").write_text('{"images": []}')
    with pytest.raises(UserError, match="not in iNaturalist's format"):
        open_source(f"inat:{inat}", "val")


@pytest.mark.parametrize(
    ("kind", "folders"),
    [("coco", {"train": "train2017", "val": "val2017"}), ("ade20k", {"train": "images/training", "val": "images/validation"})],
)
def test_coco_and_ade20k_are_images_without_labels(kind: str, folders: dict[Split, str], tmp_path: Path) -> None:
    for split, place in folders.items():
        with pytest.raises(UserError, match=f"has no {place}/ folder"):
            open_source(f"{kind}:{tmp_path}", split)
        (tmp_path / place).mkdir(parents=True)
        picture(0).save(tmp_path / place / "1.jpg")
        images = open_source(f"{kind}:{tmp_path}", split)
        assert images.name(0) == f"{place}/1.jpg" and images.labels.tolist() == [-1] and images.classes == ()


# --- real images ----------------------------------------------------------------------------------------------------


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("spec", "counts", "classes"),
    [
        ("cifar10", (50_000, 10_000), 10),
        ("imagenette112", (9_469, 3_925), 10),
        ("inat:monkeys_inat", (1_097, 272), 10),
        ("coco:coco_mini", (80, 79), 0),
    ],
)
def test_real_data_sets(spec: str, counts: tuple[int, int], classes: int) -> None:
    kind, _, name = spec.rpartition(":")
    if not (DATA / name).is_dir():
        pytest.skip(f"no {name}")
    splits: tuple[Split, Split] = ("train", "val")
    for split, count in zip(splits, counts, strict=True):
        images = open_source(f"{kind or KINDS[1]}:{DATA / name}", split)
        assert len(images) == count and len(images.classes) == classes
        assert set(images.labels.tolist()) == (set(range(classes)) or {-1})
        assert images.image(count // 2).mode == "RGB"


# --- semi-supervised: a smaller train split, the whole val split ---------------------------------------------------------


@pytest.fixture
def uneven(tmp_path: Path) -> str:
    """Classes of 300, 40 and 1 train images, 3 val images each."""
    for name, count in (("a", 300), ("b", 40), ("c", 1)):
        for split, images in (("train", count), ("val", 3)):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(images):
                (tmp_path / split / name / f"{name}{index}.png").write_bytes(b"")
    return str(tmp_path)


def test_a_share_of_every_class_of_train_is_taken_and_nothing_of_val(uneven: str) -> None:
    whole = open_source(uneven, "train")
    chosen = {}
    for share, counts in ((0.01, [3, 1, 1]), (0.1, [30, 4, 1]), (1, [300, 40, 1])):
        images = open_source(f"{uneven}?train_share={share}", "train")
        assert np.bincount(images.labels).tolist() == counts and images.subset == f"train_share={share:g}"
        assert images.fingerprint != whole.fingerprint
        chosen[share] = {images.name(index) for index in range(len(images))}
        assert len(open_source(f"{uneven}?train_share={share}", "val")) == 9
    assert chosen[0.01] < chosen[0.1] < chosen[1]
    few = open_source(f"{uneven}?train_per_class=4", "train")
    assert np.bincount(few.labels).tolist() == [4, 4, 1] and few.subset == "train_per_class=4"
    both = f"{uneven}?per_class=2&train_per_class=1"
    assert len(open_source(both, "train")) == 3 and len(open_source(both, "val")) == 6


def test_a_list_names_the_train_images_by_path_or_file_name(uneven: str, tmp_path: Path) -> None:
    listing = tmp_path / "1percent.txt"
    listing.write_text("a7.png\r\ntrain/b/b3.png\n\nc0.png\na299.png\n")
    images = open_source(f"{uneven}?train_list={listing}", "train")
    assert [images.name(index) for index in range(4)] == [f"train/{name}.png" for name in ("a/a299", "a/a7", "b/b3", "c/c0")]
    assert images.labels.tolist() == [0, 0, 1, 2] and images.subset == "train_list=1percent.txt"
    assert len(open_source(f"{uneven}?train_list={listing}", "val")) == 9
    listing.write_text("a7.png\na300.png\n")
    with pytest.raises(UserError, match=r"1 of its 2 images.*'a300\.png'"):
        open_source(f"{uneven}?train_list={listing}", "train")
    listing.write_text("\n")
    with pytest.raises(UserError, match="names no images"):
        open_source(f"{uneven}?train_list={listing}", "train")
