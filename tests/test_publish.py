"""Publishing: what is copied is enough to make the same report, and tells nothing of the machine or of others' images."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from made_up import CIFAR, SCENES, analysis, build_runs, evaluation, pretraining, recipe, subject
from mte_bench.errors import UserError
from mte_bench.records import read_record
from reports.commands import report
from reports.figures import KINDS, may_be_shown
from reports.publish import publish_runs, without_machine_paths
from reports.report import write_report


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_published_report_has_the_tables_of_the_runs_and_writes_itself_again(tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "published" / "made_up"
    build_runs(runs, seeds=(0, 1), data=CIFAR)
    (runs / "mte-0" / "encoder.safetensors").write_bytes(b"weights")
    (runs / "mte-0" / "training.pt").write_bytes(b"weights")
    written = report([str(runs)], str(out), publish=True)
    assert written.summary["tables"] == write_report([runs], tmp_path / "whole").summary["tables"]
    before = files_below(out)
    assert {Path(name).suffix for name in before} == {".json", ".jsonl", ".parquet", ".png", ".md", ".html"}
    assert {Path(name).name for name in before if name.endswith(".png") and not name.startswith("figures")} == {"cka.png"}
    shutil.rmtree(runs)
    report([str(out)], str(out), no_pictures_of_images=True)
    assert {name: data for name, data in files_below(out).items() if not name.endswith(".html")} == {
        name: data for name, data in before.items() if not name.endswith(".html")
    }


def test_images_of_the_embedded_data_may_be_shown_and_others_not(tmp_path):
    for name, data in (("drawn", SCENES), ("photographed", CIFAR)):
        build_runs(tmp_path / name, seeds=(0,), data=data)
        written = report([str(tmp_path / name)], str(tmp_path / "out" / name), publish=True)
        kinds = {Path(figure).name.partition("-")[0] for figure in written.summary["figures"]}
        assert kinds == {"curves", "cka"} | ({"views", "attention", "pooling"} if name == "drawn" else set())
        report([str(tmp_path / name)], str(tmp_path / "plain" / name), no_pictures_of_images=True)
        shown = {path.name.partition("-")[0] for path in (tmp_path / "plain" / name / "figures").iterdir()}
        assert shown == kinds


def test_a_picture_of_a_task_that_is_not_known_counts_as_one_of_images(tmp_path):
    analysis(tmp_path / "a", "portraits", subject(), CIFAR)
    record = read_record(tmp_path / "a" / "record.json")
    assert not may_be_shown(record, "picture")
    assert {kind.task for kind in KINDS if may_be_shown(record.model_copy(update={"task": kind.task}), kind.key)} == {
        "cka",
        "per-class",
        "pairs",
        "pseudo-labels",
        "knn",
        "token-quality",
        "convergence",
        "token-counts",
    }
    publish_runs([tmp_path / "a"], tmp_path / "out")
    assert set(files_below(tmp_path / "out")) == {"a/record.json"}
    assert read_record(tmp_path / "out" / "a" / "record.json").files == {}


def test_what_an_earlier_publication_showed_goes_with_the_permission(tmp_path):
    analysis(tmp_path / "a", "attention", subject(), SCENES)
    publish_runs([tmp_path / "a"], tmp_path / "out")
    assert (tmp_path / "out" / "a" / "attention.png").is_file()
    analysis(tmp_path / "a", "attention", subject(), CIFAR)
    publish_runs([tmp_path / "a"], tmp_path / "out")
    assert not (tmp_path / "out" / "a" / "attention.png").exists()


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("imagefolder:/data/sets/imagenet?per_class=10", "imagefolder:imagenet?per_class=10"),
        ("imagefolder:.data/cifar10?per_class=10", "imagefolder:.data/cifar10?per_class=10"),
        ("/home/me/runs/cifar/dino-seed0", "runs/cifar/dino-seed0"),
        ("/scratch/dino.pth + /scratch/ibot.pth", "dino.pth + ibot.pth"),
        ("../../elsewhere/dino-seed0", "dino-seed0"),
        ("random:/home/me/runs/dino-seed0?seed=1", "random:runs/dino-seed0?seed=1"),
        ("timm:vit_small_patch16_224.dino", "timm:vit_small_patch16_224.dino"),
        ("scenes?seed=2", "scenes?seed=2"),
        ("https://arxiv.org/abs/2411.15787", "https://arxiv.org/abs/2411.15787"),
        ("a mean of 3/4, +MTE ÷ plain", "a mean of 3/4, +MTE ÷ plain"),
    ],
)
def test_paths_of_the_machine_become_names(written, told):
    assert without_machine_paths({"here": [written]}) == {"here": [told]}


def test_a_command_is_told_word_by_word():
    command = "mte-bench knn '/my runs/a b' --data='imagefolder:/my data/photos?images=9' --out /tmp/x/out --set k=[10]"
    told = without_machine_paths({"command": command})["command"]
    assert told == "mte-bench knn 'a b' '--data=imagefolder:photos?images=9' --out out --set 'k=[10]'"


def test_nothing_of_a_published_record_names_a_folder_of_the_machine(tmp_path):
    home = "/home/somebody/secret"
    who = subject(checkpoint=f"{home}/dino", pretrain_data=f"imagefolder:{home}/photos")
    data = {**CIFAR, "source": f"imagefolder:{home}/photos?per_class=2"}
    pretraining(tmp_path / "r" / "dino", who, recipe(), data=data, command=f"mte-bench pretrain dino --out {home}/dino")
    evaluation(tmp_path / "r" / "dino" / "knn", "knn", who, 0.5, data=data, details={"found": {"at": f"{home}/dino"}})
    out = tmp_path / "out"
    report([str(tmp_path / "r")], str(out), publish=True)
    assert len(files_below(out)) == 8 and not any(b"secret" in data for data in files_below(out).values())
    assert not any(str(tmp_path).encode() in data for data in files_below(out).values())


def test_publishing_adds_to_what_is_there_and_refuses_what_would_lie_in_one_place(tmp_path):
    for seed in (0, 1):
        evaluation(tmp_path / f"seed{seed}" / "dino" / "knn", "knn", subject(seed=seed), 0.5, seed=seed)
    publish_runs([tmp_path / "seed0" / "dino"], tmp_path / "out")  # a folder of records: what lies in it
    assert set(files_below(tmp_path / "out")) == {"knn/record.json", "knn/predictions.parquet"}
    evaluation(tmp_path / "seed0" / "linear", "linear", subject(), 0.5)
    publish_runs([tmp_path / "seed0" / "linear"], tmp_path / "out")  # a record's own folder: keeps its name
    assert {name.partition("/")[0] for name in files_below(tmp_path / "out")} == {"knn", "linear"}
    with pytest.raises(UserError, match=r"both would be published as .*knn; rename one"):
        publish_runs([tmp_path / "seed0" / "dino", tmp_path / "seed1" / "dino"], tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match=r"lies in .*out already"):
        publish_runs([tmp_path / "out" / "knn"], tmp_path / "out")


def test_runs_may_be_named_from_where_one_stands(tmp_path, monkeypatch):
    build_runs(tmp_path / "runs", seeds=(0,), data=CIFAR)
    monkeypatch.chdir(tmp_path)
    whole = publish_runs([tmp_path / "runs"], tmp_path / "whole")
    assert whole and [path.relative_to("out") for path in publish_runs(["runs"], "out")] == [
        path.relative_to(tmp_path / "whole") for path in whole
    ]
    assert files_below(Path("out")) == files_below(tmp_path / "whole")


def test_a_published_folder_among_the_runs_is_not_published_into_itself(tmp_path):
    evaluation(tmp_path / "dino" / "knn", "knn", subject(), 0.5)
    for _ in range(2):
        publish_runs([tmp_path], tmp_path / "published")
    assert {path.parent.relative_to(tmp_path / "published") for path in (tmp_path / "published").rglob("record.json")} == {
        Path("dino/knn")
    }


def test_a_file_outside_the_records_folder_is_not_published(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    (tmp_path / "private.json").write_text(json.dumps({"secret": 1}))
    pretraining(
        tmp_path / "runs" / "a", subject(), recipe(), files={"views": "../../private.png", "values": "../../private.json"}
    )
    publish_runs([tmp_path / "runs"], tmp_path / "out" / "deep" / "down")
    assert {Path(name).name for name in files_below(tmp_path / "out")} == {"record.json"}


def test_a_published_report_is_not_kept_new(tmp_path):
    with pytest.raises(UserError, match="leave out --refresh"):
        report([str(tmp_path)], str(tmp_path / "out"), publish=True, refresh=5)
