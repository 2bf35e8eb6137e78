"""What the planner refuses about data sets, and that it does so without torch or the images."""

import gzip
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.data import datasets, folders, images, vision
from bench.planning.options import place


def idx_files(root, folder="MNIST"):
    """MNIST's four files with true headers and lengths; the zeros are holes, so this is quick."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 60_000), ("t10k", 10_000)):
        for kind, header in (("images-idx3", (0x803, n, 28, 28)), ("labels-idx1", (0x801, n))):
            path = raw / f"{part}-{kind}-ubyte"
            path.write_bytes(struct.pack(f">{len(header)}I", *header))
            os.truncate(path, 4 * len(header) + n * (784 if len(header) == 4 else 1))
    return raw


def image_folder(root, parts=("train", "test"), classes=("cat", "dog")):
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            (root / part / name / "1.png").write_bytes(b"not looked at by check")
    return root


def one_line(error):
    return "\n" not in str(error.value)


def test_import_is_free_of_heavy_packages():
    heavy = ("torch", "numpy", "pandas", "scipy", "sklearn", "PIL", "platformdirs")
    code = f"import sys, bench.data.datasets; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_facts_are_consistent(tmp_path):
    for name, known in datasets.KNOWN.items():
        assert datasets.facts(name, tmp_path) is known
        assert len(known.mean) == len(known.std) == known.channels
        assert known.title
        assert "\n" not in known.title
        assert datasets.facts(name, tmp_path, known.size) is known
    with pytest.raises(ValueError, match="size is 16, but digits has 8 pixels"):
        datasets.facts("digits", tmp_path, 16)


@pytest.mark.parametrize(("wrong", "meant"), [("cifar", "cifar10"), ("CIFAR-10", "cifar10"), ("mnits", "mnist")])
def test_unknown_name_suggests(tmp_path, wrong, meant):
    for call in (lambda: datasets.facts(wrong, tmp_path), lambda: datasets.check(wrong, tmp_path, explicit=False)):
        with pytest.raises(LookupError, match=f"no data set '{wrong}'. Did you mean '{meant}'.*folder:PATH") as error:
            call()
        assert one_line(error)


def test_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("BENCH_DATA", str(tmp_path / "env"))
    assert datasets.data_root(tmp_path / "option") == tmp_path / "option"
    assert datasets.data_root("~/images") == Path.home() / "images"
    assert datasets.data_root(None) == tmp_path / "env"
    monkeypatch.setenv("BENCH_DATA", "")
    assert datasets.data_root(None).parts[-2:] == ("defense-bench", "data")


def test_absent_data(tmp_path):
    gone = tmp_path / "gone"
    for name in datasets.KNOWN:
        datasets.check(name, gone, explicit=False)  # to be downloaded
        with pytest.raises(FileNotFoundError, match=f"no data folder {gone}"):
            datasets.check(name, gone, explicit=True)
    datasets.check("digits", tmp_path, explicit=True, download=False)
    with pytest.raises(FileNotFoundError, match=r"no MNIST/raw/train-images-idx3-ubyte in .*layout") as error:
        datasets.check("mnist", tmp_path, explicit=True)
    assert one_line(error)
    with pytest.raises(FileNotFoundError, match="no cifar-10-batches-py/data_batch_1 in"):
        datasets.check("cifar10", tmp_path, explicit=False, download=False)
    (tmp_path / "MNIST").mkdir()
    with pytest.raises(FileNotFoundError, match=f"did you mean {tmp_path}"):
        datasets.check("mnist", tmp_path / "MNIST", explicit=True)


def test_archives_make_the_download_unnecessary(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"x")
    datasets.check("cifar10", tmp_path, explicit=True)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in datasets.ARCHIVES["mnist"][:3]:
        (tmp_path / path).write_bytes(gzip.compress(b""))
    with pytest.raises(FileNotFoundError, match="no MNIST/raw"):  # one of four is absent
        datasets.check("mnist", tmp_path, explicit=True)
    (tmp_path / datasets.ARCHIVES["mnist"][3]).write_bytes(gzip.compress(b""))
    datasets.check("mnist", tmp_path, explicit=True)


def test_true_headers_pass(tmp_path):
    idx_files(tmp_path)
    idx_files(tmp_path, "FashionMNIST")
    datasets.check("mnist", tmp_path, explicit=True)
    datasets.check("fashion_mnist", tmp_path, explicit=True)


def cut(path):
    os.truncate(path, 1_000_000)


def as_page(path):
    path.write_bytes(b"<!DOCTYPE html> not found")


def as_labels(path):
    path.write_bytes(path.with_name("train-labels-idx1-ubyte").read_bytes())


def as_test(path):
    path.write_bytes(path.with_name("t10k-images-idx3-ubyte").read_bytes())


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "1000000 bytes, expected 60000 images in 47040016 bytes"),
        (as_page, "magic number 3c21444f, not 00000803"),
        (as_labels, "magic number 00000801"),
        (as_test, "7840016 bytes, expected 60000"),
        (lambda path: os.truncate(path, 0), "is empty"),
    ],
)
def test_files_that_are_not_mnist(tmp_path, spoil, message, explicit):
    spoil(idx_files(tmp_path) / "train-images-idx3-ubyte")
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte.*{message}") as error:
        datasets.check("mnist", tmp_path, explicit=explicit)
    assert one_line(error)


def test_folder_listing(tmp_path):
    path = image_folder(tmp_path / "pets")
    (path / "train" / ".hidden").mkdir()
    (path / "train" / "cat" / "notes.txt").write_text("")
    (path / "train" / "cat" / "0.JPG").write_bytes(b"")
    listed = folders.find("folder:pets", tmp_path)
    assert listed.classes == ("cat", "dog")
    assert listed.train == (("train/cat/0.JPG", 0), ("train/cat/1.png", 0), ("train/dog/1.png", 1))
    assert listed.test == (("test/cat/1.png", 0), ("test/dog/1.png", 1))
    assert listed.passed_over == 1  # not the hidden folder
    assert folders.find(f"folder:{path}", tmp_path / "elsewhere") == listed
    datasets.check("folder:pets", tmp_path, explicit=True)
    (path / "test" / "1.png").write_bytes(b"in no class folder")
    (path / "test" / "cat" / "2.png").symlink_to("absent")
    assert folders.find("folder:pets", tmp_path).passed_over == 3


def test_nested_folders_are_listed_as_torchvision_does(tmp_path):
    path = image_folder(tmp_path / "pets", classes=("cat", "cat-2", "dog"))
    for part in ("train", "test"):
        for name in ("b.png", "a/z.png", "a/b/c.png", "a-b/y.png", "B/x.png"):
            (path / part / "cat" / name).parent.mkdir(parents=True, exist_ok=True)
            (path / part / "cat" / name).write_bytes(b"")
    listed = folders.find("folder:pets", tmp_path)
    for part, found in (("train", listed.train), ("test", listed.test)):
        reference = vision.torchvision_datasets().ImageFolder(path / part)
        assert listed.classes == tuple(reference.classes)
        assert [(str(path / file), label) for file, label in found] == reference.samples


def test_names_that_are_not_utf8(tmp_path, monkeypatch):
    """Of the folder's parent, of a class, and of a file."""
    from PIL import Image

    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    latin = os.fsdecode("caf\xe9".encode("latin-1"))
    path = tmp_path / latin / "pets"
    for part in ("train", "test"):
        for name in (latin, "dog"):
            (path / part / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(path / part / name / f"{latin}.png")
    name, root = place(f"folder:{path}", tmp_path)
    for _ in range(2):  # decoded, then from the cache
        loaded = images.load(name, root=root, device=torch.device("cpu"))
        assert (len(loaded.train.x), loaded.class_names) == (2, ("caf\\udce9", "dog"))
    path.rename(path.with_name(latin))
    with pytest.raises(ValueError, match=r"the name of the image folder .*udce9' is not UTF-8; rename it"):
        place(f"folder:{path.with_name(latin)}", tmp_path)


def test_relative_folder_from_the_current_one(tmp_path, monkeypatch):
    image_folder(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    assert folders.find("folder:pets", tmp_path / "data").path == Path("pets")


def test_the_content_of_a_folder_depends_on_its_images_only(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    path = image_folder(tmp_path / "pets")
    for number, file in enumerate(sorted(path.glob("*/*/*.png"))):
        file.write_bytes(bytes([number, 7]))

    def content(name="pets"):
        return folders.scan(folders.find(f"folder:{name}", tmp_path))

    first = content()
    assert len(first.content) == 16
    shutil.copytree(path, tmp_path / "copy", copy_function=shutil.copyfile)  # elsewhere, and of another time
    assert content("copy") == first
    (path / "train" / "cat" / "1.png").rename(path / "train" / "cat" / "2.png")
    (path / "notes.txt").write_text("no image")
    assert content() == first
    cat, dog = (path / "train" / name / file for name, file in (("cat", "2.png"), ("dog", "1.png")))
    found = {first}
    for change in (
        lambda: cat.write_bytes(bytes([9, 7])),  # one image, of the same length
        lambda: (
            cat.rename(path / "aside"),
            dog.rename(cat),
            (path / "aside").rename(dog),
        ),  # the same images, labels swapped
        lambda: dog.rename(path / "test" / "dog" / "0.png"),  # from training to test
    ):
        change()
        if not list(dog.parent.iterdir()):
            dog.write_bytes(b"7")
        found.add(content())
    assert len(found) == 4


def test_the_content_is_read_again_only_after_a_change(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    listed = folders.find("folder:pets", image_folder(tmp_path / "pets").parent)
    first = folders.scan(listed)
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_text(cached.read_text().replace(first.content, "0" * 16))
    assert folders.scan(listed).content == "0" * 16
    for damaged in ("", "[]", "{}", '{"stamp": 3}', cached.read_text()[:20]):
        cached.write_text(damaged)
        assert folders.scan(listed) == first
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "file" / "below"))
    assert folders.scan(listed) == first


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda p: None, FileNotFoundError, "no image folder"),
        (lambda p: image_folder(p, parts=("train",)), FileNotFoundError, "no folder .*test; expected"),
        (lambda p: image_folder(p, parts=("test",)), FileNotFoundError, "no folder .*train; expected"),
        (lambda p: image_folder(p, classes=("cat",)), ValueError, "1 class folder; expected at least 2"),
        (lambda p: (image_folder(p) / "test" / "owl").mkdir(), ValueError, r"differ in classes \(owl\)"),
        (lambda p: (image_folder(p) / "test" / "dog" / "1.png").unlink(), ValueError, "no images in .*dog"),
    ],
)
def test_bad_folders(tmp_path, make, kind, message):
    make(tmp_path / "pets")
    for call in (datasets.facts, lambda name, root: datasets.check(name, root, explicit=True)):
        with pytest.raises(kind, match=message) as error:
            call("folder:pets", tmp_path)
        assert one_line(error)


def test_folder_without_path(tmp_path):
    with pytest.raises(ValueError, match="expected folder:PATH"):
        datasets.facts("folder:", tmp_path)


@pytest.mark.parametrize(
    ("mode", "size", "channels", "model", "augment"),
    [("RGB", 32, 3, "preact_resnet18", True), ("L", 28, 1, "lenet5", False), ("L", 9, 1, "mlp", False)],
)
def test_folder_facts_from_one_header(tmp_path, mode, size, channels, model, augment):
    from PIL import Image

    path = image_folder(tmp_path / "pets")
    Image.new(mode, (size, size)).save(path / "train" / "cat" / "1.png")
    found = datasets.facts("folder:pets", tmp_path)
    assert (found.name, found.channels, found.size, found.classes) == ("folder:pets", channels, size, 2)
    assert (found.train, found.test, found.default_model, found.augment) == (2, 2, model, augment)
    assert len(found.mean) == len(found.std) == channels
    assert datasets.facts("folder:pets", tmp_path, 64).size == 64


def test_the_first_image_of_a_folder_is_checked(tmp_path):
    from PIL import Image

    first = image_folder(tmp_path / "pets") / "train" / "cat" / "1.png"
    with pytest.raises(ValueError, match=r"cannot read image .*1\.png"):
        datasets.facts("folder:pets", tmp_path)
    Image.new("L", (30, 20)).save(first)
    with pytest.raises(ValueError, match=r"is 30 x 20; expected a square, or give data\.size"):
        datasets.facts("folder:pets", tmp_path)
    assert datasets.facts("folder:pets", tmp_path, 16).size == 16
    Image.new("I;16", (30, 30)).save(first)
    with pytest.raises(ValueError, match="has mode I;16; expected 8-bit"):
        datasets.facts("folder:pets", tmp_path)
