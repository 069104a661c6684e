"""``images.parquet``: what each image adds to the numbers of a dense record, a row per image."""

import json
from pathlib import Path

from mte_bench.dense.detection import DetectedImages
from mte_bench.dense.segmentation import SegmentedImages
from mte_bench.files import atomic

Images = SegmentedImages | DetectedImages
FORMAT = "mte-bench-images/1"
KINDS: dict[str, type[SegmentedImages] | type[DetectedImages]] = {"segmentation": SegmentedImages, "detection": DetectedImages}


def write_images(path: str | Path, images: Images) -> None:
    """Write ``images`` to ``path`` atomically; the file's metadata holds what they are and the names of the classes."""
    import pyarrow.parquet as pq

    kind = next(kind for kind, form in KINDS.items() if isinstance(images, form))
    metadata = {"format": FORMAT, "kind": kind, "classes": json.dumps(images.classes, ensure_ascii=False)}
    with atomic(path) as temporary:
        pq.write_table(images.table().replace_schema_metadata(metadata), temporary, compression="zstd")


def read_images(path: str | Path) -> Images:
    """Read what ``write_images`` wrote; raises ``ValueError`` saying what is wrong with another file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            table = file.read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(str(error)) from error
    metadata = table.schema.metadata or {}
    if metadata.get(b"format") != FORMAT.encode():
        raise ValueError("is not what a dense task writes for each image")
    form = KINDS.get(metadata.get(b"kind", b"").decode())
    if form is None or "name" not in table.column_names or not len(table):
        raise ValueError("holds no images, or of a kind that is not known")
    names = tuple(table["name"].to_pylist())
    if len(set(names)) < len(names):
        raise ValueError("holds an image twice")
    return form.of_table(table, names, tuple(json.loads(metadata.get(b"classes", b"[]"))))
