"""Options become the same spec as a file would give, and every choice made for the user is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paths
import pytest
from PIL import Image

from bench.planning.job import EvaluateJob
from bench.planning.options import place, to_spec
from bench.planning.plan import plan
from bench.planning.spec import Spec, build
from bench.planning.typed import Options

ROOT = Path("no-data-here")
SPEC = """\
data: {name: digits, test: 100}
models: [{name: mlp, set: {}}]
threat: {norm: Linf, eps: 0.1}
train: {epochs: 2}
defenses: [standard, {name: trades, set: {beta: 3, steps: 2}}]
attacks: [clean, {name: pgd, set: {steps: 5}, n: 50}]
"""
pytestmark = pytest.mark.usefixtures("fresh_catalog")


def made(**typed: Any) -> Spec:
    return to_spec(Options(**typed), ROOT)[0]


def notes(**typed: Any) -> str:
    return "\n".join(to_spec(Options(**typed), ROOT)[2])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(SPEC)
    return path


def entries(spec: Spec, section: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    return [(entry.name, entry.set, entry.grid) for entry in getattr(spec, section)]


def test_options_and_file_give_the_same_jobs(file: Path) -> None:
    typed = made(
        dataset="digits",
        n=100,
        model=["mlp"],
        norm="linf",
        eps=["0.1"],
        epochs=2,
        defense=["standard,trades"],
        attack=["clean", "fgsm"],
        set=["trades.beta=3", "trades.steps=2"],
    )
    written = made(spec=file, attack=["clean,fgsm"])
    assert [job.key for job in plan(typed, ROOT)] == [job.key for job in plan(written, ROOT)]


def test_without_options_there_is_a_default_matrix_with_notes() -> None:
    spec = made()
    assert (spec.data.name, [str(eps) for eps in spec.threat.eps]) == ("digits", ["0.1"])
    assert [d.name for d in spec.defenses] == ["standard", "noisy", "pgd_at"]
    assert [a.name for a in spec.attacks][-2:] == ["autoattack_fast", "closed_form"]
    told = notes()
    for word in (
        "dataset digits",
        "defenses standard, noisy, pgd_at",
        "eps 0.1",
        "pgd (loss=cw), autoattack_fast (audit=100), closed_form (AutoAttack: a screen, then all of it on 100 of",
        "; closed_form: adaptive for noisy)",
    ):
        assert word in told


@pytest.mark.parametrize(
    ("defense", "adaptive"),
    [(["pgd_at"], False), (["noisy"], True), (["pgd_at", "noisy"], True), (["rse"], False), (["smoothing"], False)],
)
def test_attacks_adapted_to_a_defense_are_a_default(defense: list[str], adaptive: bool) -> None:
    """Those of a stochastic defense are so already, for the randomized protocol."""
    names = [attack.name for attack in made(defense=defense).attacks]
    assert ("adaptive for" in notes(defense=defense)) == adaptive
    assert names.count("closed_form") == (adaptive or defense[0] in ("rse", "smoothing"))


@pytest.mark.parametrize("other", [{"norm": "L2"}, {"defense": ["noisy,rse"]}, {"defense": ["smoothing"]}])
def test_the_packages_autoattack_is_the_default_where_the_fast_one_does_not_apply(other: dict[str, Any]) -> None:
    names = [attack.name for attack in made(**other).attacks]
    assert "autoattack" in names
    assert "autoattack_fast" not in names
    assert "a screen" not in notes(**other)


def test_the_packages_autoattack_is_the_default_for_a_stochastic_model_of_the_users() -> None:
    spec, _, told = to_spec(Options(defense=["standard"]), ROOT, stochastic=True)
    assert [attack.name for attack in spec.attacks][-1] == "autoattack"
    assert "a screen" not in " ".join(told)


def test_the_baseline_is_added_once_and_can_be_left_out() -> None:
    assert [d.name for d in made(defense=["noisy"]).defenses] == ["standard", "noisy"]
    assert [d.name for d in made(defense=["noisy,standard"]).defenses] == ["noisy", "standard"]
    assert [d.name for d in made(defense=["noisy"], baseline=False).defenses] == ["noisy"]
    assert "baseline" in notes(defense=["noisy"])
    assert "baseline" not in notes(defense=["noisy"], baseline=False)


def test_notes_do_not_repeat_given_options() -> None:
    assert notes(dataset="digits", defense=["standard"], eps=["0.1"], attack=["clean"]) == ""


def test_photographs_get_eps_in_pixel_units() -> None:
    assert [str(eps) for eps in made(dataset="cifar10").threat.eps] == ["8/255"]


def test_certify_is_a_default_attack_of_smoothed_defenses_only() -> None:
    assert "certify" in [a.name for a in made(defense=["smoothing"]).attacks]
    assert "certify" not in [a.name for a in made(defense=["noisy"]).attacks]


def test_default_attacks_take_no_more_images_than_there_are(tmp_path: Path) -> None:
    assert {a.n for a in made(n=16, defense=["smoothing"]).attacks if a.n} == {16}
    pytest.importorskip("PIL")
    from PIL import Image

    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            Image.new("L", (14, 14)).save(tmp_path / "pets" / part / name / "1.png")
    spec, root, _ = to_spec(Options(dataset=f"folder:{tmp_path}/pets"), ROOT)
    assert (spec.data.name, root) == ("folder:pets", tmp_path)  # records hold no path of this machine
    assert {job.n for job in plan(spec, root) if job.kind == "evaluate"} == {2}


def test_n_caps_the_attacks_of_a_file(file: Path) -> None:
    assert [job.n for job in plan(made(spec=file), ROOT) if job.kind == "evaluate"] == [100, 50] * 2
    assert [job.n for job in plan(made(spec=file, n=60), ROOT) if job.kind == "evaluate"] == [60, 50] * 2
    assert [job.n for job in plan(made(spec=file, n=16), ROOT) if job.kind == "evaluate"] == [16, 16] * 2


def test_options_replace_values_of_a_file(file: Path) -> None:
    spec = made(
        spec=file,
        eps=["0.2,0.3"],
        train_eps="0.25",
        seeds=["1,2", "3"],
        epochs=9,
        train_n=64,
        recipe="paper",
        attack=["fgsm"],
        norm="l2",
    )
    assert ([str(eps) for eps in spec.threat.eps], str(spec.threat.train_eps)) == (["0.2", "0.3"], "0.25")
    assert (spec.threat.norm, spec.seeds, spec.train.epochs, spec.data.train) == ("L2", [1, 2, 3], 9, 64)
    assert (spec.recipe, [a.name for a in spec.attacks]) == ("paper", ["fgsm"])
    assert entries(spec, "defenses")[1] == ("trades", {"beta": 3, "steps": 2}, {})
    assert [d.name for d in made(spec=file, defense=["noisy"]).defenses] == ["noisy"]  # no baseline beside a file


def test_set_reaches_every_entry_of_that_name(file: Path) -> None:
    spec = made(spec=file, set=["trades.beta=0.5", "pgd.steps=7", "pgd.loss=cw", "mlp.width=8"])
    assert entries(spec, "defenses")[1] == ("trades", {"beta": "0.5", "steps": 2}, {})
    assert entries(spec, "attacks")[1] == ("pgd", {"steps": "7", "loss": "cw"}, {})
    assert spec.models is not None
    assert spec.models[0].set == {"width": "8"}
    both = made(attack=["pgd,pgd"], set=["pgd.steps=2"])
    assert [s for _, s, _ in entries(both, "attacks")] == [{"steps": "2"}] * 2


def test_grid_replaces_set(file: Path) -> None:
    assert entries(made(spec=file, grid=["trades.beta=1,6"]), "defenses")[1] == (
        "trades",
        {"steps": 2},
        {"beta": ["1", "6"]},
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("false", False), ("[1;2]", ["1", "2"]), ("[]", []), ("True", "True"), (" cw ", "cw"), ("", "")],
)
def test_values_of_set(text: str, value: Any) -> None:
    assert entries(made(defense=["noisy"], set=[f"noisy.x={text}"]), "defenses")[1][1] == {"x": value}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"set": ["noisy"]}, "--set takes NAME.SETTING=VALUE such as noisy.sigma=0.6, got 'noisy'"),
        ({"set": ["sigma=1"]}, "--set takes NAME.SETTING=VALUE"),
        ({"set": ["noisy.=1"]}, "--set takes NAME.SETTING=VALUE"),
        ({"grid": ["noisy.sigma"]}, "--grid takes NAME.SETTING=VALUE"),
        ({"set": ["nosy.sigma=1"]}, "--set nosy.sigma=1: 'nosy' is not in this run. Did you mean 'noisy'"),
        ({"set": ["trades.beta=1"]}, "'trades' is not in this run"),
        ({"seeds": ["0,x"]}, "--seeds takes whole numbers such as 0,1,2, got 'x'"),
        ({"seeds": [","]}, "seeds is empty; expected at least one entry"),
        ({"defense": [""]}, "defenses is empty; expected at least one entry"),
        ({"attack": [","]}, "attacks is empty; expected at least one entry"),
        ({"eps": ["8"]}, "threat: eps 8 under Linf is larger than the pixel range .* did you mean 8/255"),
        ({"norm": "L7"}, "threat.norm: Input should be 'Linf', 'L2' or 'L1', got 'L7'"),
        ({"recipe": "own"}, "recipe: Input should be 'shared' or 'paper', got 'own'"),
        ({"dataset": "minst"}, "no data set 'minst'. Did you mean 'mnist'"),
        ({"dataset": "folder:none"}, "no image folder .*none"),
        ({"train_n": 0}, "data.train: Input should be greater than 0, got 0"),
    ],
)
def test_options_without_meaning_are_errors(typed: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, LookupError, FileNotFoundError), match=message) as error:
        made(**typed)
    assert "\n" not in str(error.value)


def test_an_error_of_an_option_does_not_name_the_file(file: Path) -> None:
    with pytest.raises(ValueError, match=r"^threat: eps 8 under Linf"):
        made(spec=file, eps=["8"])


def test_an_error_in_the_file_is_found_even_where_options_replace_it(file: Path) -> None:
    file.write_text(SPEC.replace("eps: 0.1", "eps: 8"))
    with pytest.raises(ValueError, match=r"mine\.yaml, line 3: threat: eps 8"):
        made(spec=file, eps=["0.1"])


@pytest.mark.parametrize(("norm", "eps"), [(None, "0.1"), ("linf", "0.1"), ("L2", "0.5")])
def test_the_default_budget_belongs_to_the_norm(norm: str | None, eps: str, tmp_path: Path) -> None:
    spec, _, notes = to_spec(Options(norm=norm), tmp_path)
    assert [str(each) for each in spec.threat.eps] == [eps]
    assert f"eps {eps}" in notes


@pytest.mark.parametrize(
    ("options", "n"),
    [({"n": 150}, 150), ({}, 360), ({"dataset": "mnist"}, 1000), ({"dataset": "mnist", "n": 5000}, 5000)],
)
def test_every_attack_of_a_worst_case_gets_as_many_images(options: dict[str, Any], n: int) -> None:
    for more in ({"defense": ["standard", "rse"]}, {"defense": ["pgd_at"], "attack": ["clean,pgd,autoattack"]}):
        planned = plan(made(**options, **more), ROOT)
        assert {job.n for job in planned if isinstance(job, EvaluateJob)} == {n}
    assert ("n 1000 of 10000 test images" in notes(**options)) == (options == {"dataset": "mnist"})


def test_a_spec_without_a_number_of_images_gives_each_attack_1000() -> None:
    values = {"threat": {"eps": 0.1}, "defenses": ["standard"], "attacks": ["clean", "pgd"], "checks": "off"}
    sizes = {}
    for name in ("digits", "mnist"):
        for test in (None, 50):
            planned = plan(build({**values, "data": {"name": name, "test": test}}), ROOT)
            sizes[name, test] = {job.n for job in planned if isinstance(job, EvaluateJob)}
    assert sizes == {("digits", None): {360}, ("digits", 50): {50}, ("mnist", None): {1000}, ("mnist", 50): {50}}


def test_default_attacks_fit_the_norm() -> None:
    assert "fgsm" not in [a.name for a in made(defense=["standard"], norm="l1", eps=["1"]).attacks]
    assert "fgsm" in [a.name for a in made(defense=["standard"], norm="L2", eps=["1"]).attacks]


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"spec": Path("pgd_at")}, FileNotFoundError, "no spec file pgd_at; several defenses are separated by commas"),
        ({"spec": Path("square")}, FileNotFoundError, "no spec file square; several attacks are separated by commas"),
        (
            {"spec": Path("spec/demo.yml")},
            FileNotFoundError,
            r"no spec file spec/demo\.yml; did you mean specs/demo\.yaml\?",
        ),
        ({"spec": Path("dem")}, FileNotFoundError, r"did you mean specs/demo\.yaml\?"),
        ({"spec": Path("specs")}, FileNotFoundError, r"no spec file specs \(a folder\)"),
        (
            {"epochs": 7, "set": ["train.epochs=5"]},
            ValueError,
            r"--epochs 7 and --set train\.epochs=5; give one of them",
        ),
        ({"seeds": ["-1"]}, ValueError, "seeds"),
        (
            {"defense": ["noisy"], "set": ["pgd_at.steps=1"]},
            LookupError,
            r"not in this run\. Add it with --defense pgd_at",
        ),
        ({"defense": ["noisy"], "set": ["nosy.sigma=1"]}, LookupError, "Did you mean 'noisy'"),
    ],
)
def test_errors_suggest_what_was_meant(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], kind: type[Exception], says: str
) -> None:
    monkeypatch.chdir(paths.ROOT)
    with pytest.raises(kind, match=says) as error:
        made(**options)
    assert "\n" not in str(error.value)


def two_classes(root: Path, classes: int = 2) -> None:
    """A data set of four grey images a class."""
    for part in ("train", "test"):
        for label in "abc"[:classes]:
            (root / part / label).mkdir(parents=True)
            for number in range(4):
                Image.new("L", (8, 8), 20 * number).save(root / part / label / f"{number}.png")


def test_files_passed_over_are_a_note_of_the_plan(tmp_path: Path, file: Path) -> None:
    two_classes(tmp_path / "few")
    dataset = f"folder:{tmp_path / 'few'}"
    assert "passed over" not in notes(dataset=dataset)
    for name in ("0.gif", "1"):
        (tmp_path / "few" / "train" / "a" / name).write_bytes(b"")
    told = "2 files of folder:few passed over: without an image's suffix, or in no class folder"
    assert notes(dataset=dataset).endswith(told)
    assert notes(dataset=dataset, spec=file, n=2) == told


def test_a_folder_in_the_data_folder_precedes_one_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_classes(tmp_path / "here" / "few")
    two_classes(tmp_path / "data" / "few", 3)
    monkeypatch.chdir(tmp_path / "here")
    assert place("folder:few", tmp_path / "data") == ("folder:few", tmp_path / "data")
    assert place("folder:few", tmp_path / "empty") == ("folder:few", tmp_path / "here")
    assert place(f"folder:{tmp_path / 'here' / 'few'}", tmp_path / "data") == ("folder:few", tmp_path / "here")


@pytest.mark.parametrize(("classes", "said"), [(2, "without the DLR loss"), (3, "with the untargeted DLR loss")])
def test_the_suite_for_few_classes_is_a_choice_that_is_said(tmp_path: Path, classes: int, said: str) -> None:
    two_classes(tmp_path / "few", classes)
    _, _, notes = to_spec(Options(dataset=f"folder:{tmp_path / 'few'}", defense=["standard"]), ROOT)
    assert notes[-1].endswith(f" (AutoAttack for {classes} classes: {said})")


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ({"name": "pgd", "set": {"loss": "dlr"}}, "attack pgd with loss dlr needs 3 classes, folder:few has 2"),
        (
            {"name": "eot", "set": {"base": {"name": "pgd", "set": {"loss": "dlr"}}}},
            "attack pgd with loss dlr needs 3 classes",
        ),
        (
            {"name": "autoattack", "set": {"version": "custom", "attacks_to_run": ["apgd-ce", "apgd-t"]}},
            "attack autoattack with attacks_to_run apgd-t needs 4 classes",
        ),
        ({"name": "torchattacks", "set": {"method": "APGDT"}}, "attack torchattacks with method APGDT needs 4 classes"),
    ],
)
def test_a_loss_of_more_classes_is_refused_in_the_plan(tmp_path: Path, attack: dict[str, Any], said: str) -> None:
    two_classes(tmp_path / "few")
    name, root = place(f"folder:{tmp_path / 'few'}", ROOT)
    values = {"data": {"name": name}, "threat": {"eps": ["0.1"]}, "defenses": ["standard"], "attacks": [attack]}
    with pytest.raises(ValueError, match=said):
        plan(build(values), root)


@pytest.mark.parametrize("attack", ["square", "autoattack"])
def test_squares_in_l2_are_refused_on_images_that_hold_none(tmp_path: Path, attack: str) -> None:
    """The pattern that they start from has tiles of a fifth of the side: 0 pixels where it is 4."""
    two_classes(tmp_path / "few")
    name, root = place(f"folder:{tmp_path / 'few'}", ROOT)
    values = {"defenses": ["standard"], "attacks": [attack]}
    for size, norm in ((4, "Linf"), (5, "L2")):
        plan(build({**values, "data": {"name": name, "size": size}, "threat": {"norm": norm, "eps": ["0.1"]}}), root)
    small = build({**values, "data": {"name": name, "size": 4}, "threat": {"norm": "L2", "eps": ["0.1"]}})
    with pytest.raises(ValueError, match=f"attack {attack} in L2 needs images of at least 5x5 pixels, .* has 4x4"):
        plan(small, root)


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("{steps: 40}", {"steps": 40}),
        ("{steps: 40, alpha: 0.01, random_start: false}", {"steps": 40, "alpha": 0.01, "random_start": False}),
        ("{}", {}),
    ],
)
def test_a_mapping_can_be_typed(typed: str, read: dict[str, Any]) -> None:
    chosen = Options(attack=["torchattacks"], set=["torchattacks.method=PGD", f"torchattacks.kwargs={typed}"])
    spec, _, _ = to_spec(chosen, ROOT)
    assert spec.attacks[0].set == {"method": "PGD", "kwargs": read}
    (attack,) = {job.attack.name: job.attack for job in plan(spec, ROOT) if isinstance(job, EvaluateJob)}.values()
    assert attack.settings["kwargs"] == read
