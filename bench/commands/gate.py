"""The gate of `bench run` and `bench eval` in continuous integration: what rows must reach, and its outcome as files.

A row fails if it is UNSOUND or INVALID (false robustness reaches no minimum), if a number that has a minimum is below
it, or if there is no such number. A row that is NOT CHECKED passes, as does the baseline `standard` beside other
defenses: it is there for comparison.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from xml.etree import ElementTree

import typer

from bench.atomic import write_text
from bench.commands.arguments import output_file
from bench.planning.spec import Spec
from bench.records.store import Store
from bench.terminal import counted

if TYPE_CHECKING:
    from bench.results.rows import Row
    from bench.results.seed_values import SeedValues

SARIF_LEVELS = {"F": "warning", "U": "error", "X": "error"}  # of a finding, by its severity
SARIF = "https://json.schemastore.org/sarif-2.1.0.json"


@dataclass(frozen=True)
class GateOptions:
    """What the rows of a run must reach, and the files that say so."""

    gate: Annotated[bool, typer.Option("--gate", help="Exit with 4 if a row of this run is UNSOUND or INVALID.")] = (
        False
    )
    min_robust: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="With --gate's rule: exit with 4 if a worst case is below, such as 0.6."),
    ] = None
    min_clean: Annotated[
        float | None, typer.Option(min=0, max=1, help="The same for the accuracy without an attack.")
    ] = None
    junit: Annotated[Path | None, typer.Option(help="Write the gate's outcome for each row as JUnit XML.")] = None
    sarif: Annotated[
        Path | None, typer.Option(help="Write failed limits and soundness findings for code scanning (SARIF).")
    ] = None

    @property
    def fails(self) -> bool:
        """True if a row that fails ends the command with code 4."""
        return self.gate or self.min_robust is not None or self.min_clean is not None

    def check(self, spec: Spec) -> None:
        """Raise ValueError or OSError for what can only fail after hours: a limit without its attack, a bad file."""
        attacks = {entry.name for entry in spec.attacks}
        if self.min_clean is not None and "clean" not in attacks:
            raise ValueError("--min-clean needs the attack clean, which this run does not have")
        if self.min_robust is not None and attacks <= {"clean"}:
            raise ValueError("--min-robust needs an attack, and this run has none")
        for path, option in ((self.junit, "--junit"), (self.sarif, "--sarif")):
            if path is not None and not output_file(path, option).parent.is_dir():
                raise FileNotFoundError(f"{option} {path}: no folder {path.parent}; create it first")

    @property
    def used(self) -> bool:
        """True if any of the options was given."""
        return self.fails or self.junit is not None or self.sarif is not None


@dataclass(frozen=True)
class Outcome:
    """One row and why it fails: a line for each rule, by the rule's name (`verdict`, `min-robust`, `min-clean`)."""

    row: Row
    failures: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The row as the last events of `--json` give it: shares in [0,1], null where there is no number."""
        row, worst = self.row, self.row.accuracy.worst
        low, high = worst.interval()
        codes = list(dict.fromkeys(finding.code for finding in row.findings if finding.level in SARIF_LEVELS))
        return {
            "event": "row", "dataset": row.dataset, "model": row.model, "method": row.method, "norm": row.norm,
            "eps": row.eps, "n": worst.n or None, "seeds": list(row.seeds), "clean": _number(row.accuracy.clean.mean),
            "robust": _number(worst.mean), "low": _number(low), "high": _number(high), "verdict": row.verdict,
            "codes": codes, "provisional": list(row.provisional), "train_key": row.provenance.train_key,
            "failures": list(self.failures.values()),
        }  # fmt: skip


def _place(row: Row) -> str:
    """The row in words: `pgd_at at Linf eps 8/255`."""
    return row.method + (f" at {row.norm} eps {row.eps}" if row.norm else "")


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def outcomes(store: Store, keys: list[str], options: GateOptions) -> list[Outcome]:
    """The rows of these jobs with the rules that each fails."""
    from bench.soundness.verdicts import judged_rows
    from bench.tables.ranking import reasons

    rows = judged_rows(store, keys, split=None)
    compared = {row.defense for row in rows} != {"standard"}
    found = []
    for row in rows:
        limits = [
            ("min-robust", "worst case", options.min_robust, row.accuracy.worst),
            ("min-clean", "clean accuracy", options.min_clean, row.accuracy.clean),
        ]
        failures = {"verdict": " ".join(reasons([row]))}
        for rule, name, least, values in [] if compared and row.defense == "standard" else limits:
            failures[rule] = _below(f"--{rule}", f"{name} of {_place(row)}", least, values)
        found.append(Outcome(row, {rule: why for rule, why in failures.items() if why}))
    return found


def _below(option: str, name: str, least: float | None, found: SeedValues) -> str:
    """Why these values fail the limit; empty if they pass."""
    if least is None or (found.values and found.mean >= least):
        return ""
    if not found.values:
        return f"{name}: no number ({found.state()}); {option} is {least:g}"
    low, high = found.interval()
    where = f"{counted(found.n, 'image')}, 95 % interval {low:.4f} to {high:.4f}"
    return f"{name}: {found.mean:.4f} ({where}); {option} is {least:g}"


def write(found: list[Outcome], options: GateOptions, source: str) -> None:
    """Write the files asked for. `source`: the spec or model file that findings are about, if there is one."""
    if options.junit is not None:
        write_text(output_file(options.junit, "--junit"), _junit(found))
    if options.sarif is not None:
        write_text(output_file(options.sarif, "--sarif"), _sarif(found, source))


def _junit(found: list[Outcome]) -> str:
    suite = ElementTree.Element("testsuite", name="bench", tests=str(len(found)))
    suite.set("failures", str(sum(bool(each.failures) for each in found)))
    for each in found:
        about = f"{each.row.dataset}.{each.row.model}"
        case = ElementTree.SubElement(suite, "testcase", classname=about, name=_place(each.row))
        for rule, line in each.failures.items():
            ElementTree.SubElement(case, "failure", type=rule, message=line)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _sarif(found: list[Outcome], source: str) -> str:
    from bench.soundness.catalog import CHECKS

    where = [{"physicalLocation": {"artifactLocation": {"uri": Path(source).as_posix()}}}] if source else []
    results, rules = [], dict[str, str]()
    for each in found:
        for finding in each.row.findings:
            if finding.level in SARIF_LEVELS and finding.code in CHECKS:
                rules[finding.code] = CHECKS[finding.code].title
                text = f"{_place(each.row)}: {CHECKS[finding.code].title}: {finding.note or 'no details'}"
                results.append((finding.code, SARIF_LEVELS[finding.level], text))
        for rule, line in each.failures.items():
            if rule != "verdict":  # its findings are listed
                rules[rule] = f"limit of --{rule}"
                results.append((rule, "error", line))
    listed = [{"id": rule, "shortDescription": {"text": text}} for rule, text in rules.items()]
    run = {
        "tool": {"driver": {"name": "bench", "rules": listed}},
        "results": [
            {"ruleId": rule, "level": level, "message": {"text": text}, "locations": where}
            for rule, level, text in results
        ],
    }
    return json.dumps({"$schema": SARIF, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"
