"""The rules of the layout: who imports whom, what importing does, how large files are, which names there may be.

Nothing here imports torch: the source is read as syntax, and what runs, runs in a process of its own.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from llamachat.config.section import Section
from llamachat.config.sections import Base, Data, DataSource, Rollout, RopeScaling, Run, Scoring, Split, Tracking
from llamachat.config.sections import Tuning as TuningSection
from llamachat.tracking.metrics import check_names
from pipelines.recipe.recipe import Recipe, load
from pipelines.recipe.stages import STAGES
from pipelines.studies.plan import study_plan_text
from pipelines.studies.study import Study, Table, Variant, load_study
from tools.pretraining.config import Config as PretrainingConfig

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "llamachat"
TOP = "pipelines"
NOT_STAGES = {LIBRARY, TOP, "tools", "serving"}  # packages without the three names of a stage

# A module of `llamachat` imports modules that stand before it, and its own folder. A new one gets its place here.
ORDER = (
    "distributed",
    "errors",
    "config",
    "chat_format",
    "maths",
    "data",
    "runs",
    "constraints",
    "memory",
    "models",
    "rollout",
    "scoring",
    "training",
    "tracking",
    "answers",
)

MOST_LINES = 400
MOST_FUNCTION_LINES = 60
MOST_TRACKED_BYTES = 24_000_000
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "core", "types"}

HEAVY = ("torch", "trl", "transformers", "datasets", "wandb", "peft", "accelerate", "bitsandbytes")
# What works on tensors or arrays (numpy sets an environment variable when it loads); help, plans and refusals load the rest.
ON_TENSORS = {"answers", "maths", "models", "rollout", "scoring", "training"}
ON_ARRAYS = {"llamachat.data.packing", "llamachat.data.prompts"}


def packages() -> list[str]:
    """Top-level folders that are Python packages, the tests aside."""
    return sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")


def package_files() -> list[Path]:
    return [path for package in packages() for path in sorted((ROOT / package).rglob("*.py"))]


def all_code() -> list[Path]:
    folders = [*packages(), "tests", "data", "benchmarks"]
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Every module that a file imports, at its top or in a function, and where it does so."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = [*package[: len(package) + 1 - node.level]] if node.level else []
            module = ".".join([*home, *([node.module] if node.module else [])])
            # `from llamachat import batching` imports a module too: with the name the place in the order is known.
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, f"{relative(path)}:{node.lineno}: {name}"


def test_a_package_imports_only_what_lies_below_it() -> None:
    ours = {*packages(), "tests", "benchmarks", "data", "cutting"}
    wrong = []
    for path in package_files():
        package = path.relative_to(ROOT).parts[0]
        allowed = {package, LIBRARY, *(packages() if package == TOP else ())}
        wrong += [where for name, where in imports(path) if name.split(".")[0] in ours - allowed]
    assert not wrong


def test_what_cuts_the_data_and_what_measures_speed_need_no_pipelines() -> None:
    wrong = []
    stages = {stage.package.__name__ for stage in STAGES.values()}
    for folder, allowed in (("data", {LIBRARY}), ("benchmarks", {LIBRARY, *stages})):
        for path in sorted((ROOT / folder).rglob("*.py")):
            wrong += [w for name, w in imports(path) if name.split(".")[0] in {*packages(), "tests"} - allowed]
    assert not wrong


def test_the_library_imports_in_its_order() -> None:
    modules = {path.stem for path in (ROOT / LIBRARY).iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules - {"__init__", "__pycache__", *ORDER}, "each module has its place in ORDER"
    wrong = []
    for path in (ROOT / LIBRARY).rglob("*.py"):
        own = path.relative_to(ROOT / LIBRARY).parts[0].removesuffix(".py")
        for name, where in imports(path):
            library, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if library == LIBRARY and target in ORDER and (own == "__init__" or ORDER.index(target) > ORDER.index(own)):
                wrong.append(where)
    assert not wrong


def test_a_stage_exports_its_section_its_run_and_its_estimate() -> None:
    stages = set(packages()) - NOT_STAGES
    assert stages == {stage.package.__name__ for stage in STAGES.values()}, "each stage has a command"
    for stage in stages:
        assigned = [
            ast.literal_eval(node.value)
            for node in parsed(ROOT / stage / "__init__.py").body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        assert [sorted(names) for names in assigned] == [["Config", "estimate", "run"]], stage


IMPORT_ALL = """
import json, logging, os, signal, sys
seen = []
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
ACTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chdir", "os.putenv",
        "os.system", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.getaddrinfo"}
def watch(event, arguments):
    if event in ACTS or (event == "open" and arguments[2] & WRITES and arguments[0] != os.devnull):
        seen.append(f"{event} {arguments[0]}")
sys.addaudithook(watch)
handler = signal.getsignal(signal.SIGTERM)
for name in sys.argv[2:]:
    __import__(name)
from pipelines.recipe.recipe import load
load("configs/tiny.yaml", ["run.dir=" + sys.argv[1] + "/run"])
print(json.dumps({
    "acts": seen,
    "heavy": sorted({name.split(".")[0] for name in sys.modules}),
    "logging": len(logging.getLogger().handlers),
    "signal": signal.getsignal(signal.SIGTERM) == handler,
}))
"""


def test_importing_has_no_effect_and_loads_nothing_heavy(tmp_path: Path) -> None:
    light = {f"{LIBRARY}.{name}" for name in ORDER if name not in ON_TENSORS}
    names = [module_name(path) for path in package_files()]
    chosen = [name for name in names if ".".join(name.split(".")[:2]) in light or name.split(".")[0] == TOP]
    assert len(chosen) > 40, "the folders were found"
    environment = {**os.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(tmp_path), *chosen],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["acts"] == []
    assert sorted(set(HEAVY) & set(told["heavy"])) == []
    assert told["logging"] == 0 and told["signal"]
    assert list(tmp_path.iterdir()) == []


def test_a_module_calls_nothing_foreign_as_it_is_imported() -> None:
    """A bare call at the top of a module may touch the module's own objects (register a command), nothing else."""
    wrong = []
    for path in package_files():
        tree = parsed(path)
        own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        own |= {ast.unparse(t) for node in tree.body if isinstance(node, ast.Assign) for t in node.targets}
        for node in tree.body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                root = re.match(r"\w+", ast.unparse(node.value))
                if root is None or root[0] not in own:
                    wrong.append(f"{relative(path)}:{node.lineno}")
            reads = not isinstance(node, ast.FunctionDef) and any(
                isinstance(part, ast.Attribute) and part.attr in ("environ", "getenv") for part in ast.walk(node)
            )
            if reads:
                wrong.append(f"{relative(path)}:{node.lineno}: reads the environment")
    assert not wrong


def test_no_module_is_named_after_nothing() -> None:
    assert not [
        relative(path) for path in all_code() if {*path.relative_to(ROOT).with_suffix("").parts} & FORBIDDEN_NAMES
    ]


def test_files_and_functions_keep_their_budget() -> None:
    """What does not fit has more than one business: cut it, there is no list of exceptions."""
    wrong = []
    for path in all_code():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES:
            wrong.append(f"{relative(path)}: {lines} lines")
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MOST_FUNCTION_LINES:
                    wrong.append(f"{relative(path)}:{node.lineno}: {node.name} has {length} lines")
    assert not wrong


def test_code_is_ascii_and_holds_no_marks_of_unfinished_work() -> None:
    marks = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "X" * 3, "NotImplemented" + "Error"]))
    texts = {relative(path): path.read_text(encoding="utf-8") for path in all_code()}
    assert not [name for name, text in texts.items() if not text.isascii()]
    assert not [name for name, text in texts.items() if marks.search(text)]


def test_one_file_knows_the_tags_of_the_chat_format() -> None:
    tags = re.compile(r"\[/?INST\]|<</?SYS>>")
    files = [path for path in all_code() if path.relative_to(ROOT).parts[0] != "tests"]
    assert [relative(path) for path in files if tags.search(path.read_text(encoding="utf-8"))] == [
        "llamachat/chat_format/llama2.py"
    ]


def test_every_recipe_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipes = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(recipes) == 8
    for path in recipes:
        assert load(path).run.dir == f"runs/{path.stem}"


def test_every_study_loads_and_its_tables_show_figures_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    studies = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
    assert [path.stem for path in studies] == ["gate_threshold", "k", "margin", "safety_data", "whitening"]
    for path in studies:
        plan = load_study(path)
        assert len(plan.variants) == len(plan.study.variants) * len(plan.study.seeds)
        assert plan.run_dir == Path(f"runs/tiny-{path.stem}")
        assert all("sft" in {step.name for step in plan.before(name)} for name in plan.homes)
        assert "all together: about" in study_plan_text(plan)
        for table in plan.study.tables:
            check_names(table.columns.values())


# The names under which each section goes in the code: `tuning.rank` is read as `<one of these>.rank`.
HOLDERS: tuple[tuple[type[Section], set[str], str], ...] = (
    (Recipe, {"recipe", "inputs"}, ""),
    (Run, {"run"}, ""),
    (Base, {"base"}, ""),
    (TuningSection, {"tuning"}, ""),
    (Data, {"data"}, ""),
    (DataSource, {"source"}, ""),
    (Split, {"split"}, ""),
    (RopeScaling, {"scaling"}, ""),
    (Rollout, {"rollout"}, ""),
    (Scoring, {"scoring"}, ""),
    (Tracking, {"tracking"}, ""),
    (PretrainingConfig, {"config"}, "pretraining"),
    (Study, {"study"}, "pipelines"),
    (Variant, {"variant"}, "pipelines"),
    (Table, {"table"}, "pipelines"),
    *((stage.config, {"config"}, stage.package.__name__) for stage in STAGES.values()),
)
# Keys of the recipe that nothing reads yet, by what will. A stage that comes takes its keys out of here.
READ_LATER = {
    **{f"Recipe.{stage.section}": "by Stage.section" for stage in STAGES.values() if stage.command != "sft"},
}


def attributes_read() -> dict[str, set[tuple[str, str]]]:
    """Field name -> (package, name of what it was read from)."""
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for path in package_files():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                holder = ast.unparse(node.value).rpartition(".")[2]
                found[node.attr].add((path.relative_to(ROOT).parts[0], holder))
    return found


def test_every_key_of_a_recipe_is_read() -> None:
    found = attributes_read()
    unread = {
        f"{section.__name__}.{name}"
        for section, holders, package in HOLDERS
        for name in section.model_fields
        if not any(holder in holders and place.startswith(package) for place, holder in found[name])
    }
    assert unread == set(READ_LATER)


def pyproject() -> dict[str, dict]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_shipped_and_checked() -> None:
    tools = pyproject()["tool"]
    assert sorted(tools["hatch"]["build"]["targets"]["wheel"]["packages"]) == packages()
    assert sorted(tools["ruff"]["lint"]["isort"]["known-first-party"]) == sorted([*packages(), "tests"])
    assert sorted(tools["pyright"]["include"]) == sorted([*packages(), "benchmarks", "data", "tests"])


def test_a_make_target_named_like_a_folder_is_phony() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    values = dict(re.findall(r"^(\w+)\s*[:?]?=\s*(.*)$", text, flags=re.MULTILINE))

    def words(names: str) -> set[str]:
        return set(re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], names).split())

    rules = re.findall(r"^([^\s#:=][^:=\n]*):(?!=)", text, flags=re.MULTILINE)
    targets = set().union(*(words(rule) for rule in rules))
    phony = set().union(*(words(names) for names in re.findall(r"^\.PHONY:(.*)$", text, flags=re.MULTILINE)))
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert targets & folders <= phony
    # A folder of a later stage must not turn its target into "nothing to be done".
    assert {*STAGES} <= targets & phony


def test_set_up_installs_exact_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    assert not [line for line in pinned if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)]
    assert "torch==2.13.0" in pinned
    names = {normal(line.split("==")[0]) for line in pinned}
    project = pyproject()["project"]
    wanted = [w for lines in (project["dependencies"], *project["optional-dependencies"].values()) for w in lines]
    assert not [line for line in wanted if normal(re.split(r"[\[<>=!~ ]", line)[0]) not in names]


def normal(name: str) -> str:
    """A package's name as indices compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_tracked_files_stay_small() -> None:
    # A clone may belong to another user than the one who tests it.
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode or not (ROOT / ".git").exists():
        pytest.skip("not a git clone: nothing says which files are tracked")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    assert len(sizes) > 100, "the files were listed"
    assert sum(sizes.values()) < MOST_TRACKED_BYTES
