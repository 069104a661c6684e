"""iNaturalist: its lists, and accuracy by class, rank and number of training images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from test_finetune import ENCODER, QUICK

from downstream import commands
from downstream.finetune import Answers
from downstream.inaturalist import INAT, measure, numbered_taxa, over_classes, shot_groups
from mte_bench.data.scenes_formats import write_scenes
from mte_bench.data.sources import open_source, take
from mte_bench.errors import UserError
from mte_bench.records import read_record

DATA = Path(__file__).resolve().parent.parent / ".data"
BIRDS = {"kingdom": "Animalia", "phylum": "Chordata", "class": "Aves"}
NAMED = [
    {"id": 7, "name": "Pica pica", **BIRDS, "order": "Passeriformes", "family": "Corvidae", "genus": "Pica"},
    {"id": 2, "name": "Parus major", **BIRDS, "order": "Passeriformes", "family": "Paridae", "genus": "Parus"},
    {"id": 5, "name": "Anas crecca", **BIRDS, "order": "Anseriformes", "family": "Anatidae", "genus": "Anas"},
]


def lists(root: Path, year: int = 2018) -> dict[str, dict[str, Any]]:
    """Six images to train on, of categories 2 and 7 (7 first), and three of val; category 5 has none."""
    content: dict[str, dict[str, Any]] = {}
    for split, count in (("train", 6), ("val", 3)):
        files = [f"train_val{year}/Aves/{split}{index}.jpg" for index in range(count)]
        for index, name in enumerate(files):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (20 * index, 90, 200)).save(root / name)
        annotations = [{"id": i, "image_id": 10 + i, "category_id": 7 if i % 3 == 0 else 2} for i in range(count)]
        content[split] = {
            "images": [{"id": 10 + index, "file_name": name} for index, name in reversed(list(enumerate(files)))],
            "annotations": annotations,
            "categories": [{"id": entry["id"], "name": str(entry["id"]), "supercategory": "Aves"} for entry in NAMED],
        }
    store(root, content, year)
    (root / "categories.json").write_text(json.dumps(NAMED))
    return content


def store(root: Path, content: dict[str, dict[str, Any]], year: int = 2018) -> None:
    for split, values in content.items():
        (root / f"{split}{year}.json").write_text(json.dumps(values))


@pytest.mark.parametrize("year", [2018, 2019])
def test_classes_are_categories_in_the_order_of_the_training_annotations(tmp_path: Path, year: int) -> None:
    lists(tmp_path, year)
    train, val = (open_source(f"inat:{tmp_path}?year={year}", split) for split in ("train", "val"))
    assert train.classes == val.classes == ("Pica pica", "Parus major")
    assert [train.name(index)[-5] for index in range(6)] == list("543210") and train.labels.tolist() == [1, 1, 0, 1, 1, 0]
    assert val.labels.tolist() == [1, 1, 0]
    assert train.taxonomy["family"] == ("Corvidae", "Paridae") and list(train.taxonomy)[-1] == "genus"
    assert train.remarks == (f"train{year}.json: 1 of 3 categories have no image, first 'Anas crecca'",)
    subset = take(train, "images", 4)
    assert (subset.taxonomy, subset.remarks) == (train.taxonomy, train.remarks)


def test_without_categories_json_there_are_the_names_and_groups_of_the_list(tmp_path: Path) -> None:
    lists(tmp_path)
    (tmp_path / "categories.json").unlink()
    images = open_source(f"inat:{tmp_path}", "train")
    assert images.classes == ("7", "2") and dict(images.taxonomy) == {"supercategory": ("Aves", "Aves")}


def _no(split: str, key: str) -> Callable[[Any], Any]:
    return lambda content: content[split].pop(key)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no("train", "annotations"), r"train2018\.json: .*no list 'annotations'"),
        (_no("val", "categories"), r"val2018\.json: .*no list 'categories'"),
        (lambda c: c["val"]["images"][1].pop("file_name"), r"val2018\.json: images\[1\]: .*no 'file_name'"),
        (lambda c: c["train"]["annotations"][2].pop("image_id"), r"train2018\.json: annotations\[2\]: .*no 'image_id'"),
        (lambda c: c["train"]["categories"].insert(0, "Aves"), r"train2018\.json: categories\[0\]: .*no 'id'"),
        (lambda c: c["train"]["annotations"][3].update(category_id=9), r"annotations\[3\]: category_id 9 is none of its"),
        (
            lambda c: c["train"]["annotations"].pop(),
            r"train2018\.json: images\[0\] \('.*train5\.jpg'\): no annotation has its id 15",
        ),
        (lambda c: c["val"]["images"].clear(), r"val2018\.json: lists no images"),
        (
            lambda c: c["val"]["annotations"][1].update(category_id=5),
            r"val2018\.json: category 5 \('5', image '.*val1\.jpg'\) has no training image in train2018\.json",
        ),
        (
            lambda c: c["val"]["images"][2].update(file_name="gone.jpg"),
            r"val2018\.json names 1 files that are not in .*'gone\.jpg'",
        ),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_trained(tmp_path: Path, spoil: Callable[[Any], Any], message: str) -> None:
    content = lists(tmp_path)
    spoil(content)
    store(tmp_path, content)
    with pytest.raises(UserError, match=message):
        commands.inat(ENCODER, f"inat:{tmp_path}", protocol="tiny", out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_other_sources_and_years_that_are_not_there_are_refused(tmp_path: Path) -> None:
    lists(tmp_path)
    with pytest.raises(UserError, match="inat takes sources of kind inat; for others use finetune"):
        commands.inat(ENCODER, "scenes", protocol="tiny")
    with pytest.raises(UserError, match=r"no train2019\.json; there is year=2018"):
        commands.inat(ENCODER, f"inat:{tmp_path}?year=2019", protocol="tiny")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("inat") / "scenes", "inat", train=60, val=30, size=24)


def test_scenes_from_lists_to_record(scenes: Path, tmp_path: Path) -> None:
    """The record's numbers, counted once more from its predictions and the lists themselves."""
    settings = [*QUICK, "shots=[6, 100]"]
    record = commands.inat(ENCODER, f"inat:{scenes}", protocol="tiny", set_=settings, workers=0, out=str(tmp_path))
    table = pyarrow.parquet.read_table(tmp_path / "predictions.parquet")
    classes = json.loads(table.schema.metadata[b"classes"])
    listed = json.loads((scenes / "val2018.json").read_text())
    category = {entry["id"]: entry for entry in json.loads((scenes / "categories.json").read_text())}
    file = {image["id"]: image["file_name"] for image in listed["images"]}
    truth = {file[entry["image_id"]]: category[entry["category_id"]] for entry in listed["annotations"]}
    assert sorted(truth) == sorted(table["name"].to_pylist())
    assert [truth[name]["name"] for name in table["name"].to_pylist()] == [classes[i] for i in table["label"].to_pylist()]

    label, predicted = (np.array(table[name]) for name in ("label", "prediction:top1"))
    assert record.metrics["top1"].value == pytest.approx(100 * accuracy_score(label, predicted))
    assert record.metrics["top1_mean_over_classes"].value == pytest.approx(100 * balanced_accuracy_score(label, predicted))
    assert record.task == "inat" and record.data.source == f"inat:{scenes}" and record.data.classes == 10
    rows = json.loads((tmp_path / record.files["classes"]).read_text())
    assert [row["name"] for row in rows] == classes and sum(row["val"] for row in rows) == 30
    assert np.mean([row["top1"] for row in rows]) == pytest.approx(record.metrics["top1_mean_over_classes"].value, abs=1e-3)
    assert read_record(tmp_path / "record.json") == record and record.metrics["top1_medium_shot"].n == 30
    assert "top1_kingdom" not in record.metrics  # there is one only
    above = ["kingdom", "phylum", "class", "order", "family", "genus"]
    for place, rank in enumerate(above[1:], 2):
        same = [[row[key] for key in above[:place]] for row in rows]
        right = [same[a] == same[b] for a, b in zip(label, predicted, strict=True)]
        assert record.metrics[f"top1_{rank}"].value == pytest.approx(100 * np.mean(right)), rank
        column = np.array(table[f"prediction:top1_{rank}"])
        assert ((column == label) == right).all() and (column[~np.array(right)] == predicted[~np.array(right)]).all()


def test_taxa_of_one_name_in_different_orders_are_different() -> None:
    taxonomy = {
        "supercategory": ("x", "y", "y"),
        "kingdom": ("Animalia", "Plantae", "Plantae"),
        "family": ("Oenanthidae", "Oenanthidae", "Oenanthidae"),
        "genus": ("Oenanthe", "Oenanthe", "Carum"),
    }
    found = {rank: taxa.tolist() for rank, taxa in numbered_taxa(taxonomy).items()}
    assert found == {"supercategory": [0, 1, 1], "kingdom": [0, 1, 1], "family": [0, 1, 1], "genus": [0, 1, 2]}
    assert numbered_taxa({"kingdom": ("Animalia",) * 3}) == {}


def test_shots_begin_beyond_their_thresholds() -> None:
    groups = shot_groups(np.array([19, 20, 100, 101, 0]), (20, 100))
    assert {name: members.tolist() for name, members in groups.items()} == {
        "many": [False, False, False, True, False],
        "medium": [False, True, True, False, False],
        "few": [True, False, False, False, True],
    }


def test_few_shot_classes_count_alike(tmp_path: Path) -> None:
    """The class of two training images is right once in three val images, that of four always."""
    lists(tmp_path)
    train = open_source(f"inat:{tmp_path}", "train")  # two images of class 0, four of class 1
    labels = np.array([0, 0, 0, 1])
    answers = Answers(np.array([[0, 1], [1, 0], [1, 0], [1, 0]]), labels, train, tmp_path)
    protocol = INAT.protocol.model_construct(shots=(3, 3))
    metrics = measure(protocol, answers).metrics
    assert metrics["top1"].value == 50 and metrics["top1_mean_over_classes"].value == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert metrics["top1_few_shot"].value == pytest.approx(100 / 3) and metrics["top1_few_shot"].n == 3
    assert metrics["top1_many_shot"].value == 100 and "top1_medium_shot" not in metrics
    low, high = over_classes(np.array([True] * 50 + [False] * 50), np.arange(100) % 10).ci95 or (0, 0)
    assert 35 < low < 45 and 55 < high < 65


@pytest.mark.shared_data
def test_real_photographs_keep_their_taxonomy() -> None:
    train, val = (open_source(f"inat:{DATA}/monkeys_inat", split) for split in ("train", "val"))
    assert (len(train), len(val), len(train.classes)) == (1097, 272, 10) and train.classes == val.classes
    taxa = numbered_taxa(dict(train.taxonomy))
    assert set(taxa) == {"family", "genus"} and train.remarks == ()
    of = dict(zip(train.classes, zip(train.taxonomy["family"], train.taxonomy["genus"], strict=True), strict=True))
    assert of["Macaca fuscata"] == ("Cercopithecidae", "Macaca")
