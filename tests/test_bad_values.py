"""Values, files and folders that cannot be meant, through the real command line: refused in one line, before work begins."""

import json
from pathlib import Path

import pytest

from mte_bench import cli
from mte_bench.errors import MOST_CHOICES, did_you_mean
from terminal import KNN, PRETRAIN, RANDOM, SCENES, ErrorLine, write_images


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished (smoke) run, which no test may change."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main([*PRETRAIN, "--data", SCENES, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def unreadable(tmp_path: Path) -> Path:
    """An image folder that fails as soon as an image is read."""
    data = write_images(tmp_path / "unreadable", "cat", "dog")
    for image in data.rglob("*.jpg"):
        image.write_bytes(b"no image")
    return data


# ---- settings and options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--set", "k=0"], "protocol knn: k: input should be greater than 0, got 0"),
        (["--set", "k=[]"], "k: the list needs 1 or more items, got []"),
        (["--set", "k=[10, -1]"], "k.1: input should be greater than 0, got -1"),
        (["--set", "k=13"], "the bank has 12 images, fewer than the smallest k; use more, or --set k=12"),
        (["--set", "temperature=0"], "protocol knn: temperature: input should be greater than 0, got 0"),
        (["--set", "temperature=.nan"], "temperature: input should be a finite number, got nan"),
        (["--set", "temperature=.inf"], "temperature: input should be a finite number, got inf"),
        (["--set", "few_shot=3"], "few_shot: input should be a group of settings, got 3"),
        (["--set", "feature=global,global"], "feature 'global,global': lists a kind twice"),
        (["--set", "feature=null"], "feature: input should be text, got None"),
        (["--set", "task=linear"], "--set task=linear: a protocol's task says what its numbers are; leave it out"),
        (["--set", "version=2"], "--set version=2: a protocol's version says what its numbers are; leave it out"),
        (["--set", "image_size=0"], "image_size 0: must be at least a pixel"),
        (["--set", "image_size=-4"], "image_size -4: must be at least a pixel"),
        (["--set", "resize=1"], "crop 32 must not be larger than resize 1"),
        (["--protocol", "gab"], "no protocol named 'gab' (did you mean 'gap'?)"),
        (["--protocol", "linear"], "no protocol named 'linear' (one of: fewshot, gap, gap-normed, knn, patches)"),
        (["--protocol", "mine.yaml"], "mine.yaml: no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_of_an_evaluation(options: list[str], expected: str, unreadable: Path, error_line: ErrorLine) -> None:
    line = error_line(*KNN, "--data", str(unreadable), *options)
    assert expected in line and "{" not in line


@pytest.mark.parametrize("value", ["depth=0", "embed_dim=0", "num_heads=0", "patch_size=0", "depth=-1", "image_size=many"])
def test_an_encoder_that_cannot_be_built(value: str, unreadable: Path, error_line: ErrorLine) -> None:
    name = f"random:vit_tiny_patch16_224?{value}"
    assert "vit_tiny_patch16_224" in error_line("knn", name, "--data", str(unreadable))


def test_an_unknown_architecture_is_not_answered_by_hundreds(unreadable: Path, error_line: ErrorLine) -> None:
    line = error_line("knn", "random:nothing-like-it", "--data", str(unreadable))
    assert line == "error: unknown architecture 'nothing-like-it'; `mte-bench list archs` shows them"
    many = [f"name{index}" for index in range(MOST_CHOICES + 1)]
    assert did_you_mean("xyz", many) == "" and did_you_mean("xyz", many[1:]).startswith(" (one of: name1, ")
    assert did_you_mean("nam3", many) == " (did you mean 'name3'?)" and did_you_mean("xyz", ["a"], listed=False) == ""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--workers", "-1"], "'--workers'"),
        (["--seed", "-1"], "'--seed'"),
        (["--seed", str(2**63)], "'--seed'"),
        (["--allow-corrupt", "-1"], "'--allow-corrupt'"),
        (["--save-minutes", "-1"], "'--save-minutes'"),
        (["--save-minutes", "nan"], "'--save-minutes'"),
        (["--device", "cuda:99"], "--device cuda:99: not available here"),
        (["--precision", "int8"], "precision 'int8'"),
        (["--out", ""], "--out '': names no folder"),
        (["--set", "knn_every=-1"], "knn_every: input should be greater than or equal to 0, got -1"),
        (["--set", "snapshot_every=-1"], "snapshot_every: input should be greater than or equal to 0, got -1"),
        (["--set", "optimiser.lr=.inf"], "optimiser.lr: input should be a finite number, got inf"),
        (["--set", "arch_options.depth=0"], "has no blocks"),
        (["--set", "mte=maybe"], "mte: input should be a group of settings, got 'maybe'"),
        (["--set", "batch_size=64", "--set", "accumulate=7"], ": batch_size 64 must be divisible by accumulate 7"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_of_a_pre_training(options: list[str], expected: str, error_line: ErrorLine, tmp_path: Path) -> None:
    out = tmp_path / "run"
    line = error_line(*PRETRAIN, "--data", SCENES, "--out", str(out), *options)
    assert expected in line and "settings:" not in line and not line.endswith("}")
    assert not out.exists()


@pytest.mark.parametrize("protocol", ["mae", "moby"])
def test_a_batch_larger_than_the_images_is_refused_before_any_is_read(
    protocol: str, unreadable: Path, error_line: ErrorLine
) -> None:
    line = error_line("linear", RANDOM, "--data", str(unreadable), "--protocol", protocol, "--workers", "0")
    assert "is more than the 12 train images" in line


def test_a_protocol_is_looked_for_among_those_of_its_task(unreadable: Path, error_line: ErrorLine) -> None:
    line = error_line("linear", RANDOM, "--data", str(unreadable), "--protocol", "mea")
    assert line == "error: no protocol named 'mea' (did you mean 'mae'?)"


@pytest.mark.parametrize("table", ["0", "99"])
def test_a_table_that_the_paper_does_not_have(table: str, error_line: ErrorLine) -> None:
    line = error_line("list", "recipes", "--table", table)
    assert line.startswith(f"error: list recipes --table {table}: not known; the tables are 2, 3, 4, ")


# ---- sources


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("scenez", "no folder 'scenez' (did you mean 'scenes'?)"),
        ("flowers", "no folder 'flowers'"),
        ("images.zip", "'images.zip' is a file; unpack it if it is an archive, and give the folder"),
        ("coco:images.zip", "'images.zip' is a file; unpack it if it is an archive, and give the folder"),
        ("scenes?train=4&train=5", "option 'train' is given twice"),
    ],
)
def test_sources(source: str, expected: str, error_line: ErrorLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images.zip").write_bytes(b"PK\x03\x04")
    assert error_line(*KNN, "--data", source).endswith(expected)


@pytest.mark.parametrize(("command", "split"), [("knn", "train"), ("linear", "train"), ("analyze cka", "val")])
def test_not_one_image_can_be_read(command: str, split: str, unreadable: Path, error_line: ErrorLine, tmp_path: Path) -> None:
    options = ("--workers", "0", "--allow-corrupt", "99", "--out", str(tmp_path / "out"))
    line = error_line(*command.split(), RANDOM, "--data", str(unreadable), *options)
    assert line.endswith(f"{unreadable}: not one of its 12 images of {split} can be read")


# ---- YAML files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "mapping of settings, the file is empty"),
        ("- knn\n", "mapping of settings, this is a list"),
        ("knn\n", "mapping of settings, this is one value"),
        ("task: knn\nk: [10]\nk: [20]\n", "not valid YAML ('k' is stated twice in line 3, column 1)"),
        ("a: {b: 1, c: 2, b: 3}\n", "not valid YAML ('b' is stated twice in line 1, column 17)"),
        ("tasks:\n\t- knn\n", "not valid YAML (found character '\\t' that cannot start any token in line 2, column 1)"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        (*KNN, "--data", "nowhere", "--protocol", "{file}"),
        ("pretrain", "{file}", "--data", "nowhere", "--out", "out"),
        ("run", "{file}", "--out", "out"),
    ],
    ids=["protocol", "recipe", "suite"],
)
def test_yaml_files(command: tuple[str, ...], text: str, expected: str, error_line: ErrorLine, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    line = error_line(*(word.format(file=file) for word in command))
    assert line.startswith(f"error: {file}: ") and line.endswith(expected)


def test_a_recipe_that_extends_itself(error_line: ErrorLine, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(f"extends: {second}\n")
    second.write_text(f"extends: {first}\n")
    line = error_line("pretrain", str(first), "--data", "nowhere", "--out", "out")
    assert line.endswith(f"extends itself ({first} extends {second} extends {first})")


# ---- folders and files of runs

OF_IMAGES = [
    (*KNN, "--data", "{data}"),
    ("linear", RANDOM, "--workers", "0", "--data", "{data}"),
    ("retrieval", RANDOM, "--workers", "0", "--data", "{data}", "--set", "recall=[1]"),
    ("finetune", RANDOM, "--workers", "0", "--data", "{data}", "--protocol", "tiny", "--smoke"),
    ("analyze", "cka", RANDOM, "--workers", "0", "--data", "{data}"),
]
OF_RUNS = [("analyze", "convergence", "{run}"), ("analyze", "cost", "dino_tiny_scenes", "--no-time")]


def typed(command: tuple[str, ...], **values: Path) -> list[str]:
    return [word.format(**values) if word[:1] == "{" else word for word in command]


@pytest.mark.parametrize("command", [*OF_IMAGES, *OF_RUNS], ids=lambda command: " ".join(command[:2]).partition("random")[0])
def test_the_record_of_another_task_is_not_overwritten(
    command: tuple[str, ...], run: Path, unreadable: Path, error_line: ErrorLine
) -> None:
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    line = error_line(*typed(command, data=unreadable, run=run), "--out", str(run))
    assert line == f"error: {run}: holds the record of pretrain; choose another --out"
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    "command",
    [*OF_IMAGES, *OF_RUNS, (*PRETRAIN, "--data", "{data}"), ("report", "{run}"), ("compare", "{run}", "{run}")],
    ids=lambda command: " ".join(command[:2]).partition("random")[0],
)
@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_in_place_of_the_folder_is_noticed_before_images_are_read(
    command: tuple[str, ...], below: str, run: Path, unreadable: Path, error_line: ErrorLine, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    line = error_line(*typed(command, data=unreadable, run=run), "--out", str(file / below))
    assert line == f"error: {file / below}: cannot be written ({file} is a file, not a folder); choose another --out"
    assert file.read_text() == "mine"


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
@pytest.mark.parametrize("place", ["metrics", "cost", "details"])
def test_a_record_with_what_is_no_number(
    place: str, value: str, run: Path, error_line: ErrorLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((run / "record.json").read_text())
    record[place] = {"metrics": {"loss": {"value": 0, "n": 1}}, "cost": {"seconds": 0}, "details": {"a": 0}}[place]
    broken = tmp_path / "broken" / "record.json"
    broken.parent.mkdir()
    broken.write_text(json.dumps(record).replace(": 0", f": {value}"))
    line = error_line("report", str(broken.parent), "--out", str(tmp_path / "report"))
    assert f"{broken}: not a readable record ({value} is no number)" in line
    assert cli.main(["report", str(broken.parent), str(run), "--out", str(tmp_path / "report")]) == 0
    assert f"left out: ../broken/record.json: not a readable record ({value} is no number)" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"xxx", b"PK\x03\x04" + bytes(40)])
def test_no_error_advises_to_run_what_a_file_holds(content: bytes, error_line: ErrorLine, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    state, weights = tmp_path / "run" / "training.pt", tmp_path / "weights.pth"
    state.write_bytes(content)
    weights.write_bytes(content)
    line = error_line(*PRETRAIN, "--data", SCENES, "--out", str(state.parent))
    assert line == f"error: {state}: not a training state, or cut short; remove the file to start anew"
    assert error_line("inspect", str(weights)).startswith(f"error: {weights}: not a checkpoint, or cut short; give ")
