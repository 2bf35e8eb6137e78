"""S7, S8: what is installed is what somebody looked at, and `bench doctor` sees what torchattacks does to others."""

from __future__ import annotations

import ast
import base64
import hashlib
import re
import sys
import tomllib
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest

from bench.doctor import installed

TREE = Path(__file__).parents[2]
PROJECT = tomllib.loads((TREE / "pyproject.toml").read_text(encoding="utf-8"))
# Somebody looked at each of these: who makes it, what it pulls in, what it is used for. A new one needs a line here.
REVIEWED = {
    "torch": "training and attacks",
    "torchvision": "data sets and their downloads",
    "pyautoattack": "AutoAttack",
    "numpy": "arrays of per-image results",
    "pandas": "tables",
    "typer": "command line",
    "rich": "tables on a terminal",
    "pydantic": "schema of specs and settings",
    "pydantic-core": "the schema type of an exact eps; pinned by pydantic",
    "annotated-types": "ranges of settings; used by pydantic",
    "PyYAML": "specs",
    "scipy": "tests and intervals",
    "tqdm": "imported by torchattacks, which is installed without its dependencies",
    "scikit-learn": "the embedded digits",
    "safetensors": "weights and images on disk",
    "platformdirs": "cache folder",
    "matplotlib": "figures of the report",
    "jinja2": "the report",
    "markupsafe": "escaped text of the report; used by jinja2",
    "Pillow": "decoding of image folders; used by torchvision",
    "psutil": "processes that a job leaves behind",
}
EXTRAS = {
    "attacks": {"torchattacks", "adv-lib"},
    "ray": {"ray"},
    "gpu": {"nvidia-ml-py"},
    "tensorboard": {"tensorboard"},
    "wandb": {"wandb"},
    "mlflow": {"mlflow-skinny", "SQLAlchemy", "alembic"},
    "sweep": {"optuna"},
    "zoo": {"huggingface-hub", "timm"},
    "docs": {
        *("mkdocs", "mkdocs-material", "mkdocstrings-python"),
        *("nbformat", "nbclient", "nbconvert", "traitlets", "ipykernel"),  # notebooks are run for the site
    },
    "dev": {
        *("pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "ruff", "mypy", "import-linter"),
        *("types-PyYAML", "types-psutil", "pandas-stubs"),
        *("hatchling", "huggingface-hub"),  # for the tests of the wheel and of checkpoints from a hub
        "nvidia-ml-py",
    },
}


def name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0]


def locked() -> dict[str, list[tuple[str, list[str]]]]:
    """Versions and sums of every package in the lock file."""
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for line in (TREE / "requirements" / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"([a-z0-9._-]+)==(\S+)", line):
            found.setdefault(match[1], []).append((match[2], []))
        elif match := re.fullmatch(r"    --hash=sha256:([0-9a-f]{64})( \\)?", line):
            found[list(found)[-1]][-1][1].append(match[1])
        else:
            assert line.startswith("#"), line
    return found


def test_every_direct_dependency_was_reviewed() -> None:
    assert {name(line) for line in PROJECT["project"]["dependencies"]} == set(REVIEWED)
    assert {
        extra: {name(line) for line in lines} for extra, lines in PROJECT["project"]["optional-dependencies"].items()
    } == EXTRAS
    assert PROJECT["build-system"]["requires"] == ["hatchling>=1.26"]


def imported_modules(folder: Path) -> set[str]:
    """Top-level names that the Python files below a folder import, without relative imports."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found


def test_every_imported_package_is_declared() -> None:
    """A package that only comes along with another one can leave with its next version."""
    own = {"bench", "attacks", "defenses"}
    modules = set().union(*(imported_modules(TREE / folder) for folder in own)) - own - sys.stdlib_module_names
    # of an extra that is not installed the module has the package's name, but for one
    of_module = {"mlflow": ["mlflow-skinny"], **packages_distributions()}
    packages = {of_module.get(module, [module])[0].lower().replace("_", "-") for module in modules}
    declared = {line.lower() for line in REVIEWED}.union(*EXTRAS.values())
    assert packages - declared == set()
    assert {"numpy", "torch", "pillow"} <= packages


def test_the_wheel_tells_type_checkers_that_bench_is_typed() -> None:
    assert (TREE / "bench" / "py.typed").read_bytes() == b""
    assert "bench" in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def test_every_dependency_has_a_floor_and_none_comes_from_an_address() -> None:
    lines = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["attacks"]]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9-]+>=[\d.]+", line)] == []


def test_the_lock_holds_every_dependency_with_sums() -> None:
    found = locked()
    assert {line.lower() for line in REVIEWED} <= set(found)
    assert [package for package, versions in found.items() for _, sums in versions if not sums] == []
    floors = {name(line).lower(): line.partition(">=")[2] for line in PROJECT["project"]["dependencies"]}
    for package, floor in floors.items():
        for version, _ in found[package]:
            assert numbers(version) >= numbers(floor), package
    assert "://" not in (TREE / "requirements" / "requirements.lock").read_text(encoding="utf-8")


def test_the_lock_holds_neither_torchattacks_nor_what_it_pins() -> None:
    """requests 2.25.1, urllib3 1.26.20, idna 2.10 and chardet 4.0.0 come with its metadata alone."""
    assert not {"torchattacks", "chardet", "robustbench"} & set(locked())
    for version, _ in locked().get("requests", []):
        assert numbers(version) >= installed.OLD_REQUESTS
    assert 'pip install --quiet --disable-pip-version-check --no-deps "torchattacks' in (TREE / "Makefile").read_text()


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def test_the_build_runs_no_code_of_ours() -> None:
    assert not (TREE / "setup.py").exists()
    assert PROJECT["build-system"]["build-backend"] == "hatchling.build"
    assert not {"hooks", "build"} & {key for key in PROJECT["tool"]["hatch"] if key == "hooks"}


def install(folder: Path, package: str, version: str, files: dict[str, str]) -> None:
    """A distribution as pip leaves it: its files, and their SHA-256 in RECORD."""
    about = folder / f"{package}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = []
    for relative, text in files.items():
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        (folder / relative).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{relative},sha256={digest},{len(text)}\n")
    (about / "RECORD").write_text("".join(lines) + f"{about.name}/RECORD,,\n")


TRUE = {"robustbench/__init__.py": "new = 1\n", "robustbench/utils.py": "new = 2\n"}
STALE = {
    "torchattacks/__init__.py": "",
    "robustbench/__init__.py": "stale = 1\n",
    "robustbench/utils.py": "stale = 2\n",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty site-packages, the only place where packages are looked for."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder)])
    assert list(distributions()) == []
    return folder


def test_doctor_detects_a_clobbered_robustbench(site: Path) -> None:
    install(site, "robustbench", "1.1.1", TRUE)
    assert installed.robustbench() == []
    install(site, "torchattacks", "3.5.1", STALE)
    ((state, text),) = installed.robustbench()
    assert state == "FAIL"
    assert "robustbench 1.1.1 was overwritten by torchattacks (2 differing files)" in text


def test_doctor_detects_one_that_an_uninstall_has_gutted(site: Path) -> None:
    install(site, "robustbench", "1.1.1", TRUE)
    install(site, "torchattacks", "3.5.1", STALE)
    (site / "robustbench" / "__init__.py").write_text(TRUE["robustbench/__init__.py"])
    (site / "robustbench" / "utils.py").unlink()
    assert "(1 differing file)" in installed.robustbench()[0][1]


def test_doctor_tells_the_other_order_and_the_copy_alone(site: Path) -> None:
    install(site, "torchattacks", "3.5.1", STALE)
    assert installed.robustbench()[0][1].startswith("`import robustbench` gives torchattacks' copy of 2022")
    install(site, "robustbench", "1.1.1", TRUE)
    ((state, text),) = installed.robustbench()
    assert (state, text.startswith("torchattacks has lost its files to robustbench 1.1.1")) == ("WARN", True)


@pytest.mark.parametrize(
    ("version", "state"),
    [("2.25.1", "WARN"), ("2.32.3", "WARN"), ("2.32.4", "OK"), ("2.40", "OK"), ("3.0.0", "OK")],
)
def test_doctor_detects_an_old_requests(site: Path, version: str, state: str) -> None:
    assert installed.requests() == []
    install(site, "requests", version, {"requests/__init__.py": ""})
    ((found, text),) = installed.requests()
    assert found == state
    assert text.startswith(f"requests {version}")


def test_doctor_fails_on_a_clobbered_robustbench(site: Path) -> None:
    install(site, "robustbench", "1.1.1", TRUE)
    install(site, "torchattacks", "3.5.1", STALE)
    install(site, "requests", "2.25.1", {})
    others = installed.lines()[len(installed.own_packages()) :]
    states = [state for state, _ in others]
    assert states == ["OK", "FAIL", "WARN"]


def test_this_environment_was_not_downgraded() -> None:
    assert [line for line in installed.requests() if line[0] != "OK"] == []
    assert [line for line in installed.robustbench() if line[0] == "FAIL"] == []
