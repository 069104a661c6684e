"""The paper's tables in a report: its numbers stand only beside what is comparable, and every table has its place."""

import json
from importlib.metadata import entry_points

import pytest
from test_reports import cells, table_rows

from downstream.evaluate import load_protocol, settings_of
from downstream.suites.cells import offered
from made_up import ENVIRONMENT, IMAGENET, SCENES, evaluation, pretraining, recipe, subject
from mte_bench.catalogue import rows
from mte_bench.naming import architecture_title, method_title
from mte_bench.records import Cost, Data, Metric, Protocol, Subject, make_record, write_record
from pretrain.recipe import load_recipe
from reports.collect import collect
from reports.paper import paper, printed, printed_in
from reports.report import write_report

IMAGENET_300 = {**IMAGENET, "classes": 300, "images": {"train": 384862, "val": 15000}}
SETS = {
    "knn": IMAGENET,
    "linear": IMAGENET,
    "finetune": IMAGENET,
    "classify": {**IMAGENET, "images": {"val": 50000}},
    "coco": {"source": "coco:here", "classes": 80, "images": {"train": 117266, "val": 5000}, "fingerprint": "c0c0" * 4},
    "ade20k": {"source": "ade20k:here", "classes": 150, "images": {"train": 20210, "val": 2000}, "fingerprint": "ade2" * 4},
    "inat": {"source": "inat:here?year=2019", "classes": 1010, "images": {"train": 265213, "val": 3030}, "fingerprint": "19" * 8},
}


def made(name, data=IMAGENET, *changes):
    """The record of a pre-training by one of the program's recipes, and the encoder that it leaves."""
    settings = load_recipe(name, list(changes))
    who = Subject(
        checkpoint=name,
        sha256="1" * 64,
        family="mte-bench",
        arch=settings.arch,
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        arch_options=settings.arch_options,
        method=settings.method,
        mte=settings.mte is not None,
        epochs=settings.epochs,
        seed=0,
        recipe=name,
        recipe_hash=settings.hash,
        pretrain_data=data["source"],
    )
    images = {"train": data["images"]["train"]}
    return record("pretrain", who, {**data, "images": images}, Protocol(name=name, settings=settings.model_dump(mode="json")))


def record(task, who, data, protocol, metrics=None):
    return make_record(
        task=task,
        protocol=protocol,
        subject=who,
        data=Data(split="val", **data),
        metrics=metrics or {},
        cost=Cost(seconds=1.0),
        environment=ENVIRONMENT,
        command=f"mte-bench {task}",
        created="2026-11-20T10:00:00+00:00",
    )


def shipped(task, name, *changes):
    title, protocol = load_protocol(offered(task), name, changes)
    return Protocol(name=title, version=protocol.version, settings=settings_of(protocol))


def beside(run, task, protocol, metric, data=None, *changes, who=None):
    """What the paper prints beside ``metric`` of the encoder of ``run``."""
    return printed(record(task, who or run.subject, data or SETS[task], shipped(task, protocol, *changes)), metric, run)


def test_the_protocols_that_are_comparable_are_those_of_the_program():
    """If this fails, a protocol has changed: look whether it still is the paper's, and write its new hash into paper.yaml."""
    from reports.paper import _protocol

    known = paper()["comparable"]
    for column in known["columns"]:
        name = column["protocol"].partition("@")[0]
        task = name.partition("-")[0]
        stated = record(task, subject(), SETS[task], shipped(task, name))
        assert _protocol(stated, known["free_settings"]) == column["protocol"]
        assert all(column["column"] in paper()["tables"][table]["columns"] for table in column["tables"])


def test_every_task_that_a_suite_may_list_is_listed_and_every_protocol_is_of_one():
    tasks = {row["name"] for row in rows("tasks")}
    assert tasks == {entry.name for entry in entry_points(group="mte_bench.tasks")}
    assert {row["task"] for row in rows("protocols")} == tasks


def recipes_of(*tables):
    return [row["name"] for row in rows("recipes") if row["paper_row"].partition(".")[0] in {f"tab{n}" for n in tables}]


@pytest.mark.parametrize("name", recipes_of(5, 6))
def test_each_recipe_of_a_table_is_beside_its_own_row(name):
    run = made(name)
    table, _, row = run.protocol.settings["paper_row"].partition(".")
    expected = paper()["tables"][table]["rows"][int(row)]
    assert beside(run, "knn", "knn", "top1_k10") == expected["knn_top1"]
    assert beside(run, "linear", "ibot-sweep", "top1_best_on_val") == expected["linear_top1"]
    assert beside(run, "linear", "ibot-sweep", "top1") is None  # which is chosen on held-out train images


@pytest.mark.parametrize("name", recipes_of(8))
def test_each_recipe_of_supervised_training_is_beside_its_own_row(name):
    run = made(name)
    expected = paper()["tables"]["tab8"]["rows"][int(run.protocol.settings["paper_row"].partition(".")[2])]
    assert expected["top1"] in (79.8, 80.4, 82.3, 82.7) and expected["with_mte"] == run.subject.mte
    assert beside(run, "classify", "classify", "top1") == expected["top1"]
    assert beside(run, "classify", "classify", "top1_fused") is None and beside(run, "finetune", "vitb", "top1") is None
    assert beside(run, "classify", "classify", "top1", None, "interpolation=bilinear") is None
    for part in ({"classes": 300}, {"images": {"val": 5000}}, {"images": {}}, {"subset": "per_class=5"}):
        assert beside(run, "classify", "classify", "top1", {**SETS["classify"], **part}) is None
    for changes in (["epochs=299"], ["image_size=96"], ["mte={heads: shared}"], ["method=dino", "method_settings={}"]):
        other = made(name, IMAGENET, *changes)
        assert beside(other, "classify", "classify", "top1") is None, changes
    assert beside(made(name, IMAGENET_300), "classify", "classify", "top1") is None


def supervised(root, letter, mte, value, fused=None):
    """A supervised run and its own classifier's record."""
    who = subject(mte is not None, method="supervised", recipe_hash=letter * 12, sha256=letter * 64)
    pretraining(root, who, {**recipe(), "method": "supervised", "mte": mte})
    metrics = {"top1": Metric(value=value, ci95=(value - 1, value + 1), n=400), "top5": Metric(value=95.0, n=400)}
    if fused is not None:
        metrics["top1_fused"] = Metric(value=fused, ci95=(fused - 1, fused + 1), n=400)
    data = {**SCENES, "images": {"val": 400}, "fingerprint": "7777" * 4}
    write_record(root / "evaluations" / "classify", record("classify", who, data, shipped("classify", "classify"), metrics))
    evaluation(root / "evaluations" / "knn", "knn", who, value / 100)


def test_supervised_training_has_tables_8_and_14(tmp_path):
    """Of the classifiers themselves, with what the fused ones would give, and shared classifiers beside independent ones."""
    tokens = {"auxiliary_cls": 4, "pooled": 6, "ten": True}
    supervised(tmp_path / "plain", "a", None, 60.0)
    supervised(tmp_path / "shared", "b", {**tokens, "heads": "shared"}, 61.0, 62.0)
    supervised(tmp_path / "independent", "c", {**tokens, "heads": "independent"}, 63.0, 64.5)
    other = record("inat", subject(), SETS["inat"], shipped("inat", "vitb"), {"top1": Metric(value=1, n=3030)})
    write_record(tmp_path / "inat", other)
    page = write_report([tmp_path], tmp_path / "report").page.read_text()
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert titles[1:3] == ["## Supervised classification", "## Fine-tuning on iNaturalist"]
    header, *lines = table_rows(page, "## Supervised classification")
    assert [title.replace("<br>", " ") for title in header[3:]] == [
        *(f"own classifier {what}" for what in ("ours [95 %]", "n, over seeds", "+MTE − plain")),
        *(f"fused classifiers {what}" for what in ("ours [95 %]", "n, over seeds")),  # a plain run has none to compare with
    ]
    values = {"60.0": "", "61.0": "**62.0**", "63.0": "**64.5**"}
    assert {line[3].partition("<br>")[0].strip("*"): line[6].partition("<br>")[0] for line in lines} == values
    assert "Other data than the paper's (ImageNet-1K)" in page.partition("## Supervised classification")[2]
    assert page.count("As in the paper's Table 14: supervised, ViT-S/16 at 64 px, 30 epochs, on scenes.") == 2  # k-NN's, too
    *_, last = page.split("As in the paper's Table 14")
    header, *rows = table_rows(last, ":")
    assert header[1].startswith("own classifier")
    assert [row[0] for row in rows] == ["shared classifiers", "independent classifiers"]
    assert [row[1].partition("<br>")[0] for row in rows] == ["**61.0**", "**63.0**"]
    opening = page.partition("\nFrom ")[0]
    assert "4,000 training and 400 validation images" in opening and "(400 validation images" not in opening


@pytest.mark.parametrize("name", recipes_of(2, 13, 15, 16))
def test_each_recipe_of_an_ablation_is_beside_its_own_row(name):
    whole = name.endswith("shared_head")
    data = IMAGENET if whole else IMAGENET_300
    run = made(name, data)
    table, _, row = run.protocol.settings["paper_row"].partition(".")
    known = next(known for known in paper()["ablations"] if known["table"] == table)
    expected = paper()["tables"][table]["rows"][int(row)]["linear_top1" if whole else "top1"]
    stated = record("linear", run.subject, data, shipped("linear", "ibot-sweep"))
    assert printed_in(known, int(row), stated, "top1_best_on_val", run) == expected
    assert printed_in(known, int(row), stated, "top1", run) is None
    for change in ("batch_size=512", "epochs=99", "arch=vit_base_patch16_224", "views.local_count=2"):
        if whole and change.startswith("batch"):
            continue  # which is not printed for this table
        other = made(name, data, change)
        assert printed_in(known, int(row), stated, "top1_best_on_val", other) is None


def test_a_number_of_the_paper_is_not_beside_what_is_not_comparable():
    run = made("dino_mte_vits16_100ep")
    assert beside(run, "knn", "knn", "top1_k10") == 66.6
    assert beside(run, "knn", "knn", "top1_k10", None, "k=[10]") == 66.6  # which other k there are changes nothing
    assert beside(run, "linear", "ibot-sweep", "top1_best_on_val", None, "seed=1") == 70.6
    for protocol, changes in (("knn", ["temperature=0.1"]), ("knn-gap-normed", []), ("knn", ["image_size=96"])):
        assert beside(run, "knn", protocol, "top1_k10", None, *changes) is None
    assert beside(run, "knn", "knn", "top1_k20") is None
    assert beside(run, "linear", "fast", "top1") is None
    for data in (SCENES, {**IMAGENET, "subset": "per_class=100"}, {**IMAGENET, "images": {"train": 12811, "val": 50000}}):
        assert beside(run, "knn", "knn", "top1_k10", data) is None
    stated = record("knn", run.subject, IMAGENET, shipped("knn", "knn"))
    assert printed(stated, "top1_k10", None) is None  # nothing tells how it was pre-trained
    for changes in (
        ["epochs=99"],
        ["image_size=96"],
        ["patch_size=8"],
        ["arch=vit_base_patch16_224"],
        ["arch_options.depth=6"],
        ["token_learner=true"],
        ["views.local_count=8"],
        ["mte.pooled=0"],
        ["mte.heads=shared"],
        ["mte.cut_attention=false"],
        ["mte.target=each"],
    ):
        assert beside(made("dino_mte_vits16_100ep", IMAGENET, *changes), "knn", "knn", "top1_k10") is None, changes
    assert beside(made("dino_mte_vits16_100ep", SCENES), "knn", "knn", "top1_k10") is None
    assert beside(made("dino_mte_vits16_100ep", {**IMAGENET, "subset": "x"}), "knn", "knn", "top1_k10") is None


@pytest.mark.parametrize(
    ("task", "protocol", "metric", "plain", "mte"),
    [
        ("finetune", "vitb", "top1", 83.3, 83.8),
        ("finetune", "vitb-384", "top1", None, 85.2),
        ("inat", "vitb", "top1", 78.4, 79.9),
        ("coco", "vitb", "bbox_mAP", 50.1, 51.0),
        ("coco", "vitb", "segm_mAP", 43.2, 44.2),
        ("ade20k", "vitb", "mIoU", 47.9, 49.1),
    ],
)
def test_the_paper_beside_fine_tuned_encoders(task, protocol, metric, plain, mte):
    for name, expected in (("ibot_vitb16_multicrop_100ep", plain), ("ibot_mte_vitb16_multicrop_100ep", mte)):
        run = made(name)
        assert beside(run, task, protocol, metric) == expected
        assert beside(run, task, protocol, metric, None, "batch_size=8") is None
        assert beside(run, task, protocol, metric, {**SETS[task], "classes": 2}) is None
    small = made("ibot_vits16_multicrop_100ep")
    assert beside(small, task, protocol, metric) is None
    assert beside(small, "finetune", "vits", "top1") == 81.7
    longer = made("ibot_vitb16_multicrop_100ep", IMAGENET, "epochs=400")
    assert beside(longer, "finetune", "vitb-384", "top1") == 85.0


def test_mean_patches_and_ensembles_have_tables_of_their_own():
    run = made("ibot_mte_vits16_300ep")
    assert beside(run, "knn", "knn-gap", "top1_k10") == 57.9  # Table 3
    one = made("dino_mte_vits16_100ep")
    two = Subject.ensemble([one.subject, one.subject.model_copy(update={"seed": 1, "sha256": "2" * 64})])
    assert method_title(two) == "DINO+MTE × 2"
    assert beside(one, "knn", "knn", "top1_k10", who=two) == 67.1  # Table 4
    assert beside(made("dino_vits16_100ep"), "knn", "knn", "top1_k10", who=Subject.ensemble([one.subject] * 3)) is None


def test_the_papers_tables_keep_the_gains_that_its_prose_states():
    tables = paper()["tables"]
    assert sorted(tables, key=lambda name: int(name[3:])) == [f"tab{number}" for number in range(1, 17)]
    found = {
        (row["method"], row["architecture"] or row["architecture_inherited"], row["epochs"]): row
        for row in tables["tab5"]["rows"]
    }
    assert len(found) == 22
    for method, arch, knn, linear in (
        ("DINO", "ViT-S/16", 2.9, 1.2),
        ("iBOT", "ViT-S/16", 2.1, 0.6),
        ("MoBY", "Swin-T", 4.0, 0.8),
    ):
        mte, plain = found[f"{method}+MTE", arch, 300], found[method, arch, 300]
        assert mte["knn_top1"] - plain["knn_top1"] == pytest.approx(knn)
        assert mte["linear_top1"] - plain["linear_top1"] == pytest.approx(linear)
    assert found["MoCo V3", "ViT-S/16", 300]["knn_top1"] is None


METRICS = {
    "finetune": {"top1": 70.0},
    "inat": {"top1": 60.0, "top1_mean_over_classes": 55.0},
    "coco": {"bbox_mAP": 50.0, "bbox_mAP_50": 70.0, "segm_mAP": 45.0},
    "ade20k": {"mIoU": 40.0, "aAcc": 80.0},
}


def transfer(folder, task, run, data, gain=0.0, ci=None, reports="best"):
    protocol = shipped(task, "vitb")
    protocol = protocol.model_copy(update={"settings": {**protocol.settings, "reports": reports}})
    metrics = {name: Metric(value=value + gain, ci95=ci, n=data["images"]["val"]) for name, value in METRICS[task].items()}
    write_record(folder, record(task, run.subject, data, protocol, metrics))


def test_every_task_has_its_table_in_the_order_of_the_paper(tmp_path):
    plain, mte = made("ibot_vitb16_multicrop_100ep"), made("ibot_mte_vitb16_multicrop_100ep")
    for name, run, gain in (("plain", plain, 0.0), ("mte", mte, 1.5)):
        write_record(tmp_path / name, run)
        for task in METRICS:
            ci = (48.0, 52.0) if task == "ade20k" else None
            transfer(tmp_path / name / task, task, run, SETS[task], gain, ci)
    written = write_report([tmp_path], tmp_path / "report")
    page = written.page.read_text()
    titles = [line for line in page.splitlines() if line.startswith("## ")][:4]
    assert titles == [
        "## Fine-tuning",
        "## Fine-tuning on iNaturalist",
        "## Detection and instance segmentation",
        "## Semantic segmentation",
    ]
    header, first, second = table_rows(page, titles[2])
    assert [title.replace("<br>", " ") for title in header[3:]] == [
        f"{name} {what}" for name in ("box mAP", "mask mAP") for what in ("ours [95 %]", "n, over seeds", "+MTE − plain")
    ]  # the record's settings have one more than the protocol: no number of the paper
    assert [row[3] for row in (first, second)] == ["**50.0**<br>[–]", "**51.5**<br>[–]"]
    assert second[5] == "**+1.5**<br>[–]" and first[4] == "5,000<br>1 seed"
    assert table_rows(page, titles[3])[1][3] == "**40.0**<br>[48.0, 52.0]"
    assert "(the best epoch on val)" in page and "none of its numbers is here" in page
    assert cells(written.summary, "coco")[1]["metric"] == "segm_mAP"


def test_the_papers_column_is_there_where_a_row_has_a_number(tmp_path):
    run = made("ibot_vitb16_multicrop_100ep")
    write_record(tmp_path, run)
    for task in ("coco", "ade20k"):
        metrics = {name: Metric(value=value, n=5000) for name, value in METRICS[task].items()}
        write_record(tmp_path / task, record(task, run.subject, SETS[task], shipped(task, "vitb"), metrics))
    other = {**SETS["ade20k"], "classes": 11, "fingerprint": "0" * 16}
    write_record(tmp_path / "other", record("ade20k", run.subject, other, shipped("ade20k", "camvid"), metrics))
    written = write_report([tmp_path], tmp_path / "report")
    page = written.page.read_text()
    header, row = table_rows(page, "## Detection")
    assert [(title, value) for title, value in zip(header, row, strict=True) if "paper" in title] == [
        ("box mAP<br>paper", "50.1"),
        ("mask mAP<br>paper", "43.2"),
    ]
    assert {cell["paper"] for cell in cells(written.summary, "ade20k")} == {47.9, None}
    assert "Other data than the paper's (ADE20K)" in page


def test_both_ways_to_choose_a_linear_probe_have_a_column(tmp_path):
    run = made("dino_vits16_100ep")
    write_record(tmp_path, run)
    metrics = {"top1": Metric(value=66.0, n=50000), "top1_best_on_val": Metric(value=67.5, n=50000)}
    write_record(tmp_path / "linear", record("linear", run.subject, IMAGENET, shipped("linear", "ibot-sweep"), metrics))
    header, row = table_rows(write_report([tmp_path], tmp_path / "report").page.read_text(), "## k-NN")
    found = dict(zip((title.replace("<br>", " ") for title in header), row, strict=True))
    assert found["linear ours [95 %]"].startswith("**66.0**") and "linear paper" not in found
    assert found["linear, best on val ours [95 %]"].startswith("**67.5**") and found["linear, best on val paper"] == "67.8"


def test_the_recipes_of_the_program_are_paired_with_and_without_mte(tmp_path):
    """They say which row of the paper they are, which is another for either."""
    for name in ("dino_vits16_100ep", "dino_mte_vits16_100ep"):
        run = made(name, IMAGENET, "knn_every=10") if "mte" in name else made(name)
        write_record(tmp_path / name, run)
        evaluation(tmp_path / name / "knn", "knn", run.subject, 0.6, SCENES)
    (found,) = [cell for cell in cells(write_report([tmp_path], tmp_path / "report").summary) if cell["mte"]]
    assert found["minus_plain"]["difference"] == 0


def test_ablations_have_the_rows_of_the_paper(tmp_path):
    tokens = {
        "a": None,
        "b": {"auxiliary_cls": 4, "pooled": 6, "ten": True, "kernel": 11},
        "c": {"auxiliary_cls": 4, "pooled": 0, "ten": False, "kernel": 11},
        "d": {"auxiliary_cls": 0, "pooled": 6, "ten": False, "kernel": 11},
        "e": {"auxiliary_cls": 4, "pooled": 0, "ten": True, "kernel": 3},  # another setting differs: not of the same table
        "f": {"auxiliary_cls": 2, "pooled": 0, "ten": True, "kernel": 11},  # no row of the paper
    }
    for letter, mte in tokens.items():
        who = subject(mte is not None, recipe_hash=letter * 12, sha256=letter * 64)
        pretraining(tmp_path / letter, who, recipe() | {"mte": mte})
        evaluation(tmp_path / letter / "evaluations" / "knn", "knn", who, 0.5 + ord(letter) / 1000, seed=ord(letter))
    written = write_report([tmp_path], tmp_path / "report")
    page = written.page.read_text()
    _, *lines = table_rows(page, "As in the paper's Table 13: DINO, ViT-S/16 at 64 px, 30 epochs, on scenes.")
    assert [line[0] for line in lines] == [
        "none",
        "auxiliary CLS",
        "adaptively pooled",
        "auxiliary CLS, TEN, adaptively pooled",
    ]
    values = {cell["recipe_hash"][0]: f"**{cell['value']:.1f}**" for cell in cells(written.summary)}
    assert [line[1].partition("<br>")[0] for line in lines] == [values[letter] for letter in "acdb"]
    assert page.count("As in the paper's Table") == 1
    for letter in "cd":
        (tmp_path / letter / "evaluations" / "knn" / "record.json").unlink()
    assert "## Ablations" not in write_report([tmp_path], tmp_path / "report").page.read_text()


def test_an_ensemble_is_compared_with_an_ensemble(tmp_path):
    for mte in (False, True):
        who = [subject(mte, seed) for seed in (0, 1)]
        pretraining(tmp_path / f"run-{mte}", who[0], recipe(mte))
        evaluation(tmp_path / f"one-{mte}", "knn", who[0], 0.6)
        evaluation(tmp_path / f"two-{mte}", "knn", Subject.ensemble(who), 0.7)
    summary = write_report([tmp_path], tmp_path / "report").summary
    found = {cell["method"]: cell for cell in cells(summary)}
    assert set(found) == {"DINO", "DINO × 2", "DINO+MTE", "DINO+MTE × 2"}
    assert found["DINO+MTE"]["minus_plain"]["seeds"][0]["plain"] == found["DINO"]["value"]
    assert found["DINO+MTE × 2"]["minus_plain"]["difference"] == 0


def test_dense_records_can_be_gated(tmp_path, capsys):
    from mte_bench import cli

    run = made("ibot_vitb16_multicrop_100ep")
    transfer(tmp_path / "runs" / "coco", "coco", run, SETS["coco"])
    base = tmp_path / "base.json"
    assert cli.main(["check", str(tmp_path / "runs"), "--baseline", str(base), "--update"]) == 0
    assert json.loads(base.read_text())["cells"][0]["metric"] == "bbox_mAP"
    transfer(tmp_path / "runs" / "coco", "coco", run, SETS["coco"], gain=-3.0)
    assert cli.main(["check", str(tmp_path / "runs"), "--baseline", str(base)]) == 1
    assert architecture_title(collect([tmp_path / "runs"]).entries[0].record.subject) == "ViT-B/16"
