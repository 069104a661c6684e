"""Tar shards as a source: what webdataset reads from them, an index that is made once, and what is refused."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from mte_bench.data import tars
from mte_bench.data.sources import open_source
from mte_bench.errors import CorruptImage, UserError
from source_files import picture, shards


def test_shards_hold_what_webdataset_reads_from_them(tmp_path: Path) -> None:
    shards(tmp_path)
    ours = open_source(f"tar:{tmp_path}/train-*.tar?val={tmp_path}/val-0.tar", "train")
    urls = [str(tmp_path / f"train-{i}.tar") for i in range(2)]
    theirs = list(wds.WebDataset(urls, shardshuffle=False).decode("pilrgb").to_tuple("__key__", "jpg", "cls"))
    assert len(ours) == len(theirs) == 10
    for index, (key, image, label) in enumerate(theirs):
        assert ours.name(index) == f"train-{index // 5}.tar/{key}.jpg"
        assert ours.labels[index] == label
        assert np.array_equal(np.asarray(ours.image(index)), np.asarray(image))
    assert ours.classes == ("0", "1", "2")


def test_shards_of_a_split_by_pattern_or_option(tmp_path: Path) -> None:
    shards(tmp_path)
    by_option = open_source(f"tar:{tmp_path}/train-{{0..1}}.tar?val={tmp_path}/val-0.tar", "val")
    by_pattern = open_source(f"tar:{tmp_path}/{{split}}-*.tar", "val")
    assert len(by_option) == len(by_pattern) == 3 and by_option.fingerprint == by_pattern.fingerprint
    with pytest.raises(UserError, match="no val split"):
        open_source(f"tar:{tmp_path}/train-*.tar", "val")
    with pytest.raises(UserError, match="not both"):
        open_source(f"tar:{tmp_path}/{{split}}-*.tar?val=x", "val")


def test_class_names_in_shards(tmp_path: Path) -> None:
    shards(tmp_path, lambda i: "val only" if i >= 12 else ("newt", "ape")[i % 2])
    images = open_source(f"tar:{tmp_path}/{{split}}-*.tar", "train")
    assert images.classes == ("ape", "newt") and images.labels.tolist() == [1, 0] * 5
    with pytest.raises(UserError, match="class 'val only' of the val shards is not in the train shards"):
        open_source(f"tar:{tmp_path}/{{split}}-*.tar", "val")


def test_an_index_is_made_once_and_again_when_the_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards(tmp_path)
    made: list[str] = []
    index = tars._index

    def counted(shard: str) -> tars.Index:
        made.append(shard)
        return index(shard)

    monkeypatch.setattr(tars, "_index", counted)
    spec = f"tar:{tmp_path}/{{split}}-*.tar"
    first = open_source(spec, "train")
    assert len(made) == 2
    assert open_source(spec, "train").fingerprint == first.fingerprint and len(made) == 2
    with wds.TarWriter(str(tmp_path / "train-1.tar")) as writer:
        writer.write({"__key__": "new", "jpg": picture(99), "cls": 1})
    assert len(open_source(spec, "train")) == 6 and len(made) == 3


def test_a_compressed_shard_is_refused_and_a_corrupt_image_in_one_named(tmp_path: Path) -> None:
    shards(tmp_path)
    images = open_source(f"tar:{tmp_path}/{{split}}-*.tar", "train")
    data = bytearray((tmp_path / "train-0.tar").read_bytes())
    start = int(images.offsets[2])  # type: ignore[attr-defined]
    data[start + 100 : start + int(images.sizes[2])] = bytes(int(images.sizes[2]) - 100)  # type: ignore[attr-defined]
    (tmp_path / "train-0.tar").write_bytes(data[: start + 100])
    with pytest.raises(CorruptImage, match=r"train-0\.tar/some/sample0002\.jpg"):
        images.image(2)
    (tmp_path / "train-0.tar").write_bytes(gzip.compress(bytes(data)))
    with pytest.raises(UserError, match="not a tar file"):
        open_source(f"tar:{tmp_path}/{{split}}-*.tar", "train")
