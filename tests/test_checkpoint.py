"""Checkpoints: what is written is plain timm and comes back, and nothing unsafe or broken passes."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from layouts import METADATA, SMALL, agrees, dino_head, features, plain, run_folder, save, tiny
from mte_bench.encoders.checkpoint import open_checkpoint, save_encoder, weights_hash
from mte_bench.encoders.commands import export, inspect
from mte_bench.encoders.initial import fresh_encoder
from mte_bench.encoders.tokens import MultiToken
from mte_bench.encoders.weight_files import read_metadata
from mte_bench.errors import UserError


def test_run_folder(tmp_path: Path):
    encoder, auxiliary = run_folder(tmp_path)
    opened = open_checkpoint(str(tmp_path))
    assert opened.folder == tmp_path
    assert agrees(opened, encoder.model)
    assert opened.encoder.spec == SMALL
    assert opened.subject.model_dump() == {
        "checkpoint": str(tmp_path),
        "sha256": weights_hash(encoder),
        "family": "mte-bench",
        "arch": SMALL.arch,
        "image_size": 32,
        "patch_size": 8,
        "arch_options": {"embed_dim": 48, "depth": 2, "num_heads": 3},
        "method": "dino",
        "mte": True,
        "epochs": 2.5,
        "seed": 3,
        "recipe": "dino_tiny_scenes",
        "recipe_hash": "0123456789ab",
        "pretrain_data": "scenes?train=100",
        "parts": (),
    }
    multi = opened.multi_token()
    assert multi is not None
    assert multi.names == ("CLS 1", "CLS 2", "pooled 1", "pooled 2", "pooled 3")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(multi(images)[1], MultiToken(encoder, auxiliary).eval()(images)[1])
    names = safetensors.torch.load_file(tmp_path / "auxiliary.safetensors")
    assert {"tokens.cls", "heads.auxiliary.layers.0.weight", "heads.tail.weight_v"} <= set(names)
    direct = open_checkpoint(str(tmp_path / "encoder.safetensors"))
    assert direct.folder is None
    assert direct.multi_token() is not None
    (tmp_path / "auxiliary.safetensors").unlink()
    assert open_checkpoint(str(tmp_path)).multi_token() is None


def test_auxiliary_part_of_another_moment_is_refused(tmp_path: Path):
    encoder, _ = run_folder(tmp_path)
    save_encoder(tmp_path / "encoder.safetensors", encoder, METADATA | {"epoch": 3.0})  # a kill between the two files
    with pytest.raises(UserError, match="another epoch"):
        open_checkpoint(str(tmp_path)).multi_token()


def test_written_bytes_are_the_same_every_time(tmp_path: Path):
    encoder, _ = run_folder(tmp_path / "a")
    first = (tmp_path / "a" / "encoder.safetensors").read_bytes()
    for _ in range(5):  # the library's own order of ten metadata keys would change with near certainty
        save_encoder(tmp_path / "b", encoder, dict(reversed(METADATA.items())))
        assert (tmp_path / "b").read_bytes() == first
    metadata = read_metadata(tmp_path / "b")
    assert metadata["format"] == "mte-bench-encoder/1"
    assert json.loads(metadata["spec"]) == SMALL.model_dump(mode="json")
    assert (metadata["mte"], metadata["epoch"], metadata["method"]) == ("true", "2.5", "dino")
    assert "note" not in metadata


def test_format_of_another_version(tmp_path: Path):
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", {"format": "mte-bench-encoder/2"})
    with pytest.raises(UserError, match="mte-bench-encoder/2, this version reads mte-bench-encoder/1"):
        open_checkpoint(str(tmp_path / "x.safetensors"))


def test_partial_match(tmp_path: Path):
    weights = tiny().state_dict()
    file = save(
        {name: tensor for name, tensor in weights.items() if "blocks.3." not in name} | {"adapter.weight": torch.ones(2)},
        tmp_path / "x.pth",
    )
    with pytest.raises(
        UserError, match=r"missing blocks\.3\.norm1\.weight.* and 8 more; not expected adapter\.weight.*--allow-partial"
    ):
        open_checkpoint(file)
    opened = open_checkpoint(file, allow_partial=True)
    assert len(opened.missing) == 12
    assert opened.dropped == ["adapter.weight"]
    start = fresh_encoder(opened.encoder.spec, 0).model.state_dict()
    found = opened.encoder.model.state_dict()
    assert all(torch.equal(found[name], start[name] if name in opened.missing else weights[name]) for name in found)
    surplus = save(weights | {"adapter.weight": torch.ones(2)}, tmp_path / "surplus.pth")
    with pytest.raises(UserError, match=r"missing nothing; not expected adapter\.weight"):
        open_checkpoint(surplus)
    wrong = save(weights | {"norm.bias": torch.zeros(7)}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=r"norm\.bias of shape 7, not 192"):
        open_checkpoint(wrong)


class Malice:
    """Unpickling it would create a file."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, zipped: bool):
    content = {"model": dict(tiny().state_dict()), "args": Malice(tmp_path / "victim")}
    file = save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"would run \w+\.mkdir, which is refused"):
        open_checkpoint(file)
    assert not (tmp_path / "victim").exists()


def test_what_training_scripts_leave_behind_is_ignored(tmp_path: Path):
    """Arguments with paths and NumPy numbers: harmless, and never made into live objects."""
    model = tiny()
    arguments = argparse.Namespace(lr=np.float64(0.1), output=tmp_path, nested={"a": argparse.Namespace(b=1)})
    opened = open_checkpoint(save({"model": model.state_dict(), "args": arguments, "best": np.float32(3)}, tmp_path / "x.pth"))
    assert agrees(opened, model)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_checkpoints(tmp_path: Path, suffix: str):
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pth":
        save(tiny().state_dict(), whole)
    else:
        run_folder(tmp_path)
        whole = tmp_path / "encoder.safetensors"
    data = whole.read_bytes()
    generator = np.random.default_rng(0)
    broken = [b"", b"PK\x03\x04", b"\x80\x02", b"hello, I am a text file\n" * 100, data[:100], data[: len(data) // 2], data[:-1]]
    broken += [generator.bytes(1000) for _ in range(20)]
    for index, content in enumerate(broken):
        file = tmp_path / f"{index}{suffix}"
        file.write_bytes(content)
        with pytest.raises(UserError, match=str(file)) as caught:
            open_checkpoint(str(file))
        assert "\n" not in str(caught.value)
        assert "refused" not in str(caught.value)


def test_texts_that_are_no_checkpoints(tmp_path: Path):
    for text, says in [
        ("nowhere/at/all", "no such checkpoint"),
        ("vit_tiny_patch16_224", "did you mean timm:vit_tiny_patch16_224 or random:vit_tiny_patch16_224"),
        (str(tmp_path), "no encoder.safetensors"),
        ("random:vit_tiny_patch16_22", "did you mean 'vit_tiny_patch16_224'"),
        ("random:vit_tiny_patch16_224?seed=x", "seed must be a whole number"),
        ("random:vit_tiny_patch16_224?seed", "must be option=value"),
        ("random:vit_tiny_patch16_224?dept=2", "an option it does not have"),
        ("random:vit_tiny_patch16_224?image_size=big", "image_size"),
        ("timm:resnet18", "not a ViT or Swin"),
        ("timm:vit_tiny_patch16_224.nope", "Invalid pretrained tag"),
        ("timm:vit_small_patch8_224.nope", "Invalid pretrained tag"),
        (save([1, 2], tmp_path / "list.pth"), "holds a list"),
        (save({"a": 1}, tmp_path / "empty.pth"), r"no weights.*\(it has a\)"),
        (save({"conv1.weight": torch.ones(2, 2)}, tmp_path / "cnn.pth"), "holds no ViT or Swin"),
    ]:
        with pytest.raises(UserError, match=says):
            open_checkpoint(text)


def test_random_encoders(tmp_path: Path):
    text = "random:vit_tiny_patch16_224?image_size=32&patch_size=8&embed_dim=48&depth=2&num_heads=3"
    opened = open_checkpoint(text)
    assert opened.encoder.spec == SMALL
    assert opened.sha256 == weights_hash(fresh_encoder(SMALL, 0)) == open_checkpoint(text).sha256
    assert (opened.family, opened.subject.seed, opened.subject.method, opened.folder) == ("random", 0, None, None)
    other = open_checkpoint(f"{text}&seed=7")
    assert other.sha256 == weights_hash(fresh_encoder(SMALL, 7)) != opened.sha256
    run_folder(tmp_path)
    assert open_checkpoint(f"random:{tmp_path}?seed=7").sha256 == other.sha256
    assert open_checkpoint(f"random:{tmp_path}/encoder.safetensors").sha256 == opened.sha256
    grey = open_checkpoint(f"{text}&mean=[0.5,0.5,0.5]&std=[0.5,0.5,0.5]")
    assert grey.encoder.spec.mean == (0.5, 0.5, 0.5)


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


def test_pretrained_weights_from_timms_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    offline(monkeypatch, tmp_path)
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    model = plain("vit_tiny_patch16_224")
    repository = tmp_path / f"models--timm--{name}"
    snapshot = repository / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    head = {"head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)}
    safetensors.torch.save_file(model.state_dict() | head, snapshot / "model.safetensors")
    opened = open_checkpoint(f"timm:{name}")
    assert agrees(opened, model)
    assert (opened.family, opened.subject.arch) == ("timm", "vit_tiny_patch16_224")
    assert opened.encoder.spec.mean == (0.5, 0.5, 0.5)  # these weights want other images than ImageNet's mean
    assert open_checkpoint(f"timm:{name}", image_size=64).encoder.spec.image_size == 64


def test_weights_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    offline(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=r"timm:vit_tiny_patch16_224: the weights could not be had \(.*\); connect"):
        open_checkpoint("timm:vit_tiny_patch16_224")


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_folder(tmp_path)
    inspect(str(tmp_path))
    shown = capsys.readouterr().out
    for word in ("mte-bench", SMALL.arch, "embed_dim 48", "0.07 M", "CLS 1", "pooled 3", "dino_tiny_scenes"):
        assert word in shown
    weights = tiny().state_dict()
    file = save({name: tensor for name, tensor in weights.items() if name != "norm.bias"} | dino_head(192), tmp_path / "x.pth")
    inspect(file, all_names=True)
    shown = capsys.readouterr().out
    assert "norm.bias" in shown
    assert "head.last_layer.weight_g" in shown
    inspect(file, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == ["norm.bias"]
    assert found["subject"]["family"] == "dino"
    assert found["macs"] == pytest.approx(12 * (12 * 17 * 192**2 + 2 * 17**2 * 192) + 16 * 192 * 768)


@pytest.mark.parametrize("name", ["out.safetensors", "out.pth"])
def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    """The printed line loads the file into plain timm, with the same features."""
    encoder, _ = run_folder(tmp_path / "run")
    out = tmp_path / "deep" / name
    export(str(tmp_path / "run"), out)
    line = capsys.readouterr().out.strip()
    assert line.startswith("timm.create_model(")
    loaded = eval(line, {"timm": timm}).eval()
    assert torch.equal(features(loaded, 32), features(encoder, 32))
    again = open_checkpoint(str(out) if name.endswith("safetensors") else f"{out}?num_heads=3")
    assert again.sha256 == open_checkpoint(str(tmp_path / "run")).sha256
    if name.endswith("safetensors"):
        assert (again.subject.method, again.subject.recipe_hash) == ("dino", METADATA["recipe_hash"])
    with pytest.raises(UserError, match="--format h5"):
        export(str(tmp_path / "run"), tmp_path / "x", file_format="h5")


def test_commands_import_nothing_heavy():
    code = "import sys, mte_bench.encoders.commands; print({'torch', 'timm', 'numpy', 'pydantic'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
