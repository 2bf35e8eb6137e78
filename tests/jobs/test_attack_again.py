"""`bench verify PACK --attack-again K`: an honest pack passes, a forged one is found; docs/submit.md."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from harness import Bench
from paths import ROOT
from safetensors.torch import load_file, save_file

from bench.atomic import write_hashed
from bench.planning.job import EvaluateJob, Job
from bench.records.pack import pack_records
from bench.records.store import SAMPLES, Store

pytest.importorskip("torch")
PACK = Path("results/mine.zip")
SPEC = """\
name: mine
data: {name: digits, test: 100}
models: [mlp]
threat: {norm: Linf, eps: 0.2}
train: {epochs: 3}
defenses: [standard, {name: smoothing, set: {sigma: 0.25}}]
attacks: [clean, fgsm, pgd]
"""
AGAIN = ("verify", PACK, "--attack-again", 20, "--weights", "results", "--draw", 1)


@pytest.fixture
def sent(bench: Bench) -> Store:
    """Two models with their evaluations in results/, and the honest pack of them."""
    Path("mine.yaml").write_text(SPEC)
    assert bench("run", "mine.yaml", "--executor", "debug", "--checks", "off", "--device", "cpu").code == 0
    assert bench("pack", "mine.yaml").code == 0
    return Store(Path("results"))


def evaluation(store: Store, attack: str, defense: str = "standard") -> EvaluateJob:
    found = [job for job in store.jobs().values() if isinstance(job, EvaluateJob) and job.attack.name == attack]
    return next(job for job in found if store.model_job(job.model_key).defense.name == defense)


def forge(store: Store, job: Job, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the samples of an evaluation as a cheater would: hashes and checksums are right, also in the pack."""
    columns = store.samples(job.key)
    change(columns)
    record, packed = store.record(job.key), io.BytesIO()
    assert record is not None
    np.savez_compressed(packed, **columns)
    sha256 = write_hashed(store.folder(job.key) / SAMPLES, packed.getvalue())
    store.put(job, replace(record, files={**record.files, SAMPLES: sha256}))
    pack_records(store, "mine", store.keys())


def all_correct(columns: dict[str, Any]) -> None:
    columns["correct"][:] = True


def test_an_honest_pack_passes_and_is_drawn_by_its_bytes_and_a_number(bench: Bench, sent: Store) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    outcome = bench(*AGAIN)
    assert outcome.code == 0, outcome.out
    assert "6 of 6 evaluations drawn; the same ones again: --attack-again 20 --images 200 --draw 1\n" in outcome.out
    for name in ("standard", "smoothing"):
        job = evaluation(sent, "pgd", name)
        stored = int(sent.samples(job.key)["correct"].sum())
        said = re.search(rf"{job.key} pgd Linf 0.2 on {name}.*: 100 images, correct (\d+), now (\d+)", outcome.out)
        assert said is not None
        assert int(said[1]) == stored
        # an image at the edge is broken from some starts only; the latter draws noise too
        assert abs(int(said[2]) - stored) <= (5 if name == "standard" else 30)
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    few = (*AGAIN[:3], 2, *AGAIN[4:6], "--images", 10, "--draw")
    drawn = {number: re.findall(r"^([0-9a-f]{12}) .*10 images", bench(*few, number).out, re.M) for number in range(5)}
    assert all(len(keys) == 2 for keys in drawn.values())
    assert len({tuple(keys) for keys in drawn.values()}) > 1
    assert re.findall(r"^([0-9a-f]{12}) .*10 images", bench(*few, 0).out, re.M) == drawn[0]
    assert len({re.findall(r"--draw (\d+)", bench(*few[:-1]).out)[0] for _ in range(2)}) == 2  # a new one each time


@pytest.mark.parametrize("attack", ["pgd", "clean"])
def test_a_forged_accuracy_is_found_though_every_checksum_is_right(bench: Bench, sent: Store, attack: str) -> None:
    job = evaluation(sent, attack)
    honest = sent.samples(job.key)["correct"]
    forge(sent, job, all_correct)
    unseen = bench("verify", PACK)
    assert (unseen.code, "WRONG" in unseen.out) == (0, False)
    outcome = bench(*AGAIN)
    assert outcome.code == 4
    (first, *_) = re.findall(rf"^WRONG  {job.key}: (.*)$", outcome.out, re.M)
    lost = re.search(r"(\d+) images? \((\d+)", first)
    assert lost is not None
    assert abs(int(lost[1]) - int((~honest).sum())) <= 5
    assert int(lost[2]) in np.flatnonzero(~honest)[:5]  # the first of those that are broken again
    assert first.startswith("clean predictions differ on " if attack == "clean" else "correct in the record alone: ")


def test_a_whole_forged_row_is_found_by_a_stronger_attack(bench: Bench, sent: Store) -> None:
    # every evaluation claims the clean accuracy, and the one that is drawn is of an attack that breaks nothing
    for name in ("fgsm", "pgd"):
        forge(sent, evaluation(sent, name), lambda columns: columns["correct"].__setitem__(..., columns["clean"]))
    outcome = bench(*AGAIN)
    assert outcome.code == 4
    assert re.search(r"strong PGD breaks \d\d images .* that all evaluations of this row have correct", outcome.out)


def test_an_evaluation_of_a_stochastic_model_may_differ_by_its_draws_but_not_by_a_forgery(
    bench: Bench, sent: Store
) -> None:
    job = evaluation(sent, "pgd", "smoothing")
    forge(sent, job, all_correct)
    outcome = bench(*AGAIN)
    assert outcome.code == 4
    assert f"WRONG  {job.key}: correct in the record alone: " in outcome.out


def test_other_weights_than_the_recorded_ones_are_refused(bench: Bench, sent: Store) -> None:
    key = evaluation(sent, "pgd").model_key
    kept = Path("kept")
    kept.mkdir()
    shutil.copy(sent.folder(key) / "weights-last.safetensors", kept / "any-name.safetensors")
    forged = {name: value + 1e-3 for name, value in load_file(kept / "any-name.safetensors").items()}
    save_file(forged, "forged.safetensors")
    torch.save({"run": print}, "pickle.pt")  # refused by its hash: it is never opened
    outcome = bench("verify", PACK, "--attack-again", 20, "--weights", "forged.safetensors", "--weights", "pickle.pt")
    assert outcome.code == 4
    for name in ("forged.safetensors", "pickle.pt"):
        assert f"WRONG  weights {name} refused: no training in the pack records their SHA-256, " in outcome.out
    assert len(re.findall("not attacked again: its weights, SHA-256 .* are not among --weights", outcome.out)) == 6
    half = bench("verify", PACK, "--attack-again", 20, "--images", 10, "--weights", kept)
    assert half.code == 4  # a forger would withhold the others
    assert len(re.findall("not attacked again", half.out)) == 3
    record = sent.record(key)
    assert record is not None
    shutil.copy("forged.safetensors", sent.folder(key) / "weights-last.safetensors")
    sha256 = write_hashed(sent.folder(key) / "weights-last.safetensors", Path("forged.safetensors").read_bytes())
    sent.put(sent.job(key), replace(record, files={"weights-last.safetensors": sha256}))
    pack_records(sent, "mine", sent.keys())
    assert "it used other weights than its training has now" in bench(*AGAIN).out


def test_what_cannot_be_repeated_is_named_and_not_passed(bench: Bench, sent: Store) -> None:
    job, other = evaluation(sent, "pgd"), evaluation(sent, "fgsm")
    record, metrics = sent.record(job.key), sent.record(other.key)
    assert record is not None
    assert metrics is not None
    training = sent.record(job.model_key)
    assert training is not None
    sent.put(other, replace(metrics, metrics=replace(metrics.metrics, test_hash="0" * 16)))
    pack_records(sent, "mine", sent.keys())
    outcome = bench(*AGAIN)
    assert outcome.code == 4
    assert f"WRONG  {other.key}: not attacked again: its test images are not those of the data set here" in outcome.out
    sent.put(sent.job(job.model_key), replace(training, files={}))
    pack_records(sent, "mine", sent.keys())
    outcome = bench(*AGAIN)
    assert outcome.code == 4
    assert f"WRONG  {job.key}: not attacked again: the record of its training names no weights" in outcome.out


MISTAKES = {
    "no pack": (("verify", "other.zip"), "no pack other.zip; expected a file that `bench pack` wrote"),
    "damaged": (("verify", "cut.zip"), "cut.zip is not a usable pack of records: "),
    "folder": (("verify", "--attack-again", 5), "--attack-again and --weights are for a pack; name it"),
    "full": (("verify", PACK, "--full"), "--full looks at stored images, which a pack has none of"),
    "none": (("verify", PACK, "--attack-again", 0, "--weights", "."), "--attack-again is 0; expected 1 or more"),
    "images": (
        ("verify", PACK, "--attack-again", 1, "--images", 0, "--weights", "."),
        "--images is 0; expected 1 or more",
    ),
    "weights alone": (("verify", PACK, "--weights", "."), "--weights is for --attack-again K, which is not given"),
    "draw alone": (("verify", PACK, "--draw", 1), "--draw is for --attack-again K, which is not given"),
    "no weights": (
        ("verify", PACK, "--attack-again", 5),
        "no weights named: add --weights FOLDER, or results/mine.yaml",
    ),
    "absent": (("verify", PACK, "--attack-again", 5, "--weights", "gone.pt"), "no checkpoint gone.pt"),
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(bench: Bench, tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    PACK.parent.mkdir()
    shutil.copy(ROOT / "results" / "mnist_certified.zip", PACK)
    Path("cut.zip").write_bytes(PACK.read_bytes()[:3000])
    outcome = bench(*words)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome
    assert outcome.err.startswith(f"error: {message}" if message.startswith("cut.zip") else "error: ")
    assert message in outcome.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights: [../../etc]", "names ../../etc, which is outside its folder"),
        ("weights: [/dev/null]", "names /dev/null, which is outside its folder"),
        ("weights: mine.pt", "expected one list `weights:` of names"),
        ("weights: []\nrun: x", "holds weights, run; expected one list `weights:` of names"),
        ("weights: !!python/name:os.system []", "tag"),
    ],
)
def test_the_file_beside_a_pack_is_not_obeyed(bench: Bench, text: str, message: str) -> None:
    PACK.parent.mkdir()
    shutil.copy(ROOT / "results" / "mnist_certified.zip", PACK)
    PACK.with_suffix(".yaml").write_text(text)
    outcome = bench("verify", PACK, "--attack-again", 1)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome
    assert message in outcome.err


def test_the_steps_of_the_page_and_the_workflow_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    page = (ROOT / "docs" / "submit.md").read_text()
    (spec,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    steps, published = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    place, binary, hub = tmp_path / "empty", tmp_path / "bin", tmp_path / "hub"
    for folder in (place, binary):
        folder.mkdir()
    (binary / "bench").write_text(
        f"#!{sys.executable}\nfrom bench.cli import main\nif __name__ == '__main__':\n    main()\n"
    )
    (binary / "bench").chmod(0o755)
    environment = {
        "PATH": f"{binary}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "BENCH_CACHE": str(tmp_path / "c"),
    }
    environment |= {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "GIT_CONFIG_GLOBAL": os.devnull}

    def typed(script: str, **more: str) -> subprocess.CompletedProcess[str]:
        values = {**os.environ, **environment, **more}
        return subprocess.run(
            ["bash", "-e", "-c", script], cwd=place, env=values, capture_output=True, text=True, timeout=500
        )

    git = "git -c user.name=x -c user.email=x@y"
    (place / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    assert typed(f"git init -q && git add . && {git} commit -qm base").returncode == 0
    base = typed("git rev-parse HEAD").stdout.strip()
    (place / "mine.yaml").write_text(spec)
    done = typed(steps)
    assert done.returncode == 0, done.stdout + done.stderr
    repo = hub / "models--OWNER--REPO"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for weights in place.glob("results/*/weights-*.safetensors"):  # what the page uploads
        copy = repo / "snapshots" / ("0" * 40) / weights.relative_to(place / "results")
        copy.parent.mkdir(parents=True)
        shutil.move(weights, copy)
    (place / "results" / "mine.yaml").unlink(missing_ok=True)
    names = "\n".join(f"results/{path.parent.name}/{path.name}" for path in repo.rglob("weights-*"))
    done = typed(published.replace("ls results/*/weights-*.safetensors", f"echo '{names}'"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 of 6 evaluations drawn" in done.stdout
    # the workflow, on a checkout with the submission as a commit
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "submission.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow[True]["pull_request"]["paths"] == ["results/*.zip", "results/*.yaml"]  # YAML 1.1 reads `on` as true
    assert typed(f"git add . && {git} commit -qm results").returncode == 0
    assert typed("git ls-files results").stdout.split() == ["results/mine.yaml", "results/mine.zip"]
    step = job["steps"][-1]
    done = typed(step["run"], BASE=base)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("mine.zip: 12 records") == 1
    (place / "results" / "mine.yaml").write_text("weights: []\n")
    done = typed(step["run"], BASE=base)
    assert done.returncode == 123  # of xargs
    assert "are not among --weights" in done.stdout


def test_the_forms_are_what_github_reads() -> None:
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    names = set()
    for path in folder.glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.name == "config.yml":
            assert set(form) == {"blank_issues_enabled"}  # SECURITY.md has a line of its own in GitHub's list
            continue
        assert {"name", "description", "body"} <= set(form) <= {"name", "description", "body", "title", "labels"}
        names.add(form["name"])
        ids = [item["id"] for item in form["body"]]
        assert len(ids) == len(set(ids)) > 0
        for item in form["body"]:
            assert item["type"] in ("input", "textarea", "dropdown", "checkboxes")
            assert item["attributes"]["label"]
    assert len(names) == 3
    assert "Submit the results of a defense" in names  # as docs/submit.md names it
