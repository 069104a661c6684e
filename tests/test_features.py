"""Features: right, computed once, and never wrong whatever happens to the process or the files."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from downstream import feature_store, features
from downstream.features import Pass, extract, extracted
from mte_bench.data.sources import ImageSet, open_source
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.encoders.encoder import EncoderSpec, build_encoder
from mte_bench.errors import CorruptImage, UserError

SPEC = EncoderSpec(
    arch="vit_tiny_patch16_224", image_size=16, patch_size=8, options={"embed_dim": 32, "depth": 2, "num_heads": 2}
)
TRANSFORM = EvaluationTransform.for_size(16, SPEC.mean, SPEC.std)


class Drawn(ImageSet):
    """``n`` images of noise, some of them corrupt, each taking ``delay`` seconds; every decoding is noted in ``log``."""

    def __init__(self, n=40, corrupt=(), delay=0.0, log=None, fingerprint="drawn"):
        self.source, self.split, self.classes = "drawn", "train", ("a", "b")
        self.labels, self.fingerprint = np.arange(n) % 2, f"{fingerprint}{n}"
        self.corrupt, self.delay, self.log = corrupt, delay, log

    def name(self, index):
        return f"{index}.png"

    def image(self, index):
        time.sleep(self.delay)
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(f"{index}\n")
        if index in self.corrupt:
            raise CorruptImage(f"/data/{index}.png", "image file is truncated")
        return Image.fromarray(np.random.default_rng(index).integers(256, size=(20, 24, 3), dtype=np.uint8))


def encoder(seed=0):
    torch.manual_seed(seed)
    return build_encoder(SPEC).eval()


def how(cache, **options):
    return Pass(cache=cache, **({"batch_size": 8, "commit_seconds": 0.0} | options))


def decoded(log):
    return [int(line) for line in log.read_text().split()] if log.exists() else []


@pytest.fixture
def whole(tmp_path):
    """The features of an undisturbed pass."""
    return np.array(extract(encoder(), "w", Drawn(), TRANSFORM, how=how(tmp_path / "whole")).arrays["global"])


def test_features_are_what_the_encoder_gives(whole):
    images = torch.stack([TRANSFORM(Drawn().image(index)) for index in range(40)])
    with torch.inference_mode():
        expected = torch.cat([encoder()(batch).global_token for batch in images.split(8)])
    assert np.array_equal(whole, expected.numpy())


def test_kinds_share_one_pass_and_only_what_is_missing_is_computed(tmp_path):
    log = tmp_path / "log"
    images, model = Drawn(log=log), encoder()
    found = extract(model, "w", images, TRANSFORM, ["global", "patch-mean"], how(tmp_path))
    assert decoded(log) == list(range(40))
    batch = torch.stack([TRANSFORM(images.image(index)) for index in range(8)])
    log.unlink()
    with torch.inference_mode():
        tokens = model(batch)
    assert np.array_equal(found.arrays["patch-mean"][:8], tokens.raw_patches.mean(1).numpy())
    again = extract(model, "w", images, TRANSFORM, ["patch-mean", "global"], how(tmp_path))
    assert again.cached and not decoded(log)
    third = extract(model, "w", images, TRANSFORM, ["patch-mean-normed", "global"], how(tmp_path))
    assert decoded(log) == list(range(40))
    assert np.array_equal(third.arrays["patch-mean-normed"][:8], tokens.patches.mean(1).numpy())
    assert np.array_equal(third.arrays["global"], found.arrays["global"])


def test_kinds_of_one_pass_get_what_each_needs(tmp_path):
    """Blocks and attention that one kind asks for do not reach another."""
    kinds = ["cls-last1", "patches-top2", "cls-last2", "patches", "global"]
    together = extract(encoder(), "w", Drawn(), TRANSFORM, kinds, how(tmp_path / "together")).arrays
    for kind in kinds:
        alone = extract(encoder(), "w", Drawn(), TRANSFORM, [kind], how(tmp_path / "alone")).arrays
        assert np.array_equal(together[kind], alone[kind])
    assert together["cls-last2"].shape == (40, 64) and together["patches"].shape == (40, 4 * 32)
    assert np.array_equal(together["cls-last2"][:, 32:], together["cls-last1"])


def test_reduced_decoding_is_features_of_smaller_jpegs(tmp_path):
    """The half that libjpeg gives, taken by torchvision's transforms; the other setting takes the whole."""
    folder = tmp_path / "data" / "val"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(256, size=(9, 12, 3), dtype=np.uint8)
    photograph = Image.fromarray(pixels).resize((60, 46), Image.Resampling.BICUBIC)
    photograph.save(folder / "a.jpg", quality=95)
    images, model = open_source(str(tmp_path / "data"), "val"), encoder()
    found = {
        decode: extract(model, "w", images, TRANSFORM.model_copy(update={"decode": decode}), how=how(tmp_path / "cache")).arrays[
            "global"
        ]
        for decode in ("full", "reduced")
    }
    for decode, size in (("full", (60, 46)), ("reduced", (30, 23))):
        with Image.open(folder / "a.jpg") as image:
            if decode == "reduced":
                image.draft(None, size)
            assert image.size == size
            seen = F.center_crop(F.resize(image, TRANSFORM.resize, F.InterpolationMode.BICUBIC), TRANSFORM.crop)
        batch = F.normalize(F.to_tensor(seen), SPEC.mean, SPEC.std).unsqueeze(0)
        with torch.inference_mode():
            assert np.array_equal(found[decode], model(batch).global_token.numpy())
    assert 0 < np.abs(found["full"] - found["reduced"]).max() < 0.5


def test_workers_change_nothing(tmp_path, whole):
    found = extract(encoder(), "w", Drawn(), TRANSFORM, how=how(tmp_path, workers=2))
    assert np.array_equal(found.arrays["global"], whole)
    assert 0 <= found.waiting <= 1 and found.images_per_second > 0


def test_whatever_determines_a_feature_is_part_of_its_key(tmp_path):
    def cached(weights="w", images=None, transform=TRANSFORM, kind="global", spec=SPEC, **options):
        model = build_encoder(spec).eval()
        return extract(model, weights, images or Drawn(8), transform, [kind], how(tmp_path, **options)).cached

    assert not cached() and cached()
    assert not cached(weights="other")
    assert not cached(images=Drawn(8, fingerprint="other"))
    assert not cached(transform=TRANSFORM.model_copy(update={"resize": 16}))
    assert not cached(transform=TRANSFORM.model_copy(update={"decode": "reduced"}))
    assert not cached(precision=torch.bfloat16)
    assert not cached(feature_dtype="float16")
    assert not cached(feature_dtype="float32", precision=torch.bfloat16)
    assert not cached(kind="patch-mean")
    assert not cached(spec=SPEC.model_copy(update={"options": {**SPEC.options, "num_heads": 4}}))
    assert not cached(spec=SPEC.model_copy(update={"resize_positions": "dino"}))
    assert cached() and cached(batch_size=4, workers=1, rank=1, processes=2, feature_dtype="float32")


def test_a_pass_in_16_bits_is_kept_in_16_bits(tmp_path, whole):
    found = extract(encoder(), "w", Drawn(), TRANSFORM, how=how(tmp_path, precision=torch.bfloat16)).arrays["global"]
    assert found.dtype == np.float16
    assert 0 < np.abs(found - whole).max() < 0.1


def test_features_are_kept_in_the_type_that_is_asked_for(tmp_path, whole):
    half = extract(encoder(), "w", Drawn(), TRANSFORM, how=how(tmp_path, feature_dtype="float16")).arrays["global"]
    assert half.dtype == np.float16 and np.array_equal(half, whole.astype(np.float16))
    wide = how(tmp_path, feature_dtype="float32", precision=torch.bfloat16)
    assert extract(encoder(), "w", Drawn(), TRANSFORM, how=wide).arrays["global"].dtype == np.float32


def test_features_too_large_for_16_bits_are_refused(tmp_path):
    model = encoder()
    with torch.no_grad():
        model.model.norm.bias[0] = 1e5
    with pytest.raises(UserError, match=r"global feature of 0\.png is not finite.*--feature-dtype float32"):
        extract(model, "w", Drawn(), TRANSFORM, how=how(tmp_path, feature_dtype="float16"))


def test_what_is_kept_is_read_through_once(tmp_path, monkeypatch):
    """A bank of millions of images is gigabytes: its checksums are compared once per extraction, not more."""
    extract(encoder(), "w", Drawn(), TRANSFORM, how=how(tmp_path))
    read, checksum = [], feature_store.zlib.crc32
    monkeypatch.setattr(feature_store.zlib, "crc32", lambda data, start: read.append(len(data)) or checksum(data, start))
    assert extract(encoder(), "w", Drawn(), TRANSFORM, how=how(tmp_path)).cached
    assert sum(read) == 40 * 32 * 4


def test_finished_features_open_as_an_ordinary_npy_file(tmp_path, whole):
    extract(encoder(), "w", Drawn(), TRANSFORM, how=how(tmp_path))
    (path,) = tmp_path.glob("*/features.npy")
    assert np.array_equal(np.load(path, mmap_mode="r"), whole)


def test_corrupt_images_stop_the_pass_unless_allowed_and_then_have_no_row(tmp_path, whole):
    images = Drawn(corrupt=(3, 17), fingerprint="corrupt")
    with pytest.raises(CorruptImage, match=r"/data/3\.png.*truncated.*--allow-corrupt"):
        extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path))
    with pytest.raises(CorruptImage, match=r"/data/17\.png"):
        extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path, allow_corrupt=1))
    found = extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path, allow_corrupt=2, workers=1))
    assert found.corrupt == ["3.png", "17.png"]
    assert list(found.kept) == [index for index in range(40) if index not in (3, 17)]
    assert np.array_equal(found.arrays["global"], whole[found.kept])
    with pytest.raises(CorruptImage, match=r"/data/3\.png"):  # also where the features are already there
        extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path))


def test_features_that_are_not_finite_are_refused_by_image_name(tmp_path):
    model = encoder()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match=r"global feature of 0\.png is not finite"):
        extract(model, "w", Drawn(), TRANSFORM, how=how(tmp_path))


def test_an_unknown_kind_is_refused_with_a_suggestion(tmp_path):
    with pytest.raises(UserError, match="did you mean 'global'"):
        extract(encoder(), "w", Drawn(), TRANSFORM, ["globl"], how(tmp_path))


# Whatever happens to the files ------------------------------------------------------------------------------------------


def half_done(cache, log, **options):
    """A pass that was stopped by the 24th image."""
    with pytest.raises(CorruptImage):
        extract(encoder(), "w", Drawn(corrupt=(24,)), TRANSFORM, how=how(cache, **options))
    return Drawn(log=log), next(cache.glob("*/features.npy")), next(cache.glob("*/features.json"))


def test_a_stopped_pass_goes_on_where_it_was(tmp_path, whole):
    images, data, _ = half_done(tmp_path, tmp_path / "log")
    data.write_bytes(data.read_bytes() + b"half a row that nobody vouches for")
    assert extracted(encoder(), "w", images, TRANSFORM, "global", how(tmp_path)) == 24
    found = extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path))
    assert np.array_equal(found.arrays["global"], whole) and decoded(tmp_path / "log") == list(range(24, 40))


def test_a_stopped_pass_of_another_batch_size_starts_afresh(tmp_path, whole):
    images, _, _ = half_done(tmp_path, tmp_path / "log", batch_size=4)
    found = extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path))
    assert np.array_equal(found.arrays["global"], whole) and decoded(tmp_path / "log") == list(range(40))


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "data cut short": lambda data, state: os.truncate(data, data.stat().st_size - 700),
    "data gone": lambda data, state: data.unlink(),
    "data empty": lambda data, state: os.truncate(data, 0),
    "a bit flipped": lambda data, state: flip(data, -2000),
    "state cut short": lambda data, state: os.truncate(state, state.stat().st_size // 2),
    "state gone": lambda data, state: state.unlink(),
    "state of something else": lambda data, state: state.write_text("[1, 2]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("finished", [True, False])
def test_damaged_files_are_noticed_and_mended(tmp_path, whole, damage, finished):
    images, data, state = half_done(tmp_path, None)
    if finished:
        extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path))
    DAMAGES[damage](data, state)
    assert np.array_equal(extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path)).arrays["global"], whole)
    assert extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path)).cached


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"features cannot be kept there \(.*\).*--cache"):
        extract(encoder(), "w", Drawn(), TRANSFORM, how=how(tmp_path / "file" / "cache"))


# Whatever happens to the process ----------------------------------------------------------------------------------------


def child(cache, delay, workers, limit, answer):
    """A pass in a process of its own; what it ended with goes into ``answer``."""
    torch.set_num_threads(1)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        images = Drawn(96, delay=delay, log=cache.parent / "log")
        found = extract(encoder(), "w", images, TRANSFORM, ["global", "patch-mean"], how(cache, workers=workers))
        answer.put({kind: np.array(rows) for kind, rows in found.arrays.items()})
    except UserError as error:
        answer.put(str(error))


@pytest.fixture(scope="module")
def start():
    """Starts ``child`` from a server that has imported everything and run nothing, and hands back process and queue."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["downstream.features"])

    def run(cache, delay=0.0, workers=0, limit=0):
        answer = context.Queue()
        process = context.Process(target=child, args=(cache, delay, workers, limit, answer))
        process.start()
        return process, answer

    return run


def done(start, *arguments, **options):
    process, answer = start(*arguments, **options)
    result = answer.get(timeout=60)
    process.join()
    return result


@pytest.mark.parametrize("workers", [0, 2])
def test_five_kills_at_random_moments_never_yield_a_wrong_feature(tmp_path, start, workers):
    undisturbed = done(start, tmp_path / "undisturbed" / "cache")
    cache, log, orphans = tmp_path / "killed" / "cache", tmp_path / "killed" / "log", []
    for number, images in enumerate(random.Random(workers).sample(range(1, 19), 5)):
        log.unlink(missing_ok=True)
        process, _ = start(cache, delay=0.002, workers=workers)
        while len(decoded(log)) < images:
            time.sleep(0.0005)
        os.kill(process.pid, signal.SIGSTOP)
        orphans += children(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        while alive(process.pid):  # its workers live on for some seconds; nothing waits for them
            time.sleep(0.001)
        if not workers:  # what every single kill left must lead to the same end
            copy = tmp_path / str(number) / "cache"
            shutil.copytree(cache, copy)
            for kind, rows in done(start, copy).items():
                assert np.array_equal(rows, undisturbed[kind])
    log.unlink()
    finished = done(start, cache)
    assert all(np.array_equal(finished[kind], undisturbed[kind]) for kind in undisturbed)
    assert workers or 0 < len(decoded(log)) < 96  # it went on, it did not start again
    deadline = time.monotonic() + 30
    while (left := [pid for pid in orphans if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left  # workers end, also those that had only just started


def test_a_worker_ends_if_its_parent_died_before_it_could_watch_it(monkeypatch):
    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    features._end_without(os.getppid(), 0)
    with pytest.raises(SystemExit):
        features._end_without(os.getppid() + 1, 0)


def children(pid):
    listing = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listing.read_text().split()] if listing.exists() else []


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_processes_with_the_same_key_do_the_work_once(tmp_path, start):
    running = [start(tmp_path / "cache", delay=0.002) for _ in range(2)]
    results = [answer.get(timeout=60) for _, answer in running]
    for process, _ in running:
        process.join()
    assert sorted(decoded(tmp_path / "log")) == list(range(96))
    assert all(np.array_equal(results[0][kind], results[1][kind]) for kind in results[0])


def test_a_full_disk_is_one_clear_line_and_loses_nothing_that_was_done(tmp_path, start):
    error = done(start, tmp_path / "cache", limit=8_000)
    assert "features cannot be kept there (File too large)" in error and "--cache" in error
    (tmp_path / "log").unlink()
    found = done(start, tmp_path / "cache")
    assert 0 < len(decoded(tmp_path / "log")) < 96
    expected = done(start, tmp_path / "other" / "cache")
    assert all(np.array_equal(found[kind], expected[kind]) for kind in expected)


PEAK = """
import sys
import numpy as np, torch
from pathlib import Path
from test_features import SPEC, Drawn, how
from downstream.features import extract
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.encoders.encoder import build_encoder

torch.manual_seed(0)
wide = SPEC.model_copy(update={"patch_size": 2, "options": {"embed_dim": 192, "depth": 1, "num_heads": 3}})
images, transform = Drawn(int(sys.argv[1])), EvaluationTransform.for_size(16, SPEC.mean, SPEC.std)
found = extract(build_encoder(wide).eval(), "w", images, transform, ["patches", "global"], how(Path(sys.argv[2])))
assert all(isinstance(rows, np.memmap) for rows in found.arrays.values())
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ten_times_the_images_take_the_same_memory(tmp_path):
    """Of features that would fill as much memory again, in a process of its own each: the most that it ever held, in KiB."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    peaks = []
    for count in (500, 5_000):
        command = [sys.executable, "-c", PEAK, str(count), str(tmp_path / str(count))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root, env=environment)
        peaks.append(int(done.stdout))
    written = sum(path.stat().st_size for path in (tmp_path / "5000").glob("*/features.npy")) / 1024
    print(f"peak memory in MiB: {peaks[0] / 1024:.0f}, {peaks[1] / 1024:.0f}; features in MiB: {written / 1024:.0f}")
    assert peaks[1] < 1.2 * peaks[0]
    assert written > 0.25 * peaks[0]  # more than the bound leaves room for
