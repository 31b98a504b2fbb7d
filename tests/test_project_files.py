"""The files around the code: workflows run what exists, versions agree, forms ask for what is needed to answer."""

import importlib.util
import itertools
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import lightning_prune
from helpers import ROOT
from lightning_prune.comparison import comparison_results
from lightning_prune.exporting import bundle_profile
from lightning_prune.exporting.export_report import ExportReport
from lightning_prune.reduction import vocabulary

pytestmark = pytest.mark.skipif((ROOT / "PKG-INFO").exists(), reason="an unpacked sdist has no .github and no .ci")

GITHUB = ROOT / ".github"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def document(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


WORKFLOWS = {path.name: document(path) for path in sorted((GITHUB / "workflows").glob("*.yml"))}
JOBS = [(name, job, content) for name, workflow in WORKFLOWS.items() for job, content in workflow["jobs"].items()]
FORMS = [path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]


def ci_module(name: str) -> ModuleType:
    """A program of .ci as a module."""
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands() -> Iterator[tuple[str, str]]:
    """Workflow and job -> every line that a step runs, with the values of the matrix put in."""
    for workflow, job, content in JOBS:
        matrix = content.get("strategy", {}).get("matrix", {})
        for step in content.get("steps", []):
            for values in itertools.product(*matrix.values()):
                text = step.get("run", "")
                for key, value in zip(matrix, values, strict=True):
                    text = text.replace("${{ matrix." + key + " }}", value)
                for line in text.splitlines():
                    yield f"{workflow}:{job}", line


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE))


def ci_steps() -> dict[str, str]:
    """The steps of .ci/run and the commands of each."""
    cases = re.findall(r"^ {8}([a-z-]+)\)(.*?);;$", read(".ci/run"), flags=re.MULTILINE | re.DOTALL)
    return dict(cases)


@pytest.mark.parametrize(("job", "command"), sorted(set(commands())))
def test_workflows_run_what_exists(job: str, command: str) -> None:
    """No logic in workflows: a developer can run every command of theirs."""
    program, script, *words = command.split()
    assert (program, Path(script).suffix) in {("bash", ""), ("python", ".py")}, job
    assert script.startswith(".ci/"), job
    assert (ROOT / script).is_file(), job
    if script == ".ci/run":
        assert set(words) <= set(ci_steps()), job
        assert words, job


@pytest.mark.parametrize("step", sorted(ci_steps()))
def test_steps_run_what_exists(step: str) -> None:
    commands = ci_steps()[step]
    called = re.findall(r"\bmake ([a-z-]+)", commands)
    assert called
    assert set(called) <= targets()
    for script in re.findall(r"\.ci/\w+", commands):
        assert os.access(ROOT / script, os.X_OK)


def test_workflows_run_all_steps() -> None:
    """What holds on a developer's machine is what GitHub checks."""
    everything = re.search(r"set -- ([a-z -]+)$", read(".ci/run"), flags=re.MULTILINE)
    assert everything is not None
    assert set(everything[1].split()) == set(ci_steps())
    assert everything[1].split()[-1] == "test"  # so that the last line printed is the count of the tests
    run = {word for job, line in commands() if job.startswith("ci.yml:") for word in line.split()[2:]}
    assert run == set(ci_steps())


def test_python_versions() -> None:
    """Tested are those that the classifiers name, the first of which is the oldest that installs."""
    tested = WORKFLOWS["ci.yml"]["jobs"]["tests"]["strategy"]["matrix"]["python"]
    named = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert tested == named
    assert PROJECT["requires-python"] == f">={named[0]}"


@pytest.mark.parametrize(
    ("workflow", "job", "content"), JOBS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_jobs_are_bounded(workflow: str, job: str, content: dict[str, Any]) -> None:
    """Each job has a time limit; its token is kept from the programs that it runs, and reads unless it must write."""
    assert WORKFLOWS[workflow]["permissions"] == {"contents": "read"}
    assert WORKFLOWS[workflow]["concurrency"]["group"]
    if "uses" in content:  # another workflow, whose jobs have limits
        assert (ROOT / content["uses"]).is_file()
        return
    assert 0 < content["timeout-minutes"] <= 120
    for step in content["steps"]:
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"] == {"persist-credentials": False}
    writes = {key for key, value in content.get("permissions", {}).items() if value == "write"}
    allowed = {"publish": {"id-token"}, "announce": {"contents"}, "deploy": {"pages", "id-token"}}
    assert writes == allowed.get(job, set())
    assert job not in ("publish", "deploy") or content["environment"]


@pytest.mark.parametrize("workflow", sorted(WORKFLOWS))
def test_actions_have_a_version(workflow: str) -> None:
    """GitHub's own by their major version, those of others by a commit with its version beside it."""
    for name, version in re.findall(r"uses: ([^@\s.]\S*)@(.*)", read(f".github/workflows/{workflow}")):
        own = name.startswith("actions/")
        assert re.match(r"v\d+( #|$)" if own else r"[0-9a-f]{40} # v\d", version), name


def test_extras_exist() -> None:
    files = [ROOT / "Makefile", *(ROOT / ".ci").iterdir(), *(GITHUB / "workflows").iterdir()]
    for path in filter(Path.is_file, files):
        for names in re.findall(r"(?:\.|lightning-prune)\[([a-z0-9,]+)\]", path.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= set(EXTRAS), path


def test_links_of_the_project() -> None:
    assert set(PROJECT["urls"]) == {"Homepage", "Documentation", "Repository", "Issues", "Changelog"}
    repository = PROJECT["urls"]["Repository"]
    assert all(url.startswith((repository, "https://lightning-prune.github.io/")) for url in PROJECT["urls"].values())


def test_oldest_frameworks() -> None:
    """.ci/oldest.txt has the lower bounds of pyproject.toml; `make oldest` writes it."""
    assert read(".ci/oldest.txt") == ci_module("oldest").constraints(PROJECT)
    oldest = WORKFLOWS["ci.yml"]["jobs"]["oldest"]
    assert oldest["env"] == {"CONSTRAINTS": ".ci/oldest.txt"}
    versions = [step["with"]["python-version"] for step in oldest["steps"] if "setup-python" in step.get("uses", "")]
    assert PROJECT["requires-python"] == f">={versions[0]}"


@pytest.mark.parametrize("bound", ["torch", "torch<3", "torch>=2.13"])
def test_bounds_that_oldest_refuses(bound: str) -> None:
    dependencies = [line for line in PROJECT["dependencies"] if not line.startswith("torch>=")]
    extras = {**EXTRAS, "other": ["torch>=2.12"]} if bound == "torch>=2.13" else EXTRAS
    with pytest.raises(ValueError, match=r"`torch`.*got \["):
        ci_module("oldest").constraints(
            {**PROJECT, "dependencies": [*dependencies, bound], "optional-dependencies": extras}
        )


def test_versions_agree() -> None:
    citation = document(ROOT / "CITATION.cff")
    assert citation["version"] == lightning_prune.__version__
    date, text = ci_module("release").notes(read("CHANGELOG.md"), lightning_prune.__version__)
    assert text
    assert str(citation.get("date-released", "Unreleased")) == date
    assert citation["license"] == PROJECT["license"]
    assert citation["url"] == PROJECT["urls"]["Documentation"]
    (paper,) = citation["references"]
    assert {"type": "other", "value": "arXiv:2407.05941", "description": "Preprint"} in paper["identifiers"]


CHANGELOG = "# Changelog\n\n## [1.2.0] - 2027-01-31\n\n### Added\n\n- This.\n\n## [1.1.0] - 2026-12-01\n\n- That.\n"
PACKAGE = '__version__ = "1.2.0"\n'
CITATION = "version: 1.2.0\ndate-released: 2027-01-31\n"


def test_notes_of_a_version() -> None:
    notes = ci_module("release").notes
    assert notes(CHANGELOG, "1.2.0") == ("2027-01-31", "### Added\n\n- This.")
    assert notes(CHANGELOG, "1.1.0") == ("2026-12-01", "- That.")
    assert notes(CHANGELOG, "1.1") == ("", "")


def test_release_that_agrees() -> None:
    assert ci_module("release").problems("v1.2.0", PACKAGE, CHANGELOG, CITATION) == []


@pytest.mark.parametrize(
    ("tag", "package", "changelog", "citation", "named"),
    [
        ("1.2.0", PACKAGE, CHANGELOG, CITATION, "the tag must be 'v1.2.0', got '1.2.0'"),
        ("v1.2.0", '__version__ = "1.2.1"\n', CHANGELOG, CITATION, "`__version__` .* '1.2.0', got '1.2.1'"),
        ("v1.2.0", PACKAGE, CHANGELOG, CITATION.replace("1.2.0", "1.1.0"), "`version` .* got '1.1.0'"),
        ("v1.2.0", PACKAGE, CHANGELOG, "version: 1.2.0\n", "`date-released` .* '2027-01-31', got ''"),
        ("v1.2.0", PACKAGE, CHANGELOG.replace("2027-01-31", "Unreleased"), CITATION, "got the date 'Unreleased'"),
        ("v1.2.0", PACKAGE, CHANGELOG.replace("### Added\n\n- This.\n", ""), CITATION, "what is new in 1.2.0"),
    ],
)
def test_release_that_does_not_agree(tag: str, package: str, changelog: str, citation: str, named: str) -> None:
    found = ci_module("release").problems(tag, package, changelog, citation)
    assert re.search(named, "\n".join(found)), found


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms(path: Path) -> None:
    """Whoever reports figures or a bug says what ran, with what came out, and on which machine."""
    form = document(path)
    questions = {part["id"]: part for part in form["body"] if part["type"] != "markdown"}
    needed = {"1-bug": {"command", "output", "expected", "doctor"}, "2-wrong-figure": {"command", "output", "doctor"}}
    needed |= {"3-device-result": {"device", "command", "results", "doctor"}, "4-feature": {"problem"}}
    for name in needed[path.stem]:
        assert questions[name]["validations"]["required"] is True
    if "doctor" in questions:
        assert "`lightning-prune doctor`" in questions["doctor"]["attributes"]["label"]


def test_stability_names_the_formats() -> None:
    """The table of docs/releasing.md has the versions that this release reads."""
    rows = re.findall(r"^\| `(lightning_prune\.\w+)` \|.*\| ([0-9, ]+) \|$", read("docs/releasing.md"), re.MULTILINE)
    saved = (lightning_prune.Schedule, lightning_prune.KeepRates, lightning_prune.LatencyProfile, ExportReport)
    versions = {kind.FORMAT: kind.VERSIONS for kind in saved}
    versions |= {module._FORMAT: (module._VERSION,) for module in (vocabulary, comparison_results)}
    versions[bundle_profile.FORMAT] = (bundle_profile.VERSION,)
    assert {name: tuple(map(int, listed.split(","))) for name, listed in rows} == versions


@pytest.mark.parametrize("page", ["SECURITY.md", "CODE_OF_CONDUCT.md", "docs/releasing.md", "CITATION.cff"])
def test_addresses(page: str) -> None:
    """Links to this project lead to the repository and the documentation that pyproject.toml names."""
    known = (PROJECT["urls"]["Repository"], PROJECT["urls"]["Documentation"])
    for url in re.findall(r"https://[^\s)]*lightning-prune[^\s)]*", read(page)):
        assert url.startswith(known), url
