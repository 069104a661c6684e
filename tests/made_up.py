"""Records that nobody measured: encoders, evaluations with their predictions, pre-training runs, analyses."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mte_bench.records import Cost, Data, Metric, Protocol, Subject, make_record, write_record
from mte_bench.statistics import bootstrap_ci

ENVIRONMENT = {"versions": {"mte-bench": "0.1.0", "torch": "2.11.0", "python": "3.11.7"}, "device": "a processor, 4 threads"}
CIFAR = {"source": "imagefolder:.data/cifar10", "classes": 10, "fingerprint": "c1fa" * 4, "images": {"train": 4000, "val": 500}}
SCENES = {"source": "scenes?train=4000", "classes": 8, "fingerprint": "5ce9" * 4, "images": {"train": 4000, "val": 400}}
IMAGENET = {
    "source": "imagefolder:ilsvrc",
    "classes": 1000,
    "fingerprint": "1111" * 4,
    "images": {"train": 1281167, "val": 50000},
}
KNN = {"feature": "global", "image_size": None, "resize": None, "temperature": 0.07, "k": [10, 20, 100, 200]}
PROTOCOLS = {"knn": Protocol(name="knn", settings=KNN), "linear": Protocol(name="linear-fast", settings={"epochs": 100})}
HEADLINE = {"knn": "top1_k10", "linear": "top1"}


def recipe(mte=False, **changes):
    plain = {"method": "dino", "arch": "vit_small_patch16_224", "epochs": 30, "views": {"local_count": 0}}
    return {**plain, "mte": {"pooled": 6} if mte else None, "description": f"mte {mte}", **changes}


def subject(mte=False, seed=0, random=False, **changes):
    arch, size = "vit_small_patch16_224", 64
    if random:
        named = {"checkpoint": f"random:{arch}", "family": "random", "sha256": f"{seed:02}" + "f" * 62}
        return Subject(**({"arch": arch, "image_size": size, "seed": seed} | named | changes))
    known = {"method": "dino", "mte": mte, "epochs": 30, "recipe": "dino_mte" if mte else "dino"}
    trained = {"recipe_hash": "bbbb00000000" if mte else "aaaa00000000", "seed": seed, "pretrain_data": "scenes?train=4000"}
    named = {"checkpoint": f"runs/{mte}-{seed}", "family": "mte-bench", "sha256": f"{int(mte)}{seed}" + "0" * 62}
    return Subject(**({"arch": arch, "image_size": size} | known | trained | named | changes))


def draws(accuracy, images, seed):
    """Who is right on which image, alike for all encoders up to the accuracy, as real ones are."""
    rng = np.random.default_rng(7)
    return 0.7 * rng.random(images) + 0.3 * np.random.default_rng(seed).random(images) < accuracy


def evaluation(folder, task, who, accuracy, data=SCENES, predictions=True, seed=0, names=None, right=None, **changes):
    n, metric = data["images"]["val"], HEADLINE.get(task, "top1")
    right = draws(accuracy, n, seed) if right is None else right
    folder.mkdir(parents=True, exist_ok=True)
    if predictions:
        labels = np.arange(n) % data["classes"]
        guesses = np.where(right, labels, (labels + 1) % data["classes"])
        names = [f"{i:05}.jpg" for i in range(n)] if names is None else names
        columns = {"name": names, "label": labels, f"prediction:{metric}": guesses}
        classes = json.dumps([f"class {i}" for i in range(data["classes"])])
        pq.write_table(pa.table(columns).replace_schema_metadata({"classes": classes}), folder / "predictions.parquet")
    value = Metric(value=100 * right.mean(), ci95=tuple(100 * end for end in bootstrap_ci(right)), n=n)
    record = make_record(
        **{
            "task": task,
            "protocol": PROTOCOLS.get(task) or Protocol(name=task, settings={}),
            "subject": who,
            "data": Data(split="val", **data),
            "metrics": {metric: value},
            "cost": Cost(seconds=3.0),
            "environment": ENVIRONMENT,
            "command": f"mte-bench {task} {who.checkpoint} --data {data['source']}",
            "created": "2026-11-20T10:00:00+00:00",
            "predictions": "predictions.parquet" if predictions else None,
            **changes,
        }
    )
    write_record(folder, record)
    return right


def pretraining(folder, who, settings, seconds=600.0, data=SCENES, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"step": s, "epoch": s / 10, "loss": 8 * 0.99**s + who.mte + who.seed / 10, "lr": 1e-3} for s in range(1, 301)]
    lines += [{"step": 10 * e, "epoch": e, "knn_top1": 20 + e + 5 * who.mte + who.seed} for e in range(5, 31, 5)]
    (folder / "curves.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["step"]))
    )
    Image.effect_noise((90, 30), 80).save(folder / "views.png")
    record = make_record(
        **{
            "task": "pretrain",
            "protocol": Protocol(name=who.recipe, settings=settings),
            "subject": who,
            "data": Data(split="train", **data),
            "metrics": {"loss": Metric(value=3.0, n=20)},
            "cost": Cost(seconds=seconds, images_per_second=120000 / seconds, peak_memory_bytes=2**30),
            "environment": ENVIRONMENT,
            "command": f"mte-bench pretrain {who.recipe} --seed {who.seed}",
            "created": "2026-11-20T09:00:00+00:00",
            "files": {"curves": "curves.jsonl", "views": "views.png"},
            **changes,
        }
    )
    write_record(folder, record)


def analysis(folder, task, who, data=SCENES, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((60, 60), 80).save(folder / f"{task}.png")
    record = make_record(
        task=task,
        protocol=Protocol(name="default"),
        subject=who,
        data=Data(**{"split": "val"} | data),
        metrics={"mean": Metric(value=0.5, n=400)},
        cost=Cost(seconds=1.0),
        environment=ENVIRONMENT,
        command=f"mte-bench analyze {task}",
        created="2026-11-20T11:00:00+00:00",
        files={"picture": f"{task}.png"},
        **changes,
    )
    write_record(folder, record)


ACCURACY = {"random": 0.25, False: 0.60, True: 0.66}


def build_runs(root, seeds=(0, 1, 2), predictions=True, data=SCENES):
    """A random encoder, and plain and +MTE runs over ``seeds`` with everything that commands leave; what was right, by place."""
    right = {}
    for task in HEADLINE:
        who = subject(random=True)
        right[task, "random", 0] = evaluation(root / f"random-{task}", task, who, 0.25, data, predictions, seed=99)
        for mte in (False, True):
            for seed in seeds:
                run, who = root / f"{'mte' if mte else 'plain'}-{seed}", subject(mte, seed)
                if task == "knn":
                    pretraining(run, who, recipe(mte), 690.0 if mte else 600.0, data)
                place = run / "evaluations" / task
                right[task, mte, seed] = evaluation(place, task, who, ACCURACY[mte], data, predictions, seed=10 * mte + seed)
    for mte in (False, True):
        for task in ("attention", "cka", *(["pooling"] if mte else [])):
            analysis(root / f"{'mte' if mte else 'plain'}-0" / "evaluations" / task, task, subject(mte, 0), data)
    return right
