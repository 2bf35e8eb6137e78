"""The catalog of soundness checks: all codes in order, for records, tables and `bench explain`. Torch-free."""

from __future__ import annotations

from bench.soundness.checks import Check
from bench.soundness.derived_checks import DERIVED
from bench.soundness.measured_checks import MEASURED

CHECKS: dict[str, Check] = {
    check.code: check for check in sorted((*MEASURED, *DERIVED), key=lambda check: int(check.code[1:]))
}
