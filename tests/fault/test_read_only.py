"""F12 of the reliability list: a results folder that turns read-only in mid-run ends the run in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]
RUN = (
    *("run", "--defense", "standard", "--attack", "clean,fgsm", "--n", "20", "--checks", "off"),
    *("--device", "cpu", "--no-check"),
)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_folder_that_turns_read_only_ends_the_run_in_one_line(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen([sys.executable, "-m", "bench", *RUN], cwd=tmp_path, stdout=out, stderr=err)
    mounted = False
    try:
        while not list(results.glob("*/train.jsonl")):
            assert process.poll() is None
            time.sleep(0.1)
        # a second mount of the folder on itself: files that are open stay writable, as on a server that turns read-only
        mounted = subprocess.run(["mount", "--bind", results, results], capture_output=True).returncode == 0
        if not mounted:
            pytest.skip("this container may not mount")
        subprocess.run(["mount", "-o", "remount,ro,bind", results], check=True)
        code = process.wait(timeout=600)
    finally:
        process.kill()
        process.wait()
        if mounted:
            subprocess.run(["umount", results], check=True)
    told = (tmp_path / "err").read_text()
    assert code == 2
    (line,) = told.splitlines()
    assert "Read-only file system" in line
    assert "Traceback" not in (tmp_path / "out").read_text()
    assert not list(results.glob("*/record.json"))  # and what was stored before stays
    again = subprocess.run([sys.executable, "-m", "bench", *RUN], cwd=tmp_path, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, "")
