"""Pictures of the report for docs/: `python docs/figures/report_shots.py`, from the records in results/ alone.

Needs Chromium and Pillow; writes docs/report-desktop.png (light) and docs/report-phone.png (dark).
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from records import DOCS, ROOT

from bench.records.store import Store
from bench.report import write_report

sys.path.insert(0, str(ROOT / "tests"))
from browser import Browser

MOST_BYTES = 300_000
TAB = "mnist-linf-eps-0-1"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        write_report(Store(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "results"), page)
        with Browser() as browser:
            browser.open(page, width=1280, height=900)
            browser.js(f"location.hash = '{TAB}'")
            browser.until(f"document.getElementById('{TAB}').checkVisibility()")
            browser.js("scrollTo(0, 0)")
            _keep(browser.shot(), DOCS / "report-desktop.png")
            browser.open(page, width=390, height=844, dark=True, phone=True)
            browser.js(f"location.hash = '{TAB}-cost'")
            browser.js(f"document.querySelectorAll('#{TAB}-cost .key button')[3].click()")
            _keep(browser.shot(), DOCS / "report-phone.png")


def _keep(png: bytes, path: Path) -> None:
    """With a palette: few colors are enough for text and tables."""
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128).save(file, "png", optimize=True)
    if len(file.getvalue()) >= MOST_BYTES:
        raise SystemExit(f"error: {path} would have {len(file.getvalue())} bytes; expected fewer than {MOST_BYTES}")
    path.write_bytes(file.getvalue())
    print(path, len(file.getvalue()))


if __name__ == "__main__":
    main()
