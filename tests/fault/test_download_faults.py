"""F23: downloads that are cut, altered, a page in place of a file, or offline; a server on this machine is the net."""

import gzip
import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bench.data import datasets, vision  # noqa: E402
from bench.data import images as data  # noqa: E402

TRIES = 3
PAGE = b"<!DOCTYPE html><html><title>Quota exceeded</title></html>"
NAMES = [Path(path).name for path in datasets.ARCHIVES["mnist"]]


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by name; notes when each try begins. `how`: what it does wrong with the file `bad`."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.how, self.bad = files, "", NAMES[1]
        self.asked = list[tuple[str, float]]()

    def times(self, name: str) -> list[float]:
        """When this file was tried."""
        return [at for asked, at in self.asked if asked == name]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        content, how = self.server.files[name], self.server.how if name == self.server.bad else ""
        if self.headers.get("Method") == "HEAD":  # so torchvision begins each try, to follow redirections
            self.server.asked.append((name, time.monotonic()))
        self.send_response(503 if how == "busy" else 200)
        body = {"html": PAGE, "hash": content[:-1] + bytes([content[-1] ^ 1]), "busy": PAGE}.get(how, content)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if how == "cut" else body)

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A small MNIST on a server of this machine, with MD5 sums of its own, and all that the code takes for true."""
    MNIST = vision.torchvision_datasets().MNIST

    draw = np.random.default_rng(0)
    files = {}
    for name, n in zip(NAMES, (30, 30, 10, 10), strict=True):
        shape = (n, 28, 28) if "images" in name else (n,)
        header = [2051, n, 28, 28] if "images" in name else [2049, n]
        content = draw.integers(0, 10, shape, dtype=np.uint8).tobytes()
        files[name] = gzip.compress(np.array(header, ">i4").tobytes() + content)
    server = Server(files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_address[1]}/"])
    monkeypatch.setattr(MNIST, "resources", [(name, hashlib.md5(files[name]).hexdigest()) for name in NAMES])
    facts = {**datasets.KNOWN, "mnist": replace(datasets.KNOWN["mnist"], train=30, test=10)}
    monkeypatch.setattr(datasets, "KNOWN", facts)
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("urllib.request._opener", None)
    yield server
    server.shutdown()
    server.server_close()


def load(root: Path) -> data.Data:
    return data.load("mnist", root=root, device=torch.device("cpu"))


@pytest.mark.parametrize("how", ["cut", "hash", "html", "busy"])
@pytest.mark.parametrize(
    "pauses", [(0.1, 0.4), pytest.param(vision._PAUSES, marks=pytest.mark.fault, id="true pauses")]
)
def test_f23_a_broken_download_is_tried_three_times_and_never_unpacked(
    net: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, pauses: tuple[float, ...]
) -> None:
    monkeypatch.setattr(vision, "_PAUSES", pauses)
    unpacked: list[str] = []
    opened = gzip.open
    monkeypatch.setattr(gzip, "open", lambda path, *rest: unpacked.append(Path(path).name) or opened(path, *rest))
    net.how = how
    why = "offline?" if how == "busy" else "the downloaded file is not the published one"
    with pytest.raises(ConnectionError) as error:
        load(tmp_path / "data")
    told = str(error.value)
    assert told.startswith(f"cannot download mnist ({why}, {TRIES} tries); put {', '.join(NAMES)} into ")
    assert told.endswith(f"{tmp_path / 'data' / 'MNIST' / 'raw'}, or pass --data-dir")
    assert "\n" not in told
    asked = net.times(NAMES[1])
    assert len(asked) == TRIES == len(pauses) + 1
    assert all(later - sooner >= pause for sooner, later, pause in zip(asked[:-1], asked[1:], pauses, strict=True))
    assert list((tmp_path / "data").iterdir()) == []  # nothing half done, nothing set down under its name
    assert NAMES[1] not in unpacked
    net.how = ""
    assert len(load(tmp_path / "data").train.x) == 30
    assert len(net.times(NAMES[0])) == 2  # what had come whole was not fetched again by the second and third try


def test_f23_what_is_absent_is_brought_before_a_run_or_named(
    net: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "_PAUSES", (0.01, 0.01))
    told: list[str] = []
    net.how = "busy"
    (problem,) = vision.bring(["mnist"], tmp_path / "data", told.append)
    assert problem.startswith(f"cannot download mnist (offline?, {TRIES} tries); put ")
    net.how = ""
    assert vision.bring(["mnist"], tmp_path / "data", told.append) == []
    assert not datasets.missing("mnist", tmp_path / "data")
    assert told == [f"downloading mnist to {tmp_path / 'data'}"] * 2


def test_f23_a_net_that_comes_back_is_enough(net: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "_PAUSES", (0.05, 0.1))
    net.how = "cut"

    def mend(seconds: float) -> None:
        net.how = ""

    monkeypatch.setattr(time, "sleep", mend)
    assert len(load(tmp_path).test.x) == 10
    assert len(net.times(NAMES[1])) == 2


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("mnist", ", ".join(NAMES)),
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("svhn", "train_32x32.mat, test_32x32.mat"),
    ],
)
def test_f23_offline_names_what_to_fetch_and_where_it_belongs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wanted: str
) -> None:
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("urllib.request._opener", None)
    monkeypatch.setattr(vision, "_PAUSES", (0.0, 0.0))
    root, notes = tmp_path / "new", list[str]()
    place = root / "MNIST" / "raw" if name == "mnist" else root
    with pytest.raises(ConnectionError) as error:
        data.load(name, root=root, device=torch.device("cpu"), report=notes.append)
    assert str(error.value) == (
        f"cannot download {name} (offline?, 3 tries); put {wanted} into {place}, or pass --data-dir"
    )
    assert list(root.iterdir()) == []  # no file of an unfinished download
    assert notes == [f"downloading {name} to {root}"]


def test_f23_what_is_named_and_brought_by_hand_is_enough(
    net: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "_PAUSES", ())
    net.how, net.bad = "html", NAMES[2]
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in NAMES[:2]:
        (raw / name).write_bytes(net.files[name])
    with pytest.raises(ConnectionError, match=rf"1 tries\); put {NAMES[2]}, {NAMES[3]} into {raw}, or"):
        load(tmp_path)
    for name in NAMES[2:]:
        (raw / name).write_bytes(net.files[name])
    assert len(load(tmp_path).train.x) == 30
    assert [len(net.times(name)) for name in NAMES] == [0, 0, 1, 0]
