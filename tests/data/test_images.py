"""Images: loaders, subsets, batches and augmentation, checked against slow and plain counterparts."""

import hashlib
import os
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest, chisquare

from bench.data import checksums, datasets, vision
from bench.data import images as data
from bench.jobs.worker import work
from bench.planning.plan import plan
from bench.planning.spec import build
from bench.records.store import Store

CPU = torch.device("cpu")
needs_mnist = pytest.mark.skipif(not os.environ.get("BENCH_DATA"), reason="BENCH_DATA names no folder with MNIST")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", root=Path("unused"), device=CPU)


@pytest.fixture
def pets(tmp_path):
    """A folder of 2 classes with 6 training and 4 test images each, 10 x 10 pixels, every image another one."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 6), ("test", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (10, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / part / name / f"{i}.png")
    return tmp_path


def load_pets(root, **options):
    return data.load("folder:pets", root=root, device=CPU, **options)


# --- batches


def crops(image, pad):
    """Every window of one zero-padded image (c h w), by (row, column, mirrored)."""
    c, h, w = image.shape
    padded = torch.zeros(c, h + 2 * pad, w + 2 * pad, dtype=image.dtype)
    padded[:, pad : pad + h, pad : pad + w] = image
    windows = {}
    for row in range(2 * pad + 1):
        for column in range(2 * pad + 1):
            window = padded[:, row : row + h, column : column + w]
            windows[row, column, False] = window
            windows[row, column, True] = window.flip(2)
    return windows


@pytest.mark.parametrize(("channels", "mirrored"), [(3, True), (1, False)])
def test_augmented_images_are_crops_with_uniform_offsets(channels, mirrored):
    """Also that color images are mirrored with probability 1/2, whatever the offset, and gray ones never."""
    image = images(n=1, c=channels, side=16).x[0]
    pad, n = 2, 5000
    windows = crops(image, pad)
    keys = {data.to_float(window).numpy().tobytes(): key for key, window in windows.items()}
    held = data.Images(image.expand(n, channels, 16, 16), torch.zeros(n, dtype=torch.int64))
    found = [keys[x.numpy().tobytes()] for part in run(held, batch_size=500, augment=True) for x in part[0]]
    possible = [key for key in windows if mirrored or not key[2]]
    assert chisquare([found.count(key) for key in possible]).pvalue > 0.001
    assert sum(found.count(key) for key in possible) == n
    assert not mirrored or binomtest(sum(key[2] for key in found), n).pvalue > 0.001


def test_to_float_is_exact_at_both_ends():
    x = data.to_float(torch.arange(256, dtype=torch.uint8))
    assert x.dtype == torch.float32
    assert x[0] == 0
    assert x[255] == 1
    assert torch.equal((x * 255).round().to(torch.uint8), torch.arange(256, dtype=torch.uint8))


def images(n=50, c=3, side=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, c, side, side), dtype=torch.uint8, generator=generator)
    return data.Images(x, torch.arange(n) % 7)


def run(held, batch_size=8, shuffle_seed=1, augment=False, drop_last=False):
    return list(data.batches(held, batch_size, shuffle_seed=shuffle_seed, augment=augment, drop_last=drop_last))


def test_a_pass_yields_every_image_once_with_its_label():
    held = images()
    parts = run(held)
    index = torch.cat([part[2] for part in parts])
    assert sorted(index.tolist()) == list(range(50))
    assert index.tolist() != list(range(50))
    for x, y, i in parts:
        assert torch.equal(x, data.to_float(held.x[i]))
        assert torch.equal(y, held.y[i])
    assert [len(part[1]) for part in parts] == [8] * 6 + [2]
    assert [len(part[1]) for part in run(held, drop_last=True)] == [8] * 6
    assert len(run(held, batch_size=50, drop_last=True)) == 1


@pytest.mark.parametrize("augment", [True, False])
def test_batches_depend_on_their_seed_alone(augment):
    held = images()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = torch.cat([part[0] for part in run(held, augment=augment)])
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    assert torch.equal(first, torch.cat([part[0] for part in run(held, augment=augment)]))
    assert torch.equal(first, torch.cat([part[0] for part in run(held, augment=augment, batch_size=13)]))
    assert not torch.equal(first, torch.cat([part[0] for part in run(held, augment=augment, shuffle_seed=2)]))


def test_order_does_not_depend_on_augmentation():
    order = [torch.cat([part[2] for part in run(images(), augment=augment)]) for augment in (True, False)]
    assert torch.equal(*order)


@pytest.mark.parametrize(("batch_size", "drop_last"), [(0, False), (51, True)])
def test_an_impossible_batch_size_is_rejected(batch_size, drop_last):
    with pytest.raises(ValueError, match=f"batch size is {batch_size} for 50 images; expected 1 to 50"):
        data.batches(images(), batch_size, shuffle_seed=0, augment=False, drop_last=drop_last)


def test_blocks_of_test_images(digits):
    x, y = data.test_block(digits, 100, 130)
    assert torch.equal(x, data.to_float(digits.test.x[100:130]))
    assert torch.equal(y, digits.test.y[100:130])
    for start, stop in ((350, 361), (5, 5), (-1, 4)):
        with pytest.raises(ValueError, match="is outside the 360 test images"):
            data.test_block(digits, start, stop)


# --- digits, subsets, hash


def test_digits_are_scikit_learns(digits):
    from sklearn.datasets import load_digits

    held = load_digits()
    pixels = torch.cat([digits.train.x, digits.test.x])
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels[:, 0], torch.from_numpy(np.round(held.images * 255 / 16)).to(torch.uint8))
    assert torch.equal(torch.cat([digits.train.y, digits.test.y]), torch.from_numpy(held.target).long())
    assert (len(digits.train.x), len(digits.validation.x), len(digits.test.x)) == (1437, 0, 360)
    assert digits.class_names == tuple("0123456789")
    assert digits.facts == datasets.KNOWN["digits"]


def rows(x):
    return [row.numpy().tobytes() for row in x]


def test_subsets_nest_and_ignore_the_seed():
    small = data.load("digits", root=Path("unused"), device=CPU, train=50, test=20, seed=1)
    large = data.load("digits", root=Path("unused"), device=CPU, train=200, test=60, seed=2)
    assert torch.equal(small.test.x, large.test.x[:20])
    assert torch.equal(small.train.x, large.train.x[:50])
    assert torch.equal(small.train.y, large.train.y[:50])
    assert len(set(large.train.y.tolist())) == 10
    assert small.test_hash != large.test_hash


def test_validation_is_taken_from_train(digits):
    first, again, other = (
        data.load("digits", root=Path("unused"), device=CPU, train=300, validation=100, seed=s) for s in (0, 0, 1)
    )
    whole = data.load("digits", root=Path("unused"), device=CPU, train=300)
    assert (len(first.train.x), len(first.validation.x)) == (200, 100)
    assert sorted(rows(first.train.x) + rows(first.validation.x)) == sorted(rows(whole.train.x))
    assert torch.equal(first.validation.x, again.validation.x)
    assert not torch.equal(first.validation.x, other.validation.x)
    assert first.test_hash == other.test_hash == digits.test_hash


def test_the_hash_covers_pixels_and_labels(digits):
    content = digits.test.x.numpy().tobytes() + digits.test.y.numpy().astype("<i8").tobytes()
    assert digits.test_hash == hashlib.sha256(content).hexdigest()[:16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": 361}, "test is 361, but the data set has 360 test images"),
        ({"train": 0}, "train is 0, but the data set has 1437 train images"),
        ({"train": 10, "validation": 10}, "validation is 10; expected 0 or more, and less than the 10"),
        ({"validation": -1}, "validation is -1"),
        ({"size": 16}, "size is 16, but digits has 8"),
    ],
)
def test_bad_counts(options, message):
    with pytest.raises(ValueError, match=message):
        data.load("digits", root=Path("unused"), device=CPU, **options)


# --- image folders


def pixels_of(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_folder_images_and_labels(pets):
    held = load_pets(pets)
    assert held.class_names == ("cat", "dog")
    assert held.train.x.shape == (12, 3, 10, 10)
    assert held.train.x.is_contiguous()
    paths = sorted((pets / "pets" / "train").glob("*/*.png"))
    assert torch.equal(held.train.x, torch.stack([pixels_of(path) for path in paths]))
    assert held.train.y.tolist() == [0] * 6 + [1] * 6
    by_pixels = {pixels_of(p).numpy().tobytes(): p.parent.name for p in (pets / "pets" / "test").glob("*/*.png")}
    assert [by_pixels[row] for row in rows(held.test.x)] == [held.class_names[y] for y in held.test.y]
    assert sorted(rows(held.test.x)) == sorted(by_pixels)


def test_folder_test_subset_nests_and_mixes_classes(pets):
    whole, part = load_pets(pets), load_pets(pets, test=4, seed=5)
    assert torch.equal(whole.test.x[:4], part.test.x)
    assert whole.test.y.tolist() != sorted(whole.test.y.tolist())


def test_the_first_validation_images_of_a_folder_are_of_all_classes(pets):
    held = load_pets(pets, validation=8).validation
    assert sorted(held.y.tolist()) != held.y.tolist()
    judged = data.with_validation_as_test(load_pets(pets, validation=8), 4).test
    assert set(judged.y.tolist()) == {0, 1}
    assert torch.equal(judged.x, held.x[:4])


def test_folder_cache_hit_and_invalidation(pets, own_cache):
    notes = []
    first = load_pets(pets, report=notes.append)
    assert len(notes) == 1
    assert "decoding 20 images" in notes[0]
    assert sorted(path.suffix for path in own_cache.iterdir()) == [".json", ".npz"]  # and no temporary file
    assert torch.equal(first.train.x, load_pets(pets, report=notes.append).train.x)
    assert len(notes) == 1
    path = pets / "pets" / "test" / "cat" / "0.png"
    changed = np.array(Image.open(path))
    changed[3, 4, 1] ^= 1
    Image.fromarray(changed).save(path)
    second = load_pets(pets, report=notes.append)
    assert len(notes) == 2
    assert second.test_hash != first.test_hash  # one bit of one pixel
    assert len(list(own_cache.glob("*.npz"))) == 1  # the outdated cache is gone
    load_pets(pets, size=8, report=notes.append)
    assert len(notes) == 3
    assert len(list(own_cache.glob("*.npz"))) == 2  # another size is not outdated


def test_images_are_read_from_the_cache(pets, own_cache):
    before = load_pets(pets)
    (path,) = own_cache.glob("*.npz")
    with np.load(path, allow_pickle=False) as held:
        x = held["x"]
    np.savez(path, x=255 - x)
    assert torch.equal(load_pets(pets).train.x, 255 - before.train.x)


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b[:800] + b"\0\1\2" + b[803:], lambda b: b""])
def test_a_damaged_cache_is_replaced(pets, own_cache, spoil):
    before = load_pets(pets)
    (path,) = own_cache.glob("*.npz")
    path.write_bytes(spoil(path.read_bytes()))
    assert torch.equal(load_pets(pets).train.x, before.train.x)


def test_folder_without_a_writable_cache(pets, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "file" / "below"))
    assert len(load_pets(pets).train.x) == 12


def planned_training(pets, tmp_path):
    """A results folder, and the key of the training in it."""
    asked = {"data": {"name": "folder:pets"}, "defenses": ["standard"], "train": {"epochs": 1, "batch_size": 4}}
    asked |= {"models": ["mlp"], "threat": {"norm": "Linf", "eps": "0.1"}, "attacks": ["clean"]}
    store, (job, *_) = Store(tmp_path / "results"), plan(build(asked), pets)
    store.prepare()
    store.add(job)
    return store, job.key


def test_a_job_fails_if_its_images_have_changed(pets, tmp_path):
    store, key = planned_training(pets, tmp_path)
    path = pets / "pets" / "train" / "cat" / "0.png"
    before = path.read_bytes()
    Image.new("RGB", (10, 10)).save(path)
    assert work(store.root, key, pets) == "error"
    said = store.record(key).error.message
    assert said.startswith("the images of folder:pets have content ")
    assert f"this job was planned for {store.job(key).data.content}" in said
    path.write_bytes(before)
    assert work(store.root, key, pets) == "done"


def test_the_error_of_an_image_whose_name_is_not_utf8_is_recorded(pets, tmp_path):
    (pets / "pets" / "train" / "cat" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"no image")
    store, key = planned_training(pets, tmp_path)
    assert work(store.root, key, pets) == "error"
    assert store.record(key).error.message.startswith("cannot read image .../caf\\udce9.png: ")


def test_a_gray_folder_has_one_channel(pets):
    for path in (pets / "pets").glob("*/*/*.png"):
        Image.open(path).convert("L").save(path)
    held = load_pets(pets, size=5)
    assert held.train.x.shape == (12, 1, 5, 5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("place", ["train/cat/0", "test/dog/3"])
def test_images_of_mixed_modes(pets, place, mode):
    """One colored image makes a data set colored, wherever it is."""
    kept = Image.new("RGB", (10, 10), (255, 255, 255)).convert(mode)
    for path in (pets / "pets").glob("*/*/*.png"):
        other = kept if str(path).endswith(f"{place}.png") else Image.open(path).convert("L")
        other.save(path, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    held = load_pets(pets)
    channels = 1 if mode in ("1", "L", "LA") else 3
    assert (held.facts.channels, held.train.x.shape[1]) == (channels, channels)
    assert ((held.train.x if "train" in place else held.test.x).flatten(1) == 255).all(1).sum() == 1


def test_a_gray_image_among_colored_ones_has_equal_channels(pets):
    Image.new("L", (10, 10), 77).save(pets / "pets" / "train" / "cat" / "0.png")
    assert (load_pets(pets).train.x[0] == 77).all()
    Image.new("I;16", (10, 10)).save(pets / "pets" / "train" / "dog" / "5.png")
    with pytest.raises(ValueError, match=r"dog/5\.png has mode I;16; expected 8-bit gray or color"):
        load_pets(pets)


def test_folder_of_unequal_sizes(pets):
    Image.new("RGB", (12, 9), (10, 20, 30)).save(pets / "pets" / "train" / "dog" / "5.png")
    with pytest.raises(ValueError, match=r"dog/5\.png has size \(12, 9\); expected 10 x 10, or give data\.size"):
        load_pets(pets)
    assert load_pets(pets, size=10).facts.size == 10
    with pytest.raises(ValueError, match="or give data"):  # though images of this size are in the cache
        load_pets(pets)
    held = load_pets(pets, size=7)
    assert held.facts.size == 7
    assert torch.equal(held.train.x[-1], torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 7, 7))


def test_unreadable_image_is_named(pets):
    path = pets / "pets" / "test" / "dog" / "2.png"
    path.write_bytes(path.read_bytes()[:120])
    with pytest.raises(ValueError, match=r"cannot read image .*test/dog/2\.png") as error:
        load_pets(pets)
    assert "\n" not in str(error.value)


# --- MNIST, CIFAR, downloads


@pytest.fixture(scope="module")
def true_idx(tmp_path_factory):
    """Files in MNIST's layout with true headers; image i is i % 251 all over."""
    raw = tmp_path_factory.mktemp("idx")
    for part, n in (("train", 60_000), ("t10k", 10_000)):
        x = np.repeat((np.arange(n) % 251).astype(np.uint8), 784)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, n, 28, 28) + x.tobytes())
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, n) + labels.tobytes())
    return raw


@pytest.fixture
def idx(true_idx, tmp_path):
    """A root of its own with those files; replace them, never write into them."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in true_idx.iterdir():
        (raw / path.name).symlink_to(path)
    return raw


def replaced(path, content):
    path.unlink()
    path.write_bytes(content)


def test_idx_files(idx, tmp_path):
    held = data.load("mnist", root=tmp_path, device=CPU, train=100, test=300)
    assert held.test.x.shape == (300, 1, 28, 28)
    assert torch.equal(held.test.x[:, 0, 27, 27], (torch.arange(300) % 251).to(torch.uint8))
    assert torch.equal(held.test.y, torch.arange(300) % 10)


def test_truncated_idx_file(idx, tmp_path):
    path = idx / "t10k-images-idx3-ubyte"
    replaced(path, path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte is not MNIST: 5000 bytes") as error:
        data.load("mnist", root=tmp_path, device=CPU)
    assert "\n" not in str(error.value)


def test_impossible_labels(idx, tmp_path):
    path = idx / "t10k-labels-idx1-ubyte"
    replaced(path, path.read_bytes()[:-1] + b"\x0b")
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte is damaged: it has the label 11"):
        data.load("mnist", root=tmp_path, device=CPU)


def write_cifar(root, monkeypatch):
    """A tiny CIFAR-10 in torchvision's layout, with its MD5 sums given to torchvision; returns its images."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng, sums, pixels = np.random.default_rng(0), {}, {}
    for path in datasets.FILES["cifar10"]:
        name = Path(path).name
        if name == "batches.meta":
            content = {"label_names": list("abcdefghij")}
        else:
            pixels[name] = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
            content = {"data": pixels[name], "labels": [1, 2, 3, 4]}
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    cifar = vision.torchvision_datasets().CIFAR10
    monkeypatch.setattr(cifar, "train_list", [[n, s] for n, s in sums.items() if n.startswith("data")])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": sums["batches.meta"]})
    hashes = {path: hashlib.sha256((root / path).read_bytes()).hexdigest() for path in datasets.FILES["cifar10"]}
    monkeypatch.setitem(checksums.FILES, "cifar10", hashes)
    return pixels


def test_cifar_through_torchvision(tmp_path, monkeypatch):
    pixels = write_cifar(tmp_path, monkeypatch)
    raw = vision.read("cifar10", tmp_path, print)
    assert raw.classes == tuple("abcdefghij")
    assert raw.train_x.shape == (20, 3, 32, 32)
    assert raw.test_x.flags.c_contiguous
    assert np.array_equal(raw.test_x.reshape(4, 3072), pixels["test_batch"])
    assert raw.test_y.tolist() == [1, 2, 3, 4]


def test_download_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="cannot be written"):
        data.load("mnist", root=tmp_path / "file" / "below", device=CPU)


@pytest.fixture
def other_torchvision(tmp_path, monkeypatch):
    """Puts a package of this source in torchvision's place."""
    loaded = {name: sys.modules[name] for name in list(sys.modules) if name.split(".")[0] == "torchvision"}

    def write(source):
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(source)
        (tmp_path / "torchvision" / "datasets.py").write_text("here = True")
        monkeypatch.syspath_prepend(tmp_path)
        for name in loaded:
            del sys.modules[name]

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules.update(loaded)


def test_no_operator_is_declared_where_torchvision_imports(other_torchvision):
    other_torchvision("import warnings; warnings.warn('chatty')")
    before = list(vision._libraries)
    assert vision.torchvision_datasets().here
    assert vision._libraries == before


def test_a_torchvision_of_another_build_is_an_error_of_one_line(other_torchvision):
    other_torchvision("raise RuntimeError('compiled with different CUDA major versions.\\nmore')")
    with pytest.raises(ImportError, match=r"torchvision does not fit torch .*CUDA major versions.*one build") as error:
        vision.torchvision_datasets()
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_torchvision_and_torchattacks_import_quietly():
    code = (
        "from bench.data import vision; vision.torchvision_datasets(); import torchvision;"
        "state = dict(vars(torchvision)); print(vision.torchvision_datasets().MNIST.__name__);"
        "assert state == vars(torchvision);"
        "import importlib.util as u; u.find_spec('torchattacks') and __import__('torchattacks')"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "MNIST", "")


@pytest.mark.data
@needs_mnist
def test_true_mnist():
    root = Path(os.environ["BENCH_DATA"])
    datasets.check("mnist", root, explicit=True)
    held = data.load("mnist", root=root, device=CPU, test=1000)
    assert held.train.y.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert held.test.y[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    reference = vision.torchvision_datasets().MNIST(str(root), train=False)
    assert torch.equal(held.test.x[:, 0], reference.data[:1000])
    assert held.train.x.float().mean() / 255 == pytest.approx(0.1307, abs=1e-4)


def test_validation_images_in_place_of_test_images() -> None:
    loaded = data.load("digits", root=Path("none"), device=torch.device("cpu"), validation=120, seed=3)
    judged = data.with_validation_as_test(loaded, 50)
    assert torch.equal(judged.test.x, loaded.validation.x[:50])
    assert torch.equal(judged.test.y, loaded.validation.y[:50])
    assert torch.equal(judged.train.x, loaded.train.x)
    assert judged.test_hash not in (loaded.test_hash, data.with_validation_as_test(loaded, 49).test_hash)
    seen = {image.numpy().tobytes() for image in loaded.train.x}
    assert sum(image.numpy().tobytes() in seen for image in judged.test.x) <= 2  # digits holds a few twins
