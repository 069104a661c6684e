"""Beside numbers after a training a report says what the training took; and a mean over classes has no images to pair."""

from made_up import ENVIRONMENT, SCENES, evaluation, pretraining, recipe, subject
from mte_bench.records import Cost, Metric, Protocol
from reports.report import write_report

DENSE = {"batch_size": 8, "head": {"kind": "linear", "channels": None}, "joining": {"frozen": True}, "pyramid": 64}


def test_a_table_says_what_every_training_of_a_column_took(tmp_path):
    tuning = Protocol(name="finetune-x", version=1, settings={"batch_size": 64, "epochs": 3})
    for name, who, seconds in (
        ("a", subject(seed=0), 40.2),
        ("b", subject(mte=True, seed=0), 95.0),
        ("c", subject(seed=1), 61.0),
    ):
        changes = {"protocol": tuning, "cost": Cost(seconds=seconds), "details": {"steps": 150}}
        evaluation(tmp_path / f"f{name}", "finetune", who, 0.5, **changes)
    dense = {"protocol": Protocol(name="coco-x", version=1, settings=DENSE), "cost": Cost(seconds=3600.0)}
    dense["details"] = {"trained": {"steps": 1200}, "parameters": 2_956_466}
    evaluation(tmp_path / "d", "coco", subject(seed=0), 0.5, **dense)
    changes = {"protocol": Protocol(name="knn", version=1, settings=DENSE), "details": {"steps": 1}}
    evaluation(tmp_path / "k", "knn", subject(seed=0), 0.5, **changes)
    page = write_report([tmp_path], tmp_path / "out").page.read_text()
    train, device = SCENES["images"]["train"], ENVIRONMENT["device"]
    assert [line for line in page.splitlines() if line.startswith("Budget")] == [
        f"Budget of each training, fine-tuned: 150 steps of 64 images (each of {train:,} seen {9600 / train:.3g} times); "
        f"40 s to 1 min 35 s on {device}.",
        f"Budget of each training, box mAP: 1,200 steps of 8 images (each of {train:,} seen {9600 / train:.3g} times), "
        f"a pyramid of 64 channels, 2.96 M parameters in all, the encoder frozen; 1 h 00 min on {device}.",
    ]


def test_a_model_that_was_only_tested_has_no_budget(tmp_path):
    changes = {
        "protocol": Protocol(name="coco-x", version=1, settings=DENSE),
        "details": {"trained": {"model": "m", "sha256": "0"}},
    }
    evaluation(tmp_path / "d", "coco", subject(seed=0), 0.5, **changes)
    assert "\nBudget" not in write_report([tmp_path], tmp_path / "out").page.read_text()


def test_a_mean_over_classes_has_no_interval_of_its_difference_and_no_file_is_called_unusable(tmp_path):
    protocol = Protocol(name="inat-x", version=1, settings={})
    for name, who, accuracy in (("a", subject(seed=0), 0.5), ("b", subject(mte=True, seed=0), 0.6)):
        metrics = {"top1_mean_over_classes": Metric(value=100 * accuracy, ci95=(10.0, 90.0), n=SCENES["images"]["val"])}
        pretraining(tmp_path / f"{name}-run", who, recipe(who.mte))
        right = evaluation(tmp_path / name, "inat", who, accuracy, protocol=protocol)
        metrics["top1"] = Metric(value=100 * right.mean(), ci95=(10.0, 90.0), n=len(right))
        evaluation(tmp_path / name, "inat", who, accuracy, protocol=protocol, right=right, metrics=metrics)
    report = write_report([tmp_path], tmp_path / "out")
    assert report.unusable == ()
    found = {cell["metric"]: cell["minus_plain"] for cell in report.summary["tables"][0]["cells"] if cell["minus_plain"]}
    assert found["top1"]["ci95"] and found["top1_mean_over_classes"]["ci95"] is None
    assert abs(found["top1_mean_over_classes"]["difference"] - 10) < 1e-9
