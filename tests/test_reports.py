"""Reports: what a reader may conclude from the page must follow from the records, and nothing may be silently merged."""

import json
import re
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from made_up import (
    CIFAR,
    ENVIRONMENT,
    KNN,
    analysis,
    build_runs,
    evaluation,
    pretraining,
    recipe,
    subject,
)
from mte_bench.errors import UserError
from mte_bench.naming import architecture_title, data_title, method_title
from mte_bench.records import Metric, Protocol, Subject
from mte_bench.statistics import bootstrap_ci, mcnemar, paired_bootstrap
from reports.commands import report
from reports.report import write_report


def cells(summary, task="knn"):
    return [cell for table in summary["tables"] for cell in table["cells"] if cell["task"] == task]


def cell(summary, method, task="knn"):
    found = [cell for cell in cells(summary, task) if cell["method"] == method]
    assert len(found) == 1
    return found[0]


def table_rows(page, after):
    """The rows of the first table after a line that contains ``after``, as lists of cells."""
    lines = page[page.index(after) :].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    assert all(len(row) == len(rows[0]) for row in rows)
    return [rows[0], *rows[2:]]


def test_accuracy_table_shows_random_plain_and_mte_with_interval_spread_and_paired_difference(tmp_path):
    right = build_runs(tmp_path / "runs")
    written = write_report([tmp_path / "runs"], tmp_path / "report")
    summary = written.summary

    mte, plain = (np.stack([right["knn", kind, seed] for seed in (0, 1, 2)]) for kind in (True, False))
    assert cell(summary, "DINO+MTE")["value"] == pytest.approx(100 * mte.mean())
    expected = [100 / 3 * end for end in bootstrap_ci(mte.sum(axis=0))]
    assert cell(summary, "DINO+MTE")["ci95"] == pytest.approx(expected)
    assert cell(summary, "DINO+MTE")["spread_over_seeds"] == pytest.approx(100 * mte.mean(axis=1).std(ddof=1))
    paired = cell(summary, "DINO+MTE")["minus_plain"]
    expected = [100 / 3 * end for end in paired_bootstrap(mte.sum(axis=0), plain.sum(axis=0))]
    assert [paired["difference"], *paired["ci95"]] == pytest.approx(expected)
    assert [seed["mcnemar_p"] for seed in paired["seeds"]] == pytest.approx([mcnemar(mte[i], plain[i]) for i in range(3)])
    assert paired["mcnemar_p"] is None  # of several seeds on the same images there is none
    one = cell(summary, "random encoder")
    assert one["ci95"] == pytest.approx([100 * end for end in bootstrap_ci(right["knn", "random", 0])])
    assert one["spread_over_seeds"] is None and one["minus_plain"] is None

    header, *rows = table_rows(written.page.read_text(), "### scenes")
    assert [row[0] for row in rows] == ["random encoder", "DINO", "DINO+MTE"]
    assert header[:3] == ["Method", "Architecture", "Epochs"] and len(header) == 9
    assert rows[2][1:3] == ["ViT-S/16 at 64 px", "30"]
    assert [rows[i][5] for i in (0, 1)] == ["", ""] and rows[2][5].startswith(f"**{paired['difference']:+.1f}**<br>[")
    assert not any("paper" in title for title in header)  # the paper has no number for this data


def test_one_seed_is_tested_by_mcnemar(tmp_path):
    right = build_runs(tmp_path / "runs", seeds=(4,))
    summary = write_report([tmp_path / "runs"], tmp_path / "report").summary
    expected = mcnemar(right["knn", True, 4], right["knn", False, 4])
    assert cell(summary, "DINO+MTE")["minus_plain"]["mcnemar_p"] == pytest.approx(expected)


def test_without_predictions_the_test_is_missing_and_the_values_are_not(tmp_path):
    right = build_runs(tmp_path / "runs", predictions=False)
    written = write_report([tmp_path / "runs"], tmp_path / "report")
    found = cell(written.summary, "DINO+MTE")
    assert found["value"] == pytest.approx(100 * np.mean([right["knn", True, seed] for seed in (0, 1, 2)]))
    assert found["ci95"] is None and found["minus_plain"]["ci95"] is None
    assert {seed["mcnemar_p"] for seed in found["minus_plain"]["seeds"]} == {None}
    assert not written.unusable
    assert table_rows(written.page.read_text(), "### scenes")[3][5].endswith("<br>[–]")


def test_images_are_paired_by_name_whatever_the_order_of_the_rows(tmp_path):
    build_runs(tmp_path / "runs", seeds=(0,))
    before = write_report([tmp_path / "runs"], tmp_path / "report").summary
    path = tmp_path / "runs" / "mte-0" / "evaluations" / "knn" / "predictions.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows.take(np.random.default_rng(0).permutation(len(rows))), path)
    assert write_report([tmp_path / "runs"], tmp_path / "report").summary == before
    pq.write_table(rows.set_column(0, "name", pa.array([f"other {i}" for i in range(len(rows))])), path)
    after = write_report([tmp_path / "runs"], tmp_path / "report").summary
    assert cell(after, "DINO+MTE")["minus_plain"]["ci95"] is None


def test_predictions_that_do_not_give_the_recorded_value_are_refused(tmp_path):
    build_runs(tmp_path / "runs", seeds=(0,))
    other = tmp_path / "runs" / "random-knn" / "predictions.parquet"
    (tmp_path / "runs" / "mte-0" / "evaluations" / "knn" / "predictions.parquet").write_bytes(other.read_bytes())
    written = write_report([tmp_path / "runs"], tmp_path / "report")
    assert cell(written.summary, "DINO+MTE")["minus_plain"]["ci95"] is None
    assert any("mte-0/evaluations/knn/predictions.parquet" in line for line in written.unusable)


def test_a_baseline_is_the_same_recipe_and_seed_or_none(tmp_path):
    who = subject(True, 1)
    pretraining(tmp_path / "plain", subject(False, 0), recipe(False))
    evaluation(tmp_path / "plain" / "knn", "knn", subject(False, 0), 0.6)
    pretraining(tmp_path / "mte", who, recipe(True))
    evaluation(tmp_path / "mte" / "knn", "knn", who, 0.7)
    assert cell(write_report([tmp_path], tmp_path / "out").summary, "DINO+MTE")["minus_plain"] is None  # another seed

    pretraining(tmp_path / "plain", subject(False, 1), recipe(False))
    evaluation(tmp_path / "plain" / "knn", "knn", subject(False, 1), 0.6)
    assert cell(write_report([tmp_path], tmp_path / "out").summary, "DINO+MTE")["minus_plain"] is not None

    pretraining(tmp_path / "mte", who, recipe(True, batch_size=32))
    assert cell(write_report([tmp_path], tmp_path / "out").summary, "DINO+MTE")["minus_plain"] is None  # another recipe


def test_a_cell_measured_twice_is_shown_twice(tmp_path):
    build_runs(tmp_path / "runs", seeds=(0, 1))
    evaluation(tmp_path / "again", "knn", subject(True, 0), 0.9, created="2026-11-21T10:00:00+00:00")
    evaluation(tmp_path / "anew", "knn", subject(True, 1, sha256="e" * 64), 0.1, created="2026-11-21T11:00:00+00:00")
    written = write_report([tmp_path / "runs", tmp_path / "again", tmp_path / "anew"], tmp_path / "report")
    first, second = [cell for cell in cells(written.summary) if cell["method"] == "DINO+MTE"]
    assert [cell["repeat"] for cell in (first, second)] == [0, 1]
    assert first["value"] == pytest.approx(66, abs=8)
    assert [round(seed["value"], -1) for seed in second["seeds"]] == [pytest.approx(90, abs=10), pytest.approx(10, abs=10)]
    assert "DINO+MTE<br>(repeat 2)" in written.page.read_text()


def test_a_record_that_is_named_twice_is_read_once(tmp_path, monkeypatch):
    evaluation(tmp_path / "runs" / "a", "knn", subject(), 0.6)
    monkeypatch.chdir(tmp_path)
    named = [tmp_path / "runs", "runs/a", "runs/a/record.json"]
    assert write_report(named, tmp_path / "report").summary["records"] == 1


def test_a_missing_cell_is_missing(tmp_path):
    build_runs(tmp_path / "runs", seeds=(0,))
    (tmp_path / "runs" / "mte-0" / "evaluations" / "linear" / "record.json").unlink()
    written = write_report([tmp_path / "runs"], tmp_path / "report")
    assert cell(written.summary, "DINO+MTE", "linear")["value"] is None
    assert table_rows(written.page.read_text(), "### scenes")[3][6:] == ["–", "–", "–"]


def test_other_protocols_and_other_data_are_never_put_together(tmp_path):
    evaluation(tmp_path / "a", "knn", subject(), 0.5)
    evaluation(tmp_path / "b", "knn", subject(), 0.6, protocol=Protocol(name="knn", settings=KNN | {"temperature": 0.1}))
    evaluation(tmp_path / "c", "knn", subject(), 0.7, CIFAR)
    evaluation(tmp_path / "d", "knn", subject(), 0.8, {**CIFAR, "subset": "per_class=10"})
    evaluation(tmp_path / "e", "knn", subject(), 0.9, {**CIFAR, "source": "imagefolder:/elsewhere/cifar10"})
    summary = write_report([tmp_path], tmp_path / "report").summary
    values = [[cell["value"] for cell in table["cells"]] for table in summary["tables"]]
    assert sorted(len(row) for row in values) == [1, 2, 2]  # subset; two protocols; one set of images at two places
    assert len({cell["protocol"] for cell in summary["tables"][-1]["cells"]}) == 2


def test_a_protocol_with_other_metrics_shows_its_first(tmp_path):
    other = {"top1_k5": Metric(value=40, n=400), "top5_k5": Metric(value=80, n=400)}
    evaluation(tmp_path / "a", "knn", subject(), 0.5)
    few = Protocol(name="knn-fewshot", settings=KNN)
    evaluation(tmp_path / "b", "knn", subject(), 0.5, predictions=False, metrics=other, protocol=few)
    written = write_report([tmp_path], tmp_path / "report")
    assert {cell["protocol"].partition("@")[0]: cell["metric"] for cell in cells(written.summary)} == {
        "knn": "top1_k10",
        "knn-fewshot": "top1_k5",
    }
    assert "k-NN `top1_k5` by `knn-fewshot@1 " in written.page.read_text()


def test_of_several_kinds_of_feature_another_than_the_global_token_is_shown(tmp_path):
    kinds = {f"top1_k10_{kind}": Metric(value=value, n=400) for kind, value in (("global", 50), ("patch-mean", 40))}
    patches = Protocol(name="knn-patches", settings=KNN)
    evaluation(tmp_path / "a", "knn", subject(), 0.5)
    evaluation(tmp_path / "b", "knn", subject(), 0.5, predictions=False, metrics=kinds, protocol=patches)
    written = write_report([tmp_path], tmp_path / "report")
    assert [cell["metric"] for cell in cells(written.summary)] == ["top1_k10", "top1_k10_patch-mean"]
    columns = table_rows(written.page.read_text(), "## k-NN, linear")[0]
    titles = [column.replace("\\", "") for column in columns]
    assert "(knn)" in titles[3] and "(knn-patches, top1_k10_patch-mean)" in titles[-1]


def test_broken_records_are_named_and_counted_and_do_no_harm(tmp_path, capsys):
    build_runs(tmp_path / "runs", seeds=(0,))
    (tmp_path / "runs" / "half").mkdir()
    text = (tmp_path / "runs" / "random-knn" / "record.json").read_text()
    (tmp_path / "runs" / "half" / "record.json").write_text(text[: len(text) // 2])
    (tmp_path / "runs" / "old").mkdir()
    (tmp_path / "runs" / "old" / "record.json").write_text(json.dumps(json.loads(text) | {"schema_version": 0}))
    (tmp_path / "runs" / "odd").mkdir()
    (tmp_path / "runs" / "odd" / "record.json").write_text("[" * 100_000)
    (tmp_path / "runs" / "strange").mkdir()
    (tmp_path / "runs" / "strange" / "record.json").write_bytes(b"\xff\x00|`<b>")
    (tmp_path / "runs" / "plain-0" / "views.png").write_bytes(b"not a picture")
    with (tmp_path / "runs" / "mte-0" / "curves.jsonl").open("a") as curves:
        curves.write('{"step": 301, "epo')
    (tmp_path / "runs" / "mte-0" / "evaluations" / "knn" / "predictions.parquet").write_bytes(b"PAR1")
    report([str(tmp_path / "runs")], str(tmp_path / "report"))
    said = capsys.readouterr().err
    page = (tmp_path / "report" / "report.md").read_text()
    for name in ("half/record.json", "old/record.json", "odd/record.json", "strange/record.json", "views.png", "curves.jsonl"):
        assert f"runs/{name}" in said or f"runs/plain-0/{name}" in said or f"runs/mte-0/{name}" in said
        assert name.replace(".", ".") in page.replace("\\", "")
    assert "7 files could not be used" in page and "7 files left out" in said
    assert str(tmp_path) not in page


def test_nothing_to_report_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"no record\.json below"):
        write_report([tmp_path], tmp_path / "out")
    with pytest.raises(UserError, match="no such run folder"):
        write_report([tmp_path / "absent"], tmp_path / "out")
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(UserError, match="none of 1 records can be read"):
        write_report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def files_below(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_records_give_the_same_bytes_also_in_place_and_in_another_order_and_time_zone(tmp_path, monkeypatch):
    build_runs(tmp_path / "runs", seeds=(0, 1))
    write_report([tmp_path / "runs"], tmp_path / "runs")
    first = files_below(tmp_path / "runs")
    write_report([tmp_path / "runs"], tmp_path / "runs")
    assert files_below(tmp_path / "runs") == first
    assert "`mte-bench report . --out .`" in first["report.md"].decode()

    runs = sorted(path for path in (tmp_path / "runs").iterdir() if path.is_dir() and path.name != "figures")
    write_report(runs, tmp_path / "a" / "b")
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    write_report([*reversed(runs), runs[0]], tmp_path / "a" / "c")
    assert files_below(tmp_path / "a" / "b") == files_below(tmp_path / "a" / "c")


def test_the_opening_names_encoders_and_images_and_neither_noise_nor_analyses_of_several_runs(tmp_path):
    build_runs(tmp_path / "runs", seeds=(0,))
    both = Subject.ensemble([subject(), subject(True)])
    analysis(tmp_path / "runs" / "joint", "convergence", both)
    noise = {"source": "noise", "classes": None, "fingerprint": "none", "images": {"step": 8}, "split": "none"}
    analysis(tmp_path / "runs" / "cost", "cost", subject(), noise)
    page = write_report([tmp_path / "runs"], tmp_path / "report").page.read_text()
    assert page.startswith("# DINO and DINO+MTE on scenes\n")
    assert "Compared here: random encoder, DINO and DINO+MTE (" in page
    evaluation(tmp_path / "runs" / "ensemble", "knn", both, 0.7)
    page = write_report([tmp_path / "runs"], tmp_path / "report").page.read_text()
    assert "Compared here: random encoder, DINO, DINO+MTE and DINO &amp; DINO+MTE (" in page


def test_every_picture_and_link_of_the_page_is_there(tmp_path):
    build_runs(tmp_path / "runs")
    written = write_report([tmp_path / "runs"], tmp_path / "report")
    page = written.page.read_text()
    links = re.findall(r"!?\[[^\]]*\]\(([^)#]+)\)", page)
    assert len(links) > 20 and all((tmp_path / "report" / link).is_file() for link in links)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    assert sorted(pictures) == written.summary["figures"]
    assert {name.partition("/")[2].partition("-")[0] for name in pictures} == {"curves", "views", "attention", "pooling", "cka"}


def test_pictures_of_images_are_left_out_and_earlier_ones_removed(tmp_path):
    build_runs(tmp_path / "runs", seeds=(0,), data=CIFAR)
    write_report([tmp_path / "runs"], tmp_path / "report")
    mine = tmp_path / "report" / "figures" / "mine.png"
    mine.write_bytes(b"")
    (tmp_path / "report" / "figures" / ".attention-cifar10.png.x1y2.png").write_bytes(b"left by a kill")
    (tmp_path / "report" / "report.json").unlink()
    report([str(tmp_path / "runs")], str(tmp_path / "report"), no_pictures_of_images=True)
    left = {path.name for path in (tmp_path / "report" / "figures").iterdir()}
    assert left == {"curves-cifar10.png", "cka-cifar10-dino.png", "cka-cifar10-dino-mte.png", "mine.png"}
    page = (tmp_path / "report" / "report.md").read_text()
    assert "views-" not in page and "--no-pictures-of-images" in page


def test_cka_between_tokens_and_between_layers_are_two_pictures(tmp_path):
    for between in ("tokens", "layers"):
        analysis(tmp_path / between, "cka", subject(True), details={"between": between})
    written = write_report([tmp_path], tmp_path / "report")
    assert written.summary["figures"] == ["figures/cka-layers-scenes-dino-mte.png", "figures/cka-scenes-dino-mte.png"]
    for between, file in (("tokens", "cka-scenes"), ("layers", "cka-layers-scenes")):
        under = written.page.read_text().partition(f"## CKA between {between}")[2].partition("\n## ")[0]
        assert f"figures/{file}-dino-mte.png" in under and under.count("![") == 1


def test_records_without_their_pictures_and_predictions_make_the_same_tables_of_values(tmp_path):
    build_runs(tmp_path / "runs", seeds=(0, 1))
    whole = write_report([tmp_path / "runs"], tmp_path / "whole", pictures_of_images=False)
    for path in [*(tmp_path / "runs").rglob("*.png"), *(tmp_path / "runs").rglob("*.parquet")]:
        path.unlink()
    bare = write_report([tmp_path / "runs"], tmp_path / "bare", pictures_of_images=False)
    assert not bare.unusable
    assert [cell["value"] for cell in cells(bare.summary)] == [cell["value"] for cell in cells(whole.summary)]
    assert bare.summary["figures"] == ["figures/curves-scenes.png"]


def test_a_record_cannot_bring_in_a_file_from_outside_its_folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    pretraining(tmp_path / "runs" / "a", subject(), recipe(), files={"views": "../../private.png"})
    written = write_report([tmp_path / "runs"], tmp_path / "report")
    assert not any("views" in name for name in written.summary["figures"])
    assert any("private.png" in line for line in written.unusable)


def test_cost_ratios_are_to_the_plain_run_of_the_same_seed_on_the_same_device(tmp_path):
    build_runs(tmp_path / "runs", seeds=(0, 1))
    other = {**ENVIRONMENT, "device": "another"}
    pretraining(tmp_path / "runs" / "mte-1", subject(True, 1), recipe(True), 690.0, environment=other)
    rows = table_rows(write_report([tmp_path / "runs"], tmp_path / "report").page.read_text(), "## Cost")[1:]
    ratios = {(row[0], row[5]): row[9:] for row in rows}
    assert ratios["DINO+MTE", "0"] == ["1.15", "0.87", "1.00"]
    assert ratios["DINO+MTE", "1"] == ["–", "–", "–"]
    assert ratios["DINO", "0"] == ["", "", ""]
    assert {row[6] for row in rows} == {"10 min 00 s", "11 min 30 s"}


def test_names():
    assert architecture_title(subject(arch="vit_base_patch16_224", image_size=224)) == "ViT-B/16"
    tiny = subject(arch="vit_tiny_patch16_224", patch_size=8, arch_options={"depth": 6})
    assert architecture_title(tiny) == "ViT-Ti/8 (depth 6) at 64 px"
    narrow = subject(arch="vit_tiny_patch16_224", arch_options={"x": 1, "num_heads": 3, "embed_dim": 96}, image_size=224)
    assert architecture_title(narrow) == "ViT/16 (width 96, heads 3, x 1)"
    assert architecture_title(subject(arch="swin_tiny_patch4_window7_224", image_size=224)) == "Swin-T"
    small = subject(arch="swin_tiny_patch4_window7_224", image_size=224, arch_options={"embed_dim": 32})
    assert architecture_title(small) == "Swin (width 32)"
    stages = small.model_copy(update={"arch_options": {"embed_dim": 32, "depths": [1, 1, 2]}})
    assert architecture_title(stages) == "Swin (width 32, depths 1/1/2)"
    assert architecture_title(subject(arch="vit_small_patch14_dinov2", image_size=224)) == "vit_small_patch14_dinov2"
    assert data_title("scenes?train=10&val=5") == "scenes"
    assert data_title("imagefolder:/somewhere/else/cifar10/?per_class=10") == "cifar10"
    assert data_title("tar:shards/photos-{000..146}.tar") == "photos"
    assert method_title(subject(True, method="MoCo V3")) == "MoCo v3+MTE"
    assert method_title(subject(method=None, family="timm", checkpoint="timm:vit_small")) == "timm vit_small"


def test_two_hundred_records_take_less_than_five_seconds(tmp_path):
    whole = {**CIFAR, "images": {"train": 50000, "val": 10000}}
    for index in range(100):
        who = subject(index % 2 == 1, index // 2, sha256=f"{index:064}")
        evaluation(tmp_path / "runs" / str(index), "knn", who, 0.6, whole, seed=index)
        if index < 2:
            pretraining(tmp_path / "runs" / f"p{index}", who, recipe(index % 2 == 1))
        analysis(tmp_path / "runs" / f"c{index}", "cka", who)
    start = time.process_time()
    written = write_report([tmp_path / "runs"], tmp_path / "report")
    assert time.process_time() - start < 5
    assert written.summary["records"] == 202
    assert len(cell(written.summary, "DINO+MTE")["minus_plain"]["seeds"]) == 50


def test_json_is_the_summary(tmp_path, capsys):
    build_runs(tmp_path / "runs", seeds=(0,))
    report([str(tmp_path / "runs")], str(tmp_path / "report"), json=True)
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "report" / "report.json").read_text())


def test_rows_of_one_title_say_in_which_settings_they_differ(tmp_path):
    """The ablation of the tokens: as many rows with MTE as there are recipes, all against the same plain one."""
    tokens = {"b": {"pooled": 6, "ten": True}, "c": {"pooled": 0, "ten": True}, "d": {"pooled": 0, "ten": False}}
    for letter, mte in ({"a": None} | tokens).items():
        who = subject(mte is not None, recipe_hash=letter * 12, sha256=letter * 64)
        pretraining(tmp_path / letter, who, recipe() | {"mte": mte})
        evaluation(tmp_path / letter / "evaluations" / "knn", "knn", who, 0.6, seed=ord(letter))
    page = write_report([tmp_path], tmp_path / "report").page.read_text()
    rows = table_rows(page, "## k-NN")
    assert [row[0] for row in rows[1:]] == [
        "DINO",
        *(f"DINO+MTE<br>{text}" for text in ("pooled 6, ten true", "pooled 0, ten true", "pooled 0, ten false")),
    ]
    for letter in "bc":
        analysis(tmp_path / letter / "evaluations" / "cka", "cka", subject(True, recipe_hash=letter * 12, sha256=letter * 64))
    page = write_report([tmp_path], tmp_path / "report").page.read_text()
    assert re.findall(r"\*\*DINO\+MTE on scenes\*\* \((.*)\)", page) == ["pooled 6, seed 0", "pooled 0, seed 0"]
    many = {"pooled": 1, "ten": False, "kernel": 3, "count": 2, "fusion": "sum"}
    pretraining(tmp_path / "d", subject(True, recipe_hash="d" * 12, sha256="d" * 64), recipe() | {"mte": many})
    page = write_report([tmp_path], tmp_path / "report").page.read_text()
    assert {row[0] for row in table_rows(page, "## k-NN")[2:]} == {f"DINO+MTE<br>dino_mte `{c * 6}`" for c in "bcd"}
