"""Mistakes of the person at the terminal, through the real command line: one line that says what to mend, exit code 2."""

import io
import os
import pickle
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from mte_bench import cli
from terminal import KNN, PRETRAIN, RANDOM, SCENES, ErrorLine, write_images


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished (smoke) run."""
    folder = tmp_path / "run"
    assert cli.main([*PRETRAIN, "--data", SCENES, "--out", str(folder)]) == 0
    return folder


# ---- recipes, protocols, settings, sources


def test_unknown_recipe(error_line: ErrorLine, tmp_path: Path) -> None:
    line = error_line("pretrain", "dino_tiny_scene", "--data", SCENES, "--out", str(tmp_path / "run"))
    assert "no recipe named 'dino_tiny_scene' (did you mean 'dino_tiny_scenes'?)" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("epoch=3", "unknown setting 'epoch' (did you mean 'epochs'?)"),
        ("optimiser.lrr=1", "unknown setting 'optimiser.lrr' (did you mean 'lr'?)"),
        ("method_settings.prototype=8", "unknown setting 'prototype' (did you mean 'prototypes'?)"),
        ("method=dyno", "unknown method 'dyno' (did you mean 'dino'?)"),
        ("epochs=ten", "epochs:"),
        ("epochs=-1", "epochs:"),
        ("epochs", "--set epochs: write it as key=value"),
        ("arch=vit_tini_patch16_224", "vit_tini_patch16_224"),
    ],
)
def test_unknown_or_mistyped_setting(setting: str, expected: str, error_line: ErrorLine, tmp_path: Path) -> None:
    assert expected in error_line(*PRETRAIN, "--data", SCENES, "--out", str(tmp_path / "run"), "--set", setting)


def test_recipe_file_that_is_not_yaml(error_line: ErrorLine, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: [dino\n")
    line = error_line("pretrain", str(recipe), "--data", SCENES, "--out", str(tmp_path / "run"))
    assert f"{recipe}: not valid YAML" in line


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--protocol", "knm"], "no protocol named 'knm' (did you mean 'knn'?)"),
        (["--protocol", "linear-fast"], "is for task 'linear', not 'knn'"),
        (["--set", "temprature=1"], "unknown setting 'temprature' (did you mean 'temperature'?)"),
        (["--set", "temperature=warm"], "temperature:"),
        (["--device", "cuda:99"], "--device cuda:99: not available here"),
        (["--device", "gpu"], "--device gpu: not available here"),
        (["--precision", "half"], "precision 'half': one of"),
        (["--data", "scene"], "scene"),
        (["--data", "imagefoldr:x"], "unknown kind 'imagefoldr' (did you mean 'imagefolder'?)"),
        (["--data", "scenes?trian=3"], "unknown option 'trian' of scenes (did you mean 'train'?)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unknown_or_mistyped_option(options: list[str], expected: str, error_line: ErrorLine, tmp_path: Path) -> None:
    assert expected in error_line(*KNN, "--data", SCENES, "--out", str(tmp_path / "out"), *options)


# ---- settings that contradict each other


@pytest.mark.parametrize(
    ("recipe", "settings", "expected"),
    [
        ("moby_tiny_scenes", ["mte.auxiliary_cls=2"], "no CLS token; set mte.auxiliary_cls=0"),
        ("moby_tiny_scenes", ["batch_size=48"], "batch_size 48: must divide method_settings.queue, 1024"),
        ("moby_tiny_scenes", ["method_settings.queue=1000"], "batch_size 64: must divide method_settings.queue, 1000"),
        ("ibot_tiny_scenes", ["token_learner.after=2", "token_learner.tokens=4"], "iBOT needs patches at the end"),
        ("hssl_tiny_scenes", ["token_learner.after=2", "token_learner.tokens=4"], "HSSL needs patches at the end"),
        ("ibot_tiny_scenes", ["method_settings.masking.ratios=[[0.9, 0.2]]"], "ratios must be"),
        ("dino_tiny_scenes", ["method_settings.masking.shape=random"], "unknown setting 'masking'"),
        ("dino_tiny_scenes", ["token_learner.after=0"], "token_learner.after"),
        ("dino_tiny_scenes", ["token_learner.after=4"], "token_learner.after 4: vit_tiny_patch16_224 has 4 blocks"),
        ("dino_tiny_scenes", ["token_learner.after=1.5"], "token_learner.after"),
        ("dino_tiny_scenes", ["token_learner.after=2", "token_learner.tokens=17"], "make only 16 patches"),
        ("moby_tiny_scenes", ["token_learner.after=1"], "is no ViT"),
        ("dino_tiny_scenes", ["mte.frozen=true"], "frozen auxiliary tokens cannot be a target"),
        ("dino_tiny_scenes", ["mte.auxiliary_cls=0", "mte.pooled=0"], "auxiliary_cls and pooled are both 0"),
        ("dino_tiny_scenes", ["views.global1.size=60", "views.global2.size=60"], "views.global1.size 60"),
        ("dino_tiny_scenes", ["views.local_count=2", "views.local.size=20"], "views.local.size 20"),
        ("dino_tiny_scenes", ["views.global2=null"], "compares two views; views.global2 must not be null"),
        ("supervised_tiny_scenes", ["views.global2.size=64"], "learns from one view; set views.global2=null"),
        ("supervised_tiny_scenes", ["views.local_count=2"], "set views.global2=null and views.local_count=0"),
        ("supervised_tiny_scenes", ["method_settings.mixup=0.8", "batch_size=63"], "batch_size 63: mixup and CutMix pair images"),
        (
            "supervised_tiny_scenes",
            ["method_settings.cutmix=1", "batch_size=6", "accumulate=2"],
            "batch_size 6 makes micro-batches of 3: mixup and CutMix pair images",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("smoke", [[], ["--smoke"]], ids=["", "smoke"])
def test_settings_that_contradict_each_other(
    recipe: str, settings: list[str], expected: str, smoke: list[str], error_line: ErrorLine, tmp_path: Path
) -> None:
    """Refused before data is looked for, of which there is none."""
    options = [word for setting in settings for word in ("--set", setting)]
    assert expected in error_line("pretrain", recipe, "--data", "nowhere", "--out", str(tmp_path / "run"), *options, *smoke)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("smoke", [[], ["--smoke"]], ids=["", "smoke"])
def test_learning_from_labels_that_are_not_there(
    smoke: list[str], error_line: ErrorLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before any image is read: these are no images."""
    for split in ("train", "val"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        for index in range(80):
            (tmp_path / "flat" / split / f"{index}.jpg").touch()
    command = ("pretrain", "supervised_tiny_scenes", "--data", str(tmp_path / "flat"), "--out", str(tmp_path / "run"), *smoke)
    assert "its images have no class labels" in error_line(*command)
    assert not (tmp_path / "run").exists()


# ---- images


@pytest.mark.parametrize("command", [(*PRETRAIN,), KNN], ids=["pretrain", "knn"])
def test_folder_without_images(command: tuple[str, ...], error_line: ErrorLine, tmp_path: Path) -> None:
    (tmp_path / "data" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "val" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "train" / "cat" / "notes.txt").write_text("no image")
    assert str(tmp_path / "data") in error_line(*command, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"))


@pytest.mark.parametrize("command", [(*PRETRAIN,), KNN], ids=["pretrain", "knn"])
def test_folder_that_is_not_there(command: tuple[str, ...], error_line: ErrorLine, tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in error_line(*command, "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))


@pytest.mark.parametrize("verb", ["knn", "linear"])
def test_one_class_only(verb: str, error_line: ErrorLine, tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", "cat")
    line = error_line(verb, RANDOM, "--data", str(data), "--out", str(tmp_path / "out"))
    assert "only one class ('cat')" in line


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("verb", ["pretrain", "knn"])
def test_truncated_jpeg(
    verb: str, workers: str, error_line: ErrorLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    data = write_images(tmp_path / "data", "cat", "dog")
    broken = data / "train" / "dog" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    pretrain = [
        "pretrain",
        "dino_tiny_scenes",
        "--set",
        "epochs=1",
        "--set",
        "batch_size=4",
        "--set",
        "optimiser.warmup_epochs=0",
    ]
    command = {"pretrain": pretrain, "knn": KNN}[verb]
    arguments = [*command, "--data", str(data), "--out", str(tmp_path / "out"), "--workers", workers]
    line = error_line(*arguments)
    assert "dog/3.jpg" in line and "--allow-corrupt" in line
    assert cli.main([*arguments, "--allow-corrupt", "1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["data"]["corrupt"] == ["train/dog/3.jpg"]


# ---- checkpoints


def not_checkpoints() -> dict[str, bytes]:
    """Files that somebody might give for a checkpoint."""
    picture, archive, tensors = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "jpeg")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "hello")
    torch.save({"a": torch.zeros(3)}, tensors)
    return {
        "empty.pth": b"",
        "text.pth": b"this is a letter\n",
        "picture.jpg": picture.getvalue(),
        "archive.pth": archive.getvalue(),
        "half.pth": tensors.getvalue()[:200],
        "other.pth": tensors.getvalue(),
        "text.safetensors": b"this is a letter\n",
        "short.safetensors": (8).to_bytes(8, "little") + b"{}",
    }


@pytest.mark.parametrize("name", not_checkpoints())
@pytest.mark.parametrize("verb", ["knn", "inspect", "export"])
def test_file_that_is_no_checkpoint(verb: str, name: str, error_line: ErrorLine, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(not_checkpoints()[name])
    more = {"knn": ["--data", SCENES], "inspect": [], "export": ["--out", str(tmp_path / "x.pth")]}[verb]
    assert str(path) in error_line(verb, str(path), *more)


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ("nowhere.pth", "nowhere.pth"),
        (".", "."),
        ("timm:vit_smal_patch16_224", "vit_smal_patch16_224"),
        ("random:vit_smal_patch16_224", "vit_smal_patch16_224"),
        ("random:resnet50", "resnet50"),
    ],
)
def test_checkpoint_that_is_not_there(
    checkpoint: str, expected: str, error_line: ErrorLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in error_line("inspect", checkpoint)


class Malicious:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("verb", ["knn", "inspect", "export"])
@pytest.mark.parametrize("kind", ["torch", "legacy", "plain"])
def test_pickle_that_would_run_code(kind: str, verb: str, error_line: ErrorLine, tmp_path: Path) -> None:
    witness, path = tmp_path / "it-ran", tmp_path / "model.pth"
    content = {"model": {"blocks.0.attn.qkv.weight": torch.zeros(6, 2)}, "args": Malicious(witness)}
    if kind == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
    more = {"knn": ["--data", SCENES], "inspect": [], "export": ["--out", str(tmp_path / "x.pth")]}[verb]
    line = error_line(verb, str(path), *more)
    assert str(path) in line
    assert not witness.exists()
    pickle.loads(pickle.dumps(Malicious(witness)))  # it would have
    assert witness.exists()


def test_run_folder_whose_state_would_run_code(run: Path, error_line: ErrorLine, tmp_path: Path) -> None:
    witness = tmp_path / "it-ran"
    torch.save({"step": Malicious(witness)}, run / "training.pt")
    assert "training.pt" in error_line(*PRETRAIN, "--data", SCENES, "--out", str(run))
    assert not witness.exists()


# ---- disks and permissions


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system of its own, where the tests may do that."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mounted-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no right to mount a file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("space", ["64k", "400k", "1200k"])
def test_full_disk(space: str, mount: Callable[[str], Path], error_line: ErrorLine) -> None:
    line = error_line(*PRETRAIN, "--data", SCENES, "--out", str(mount(f"size={space}") / "run"))
    assert "space" in line and "--out" in line


def test_full_disk_of_the_cache(
    mount: Callable[[str], Path], error_line: ErrorLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(mount("size=16k")))
    assert "space" in error_line(*KNN, "--data", "scenes?train=400&val=20&size=32", "--out", str(tmp_path / "out"))


def test_full_disk_of_an_evaluation(mount: Callable[[str], Path], error_line: ErrorLine) -> None:
    folder = mount("size=8k")
    (folder / "filler").write_bytes(bytes(8192))
    assert "space" in error_line(*KNN, "--data", SCENES, "--out", str(folder))


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    """A limit on file sizes takes the way of a full disk, and needs no rights."""
    limit = 200_000
    done = subprocess.run(
        [sys.executable, "-m", "mte_bench", *PRETRAIN, "--data", SCENES, "--out", str(tmp_path / "run")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [(*PRETRAIN,), KNN, ("report", "{run}")], ids=["pretrain", "knn", "report"])
def test_folder_that_cannot_be_written(
    command: tuple[str, ...], run: Path, mount: Callable[[str], Path], error_line: ErrorLine
) -> None:
    folder = mount("ro") / "out"
    arguments = [word.format(run=run) for word in command]
    more = [] if command[0] == "report" else ["--data", SCENES]
    assert str(folder) in error_line(*arguments, *more, "--out", str(folder))


@pytest.mark.parametrize("command", [(*PRETRAIN,), KNN, ("report", "{run}")], ids=["pretrain", "knn", "report"])
def test_folder_below_a_file(command: tuple[str, ...], run: Path, error_line: ErrorLine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = [word.format(run=run) for word in command]
    more = [] if command[0] == "report" else ["--data", SCENES]
    assert str(tmp_path / "file") in error_line(*arguments, *more, "--out", str(tmp_path / "file" / "out"))


# ---- going on


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["--set", "optimiser.lr=0.123"], "lr"),
        (["--set", "mte=true"], "mte"),
        (["--seed", "7"], "seed"),
        (["--data", "scenes?train=41&val=20&size=32"], "data"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_resume_with_changed_settings(changed: list[str], expected: str, run: Path, error_line: ErrorLine) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.iterdir() if path.is_file()}
    line = error_line(*PRETRAIN, "--data", SCENES, "--out", str(run), *changed)
    assert expected in line and str(run) in line
    assert before == {path: path.stat().st_mtime_ns for path in run.iterdir() if path.is_file()}


def test_report_of_nothing(error_line: ErrorLine, tmp_path: Path) -> None:
    assert "nowhere" in error_line("report", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    assert "empty" in error_line("report", str(tmp_path / "empty"), "--out", str(tmp_path / "out"))
