"""The rules of the layout: who imports whom, what importing does, how large files and packages are, which names exist.

Nothing here imports torch: the source is parsed, and what has to run runs in a process of its own.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from llamachat.config.section import Section
from llamachat.config.sections import Base, Data, DataSource, Rollout, RopeScaling, Run, Scoring, Split, Tracking
from llamachat.config.sections import Tuning as TuningSection
from llamachat.tracking.metrics import check_names
from pipelines.recipe.recipe import RecipeSections, load
from pipelines.recipe.stages import STAGES
from pipelines.studies.definition import Study, Table, Variant, load_study
from pipelines.studies.run import study_plan_text
from tools.pretraining.config import Config as PretrainingConfig

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "llamachat"
TOP = "pipelines"
NOT_STAGES = {LIBRARY, TOP, "serving", "tools"}  # packages without the names of a stage

MOST_LINES = 700
MOST_FILES = 15
MOST_FUNCTION_LINES = 60
MOST_TRACKED_BYTES = 24_000_000
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "core", "types"}

# Libraries that take a second to import. Only a module that loads one may be imported inside a function.
HEAVY = {
    *("torch", "trl", "transformers", "datasets", "wandb", "peft", "accelerate", "bitsandbytes"),
    *("matplotlib", "numpy", "pyarrow", "scipy", "sklearn", "tensorboard"),
}
# What works on tensors or arrays; `--help`, plans and refused recipes import the rest.
ON_TENSORS = {"answers", "maths", "models", "rollout", "scoring", "training"}


@dataclass(frozen=True)
class Import:
    """One imported name: in which module it stands and where."""

    module: str  # of ours, or the first part of a foreign one
    where: str
    is_deferred: bool  # inside a function
    is_for_types: bool  # under TYPE_CHECKING


def packages() -> list[str]:
    """Top-level folders that are Python packages, the tests aside."""
    return sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")


@cache
def package_files() -> tuple[Path, ...]:
    return tuple(path for package in packages() for path in sorted((ROOT / package).rglob("*.py")))


def all_code() -> list[Path]:
    return [*package_files(), *(p for folder in ("tests", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py")))]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def modules() -> Mapping[str, Path]:
    return {module_name(path): path for path in package_files()}


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """All imports of a file; `from package import module` counts as an import of the module."""
    package = path.relative_to(ROOT).parent.parts
    collected = []

    def visit(node: ast.AST, is_deferred: bool, is_for_types: bool) -> None:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = [*package[: len(package) + 1 - node.level]] if node.level else []
            module = ".".join([*home, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            is_deferred |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            is_for_types |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for child in ast.iter_child_nodes(node):
                visit(child, is_deferred, is_for_types)
            return
        for name in names:
            ours = name if name in modules() else name.rpartition(".")[0]
            target = ours if ours in modules() else name.partition(".")[0]
            collected.append(Import(target, f"{relative(path)}:{node.lineno}: {name}", is_deferred, is_for_types))

    visit(parsed(path), False, False)
    return tuple(collected)


def cycles(graph: Mapping[str, set[str]]) -> list[str]:
    """Groups of nodes that reach one another (Tarjan's strongly connected components with more than one node)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            place = stack.index(node)
            group = stack[place:]
            del stack[place:]
            if len(group) > 1:
                groups.append(" <-> ".join(sorted(group)))

    for node in graph:
        if node not in index:
            visit(node)
    return groups


def test_cycles_are_detected() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b <-> c"]


def test_a_package_imports_only_what_lies_below_it() -> None:
    """The library imports no stage, a stage no other stage, and only pipelines imports stages."""
    ours = {*packages(), "tests", "benchmarks"}
    wrong = []
    for path in package_files():
        package = path.relative_to(ROOT).parts[0]
        allowed = {package, LIBRARY, *(packages() if package == TOP else ())}
        wrong += [i.where for i in imports(path) if i.module.partition(".")[0] in ours - allowed]
    assert not wrong


def test_benchmarks_need_no_pipelines() -> None:
    """But for those that compare the planner's bytes with measured ones."""
    allowed = {LIBRARY, "benchmarks", *(stage.package.__name__.partition(".")[0] for stage in STAGES.values())}
    names = {*packages(), "tests"} - allowed
    files = sorted((ROOT / "benchmarks").rglob("*.py"))
    for planner in ("memory.py", "gpu_memory.py"):
        files.remove(ROOT / "benchmarks" / planner)
    assert not [i.where for path in files for i in imports(path) if i.module.partition(".")[0] in names]


def test_no_module_imports_in_a_circle() -> None:
    """Neither at the top, nor inside functions, nor for types alone."""
    graph = {
        name: {i.module for i in imports(path) if i.module in modules() and i.module != name}
        for name, path in modules().items()
    }
    assert cycles(graph) == []


def test_no_package_imports_in_a_circle() -> None:
    def package(module: str) -> str:
        parts = module.split(".")
        return ".".join(parts[:2]) if parts[0] in (LIBRARY, TOP) else parts[0]

    graph: dict[str, set[str]] = defaultdict(set)
    for name, path in modules().items():
        graph[package(name)] |= {package(i.module) for i in imports(path) if i.module in modules()} - {package(name)}
    assert cycles(graph) == []


@cache
def loads_heavy(module: str) -> bool:
    """Whether importing the module loads a heavy library."""
    return any(
        i.module in HEAVY or (i.module in modules() and i.module != module and loads_heavy(i.module))
        for i in imports(modules()[module])
        if not i.is_deferred and not i.is_for_types
    )


def test_only_heavy_modules_are_imported_inside_functions_but_for_commands() -> None:
    wrong = [
        i.where
        for path in package_files()
        if path.parent != ROOT / "pipelines" / "cli"
        for i in imports(path)
        if i.is_deferred and i.module in modules() and not loads_heavy(i.module)
    ]
    assert not wrong


def test_a_stage_exports_its_section_and_its_run() -> None:
    for stage in STAGES.values():
        package = ROOT / stage.package.__name__.replace(".", "/") / "__init__.py"
        exported = [
            ast.literal_eval(node.value)
            for node in parsed(package).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        assert [sorted(names) for names in exported] == [["Config", "run"]], package
    named = {stage.package.__name__.partition(".")[0] for stage in STAGES.values()}
    assert set(packages()) - NOT_STAGES == named, "each stage has a command"


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
    library = {f"{LIBRARY}.{path.stem}" for path in (ROOT / LIBRARY).iterdir() if path.stem not in ON_TENSORS}
    on_arrays = {"llamachat.data.packing", "llamachat.data.prompts"}
    chosen = [
        name
        for name in modules()
        if (".".join(name.split(".")[:2]) in library or name.split(".")[0] == TOP) and name not in on_arrays
    ]
    assert len(chosen) > 40, "the folders were found"
    environment = {**os.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", IMPORT_ALL, str(tmp_path), *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    effects = json.loads(done.stdout)
    assert effects["acts"] == []
    assert sorted(HEAVY & set(effects["heavy"])) == []
    assert effects["logging"] == 0 and effects["signal"]
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


def test_files_functions_and_packages_keep_their_bounds() -> None:
    wrong = []
    sizes: dict[Path, int] = defaultdict(int)
    for path in all_code():
        sizes[path.parent] += 1
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES:
            wrong.append(f"{relative(path)}: {lines} lines")
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MOST_FUNCTION_LINES:
                    wrong.append(f"{relative(path)}:{node.lineno}: {node.name} has {length} lines")
    wrong += [f"{relative(folder)}: {count} files" for folder, count in sizes.items() if count > MOST_FILES]
    assert not wrong


def words_of(paths: Iterable[Path]) -> dict[str, int]:
    """How often each identifier occurs in these files."""
    counts: dict[str, int] = defaultdict(int)
    for path in paths:
        for word in re.findall(r"\w+", path.read_text(encoding="utf-8")):
            counts[word] += 1
    return counts


def own_definitions(path: Path) -> Iterator[tuple[str, int]]:
    """Public functions and classes of a module, and methods of classes that no foreign code calls."""
    for node in parsed(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not (isinstance(node, ast.FunctionDef) and node.decorator_list):  # a command is called by its decorator
                yield node.name, node.lineno
            if isinstance(node, ast.ClassDef) and not node.bases:
                for part in node.body:
                    if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                        yield part.name, part.lineno


def test_no_public_function_is_called_by_tests_alone() -> None:
    others = [*ROOT.glob("[a-z]*/**/*.jinja"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    counts = words_of([*package_files(), *others, *sorted((ROOT / "benchmarks").rglob("*.py"))])
    wrong = [
        f"{relative(path)}:{line}: {name}"
        for path in package_files()
        for name, line in own_definitions(path)
        if counts[name] < 2
    ]
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


def texts_with_paths() -> Iterator[tuple[str, str]]:
    """Documents and docstrings, each with its name."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    pages += [path for package in packages() for path in sorted((ROOT / package).rglob("*.md"))]
    for page in pages:
        yield relative(page), page.read_text(encoding="utf-8")
    for path in all_code():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield f"{relative(path)}: {getattr(node, 'name', '')}", ast.get_docstring(node) or ""


def test_every_path_that_a_text_names_exists() -> None:
    """Paths in backticks that begin with a folder of the project or name a Python file, and end like a file or with a slash."""
    paths = re.compile(r"`([\w-]+(?:/[\w.-]+)+\.(?:py|yaml|md|toml|gz|txt|jinja)|[\w-]+(?:/[\w.-]+)*/)`")
    tops = {path.name for path in (*ROOT.iterdir(), *(ROOT / LIBRARY).iterdir()) if path.is_dir()}
    of_runs = {"runs", "data", *STAGES, *(stage.package.__name__ for stage in STAGES.values())}
    of_other_projects = {"llama", "vllm"}
    wrong = []
    for where, text in texts_with_paths():
        for name in paths.findall(text):
            top = name.partition("/")[0]
            is_ours = name.endswith(".py") or (top in tops and top not in of_runs)
            exists = (ROOT / name).exists() or (ROOT / LIBRARY / name).exists()
            if is_ours and top not in of_other_projects and not exists:
                wrong.append(f"{where}: {name}")
    assert not wrong


def test_every_name_that_paper_map_places_in_a_file_stands_there() -> None:
    text = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
    places = re.findall(r"((?:`[\w.]+\*?`(?:, | and )?)+) in `([\w/]+\.py)`", text)
    names = [(name, path) for listed, path in places for name in re.findall(r"`(?:\w+\.)*(\w+)\*?`", listed)]
    assert len(names) > 50, "the table was read"
    assert not [(name, path) for name, path in names if not re.search(rf"\b{name}", (ROOT / path).read_text())]


def test_every_recipe_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipes = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(recipes) == 12
    for path in recipes:
        # The base of these is fetched by a command, and need not be here.
        overrides = ["base.model=assets/base"] if path.stem.startswith("smollm2-") else []
        assert load(path, overrides).run.dir == f"runs/{path.stem}"


def test_every_study_loads_and_its_tables_show_figures_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    studies = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
    assert [path.stem for path in studies] == [
        "dpo_or_ppo",
        "gate_threshold",
        "k",
        "margin",
        "rs_control",
        "safety_data",
        "whitening",
    ]
    for path in studies:
        plan = load_study(path)
        assert len(plan.variants) == len(plan.study.variants) * len(plan.study.seeds)
        assert plan.run_dir == Path(f"runs/{Path(plan.study.extends).stem}-{path.stem}")
        assert all("sft" in {step.name for step in plan.before(name)} for name in plan.homes)
        assert "all together: about" in study_plan_text(plan)
        for table in plan.study.tables:
            check_names(name.rpartition(":")[2] for name in table.columns.values())


# The names under which each section goes in the code: `tuning.rank` is read as `<one of these>.rank`.
SHARED = {"run": Run, "base": Base, "tuning": TuningSection, "data": Data, "source": DataSource, "split": Split,
          "scaling": RopeScaling, "rollout": Rollout, "scoring": Scoring, "tracking": Tracking}  # fmt: skip
OF_STUDIES = {"study": Study, "variant": Variant, "table": Table}
HOLDERS: tuple[tuple[type[Section], set[str], str | tuple[str, ...]], ...] = (
    (RecipeSections, {"recipe", "sections", "inputs"}, ""),
    *((section, {name}, "") for name, section in SHARED.items()),
    *((section, {name}, "pipelines") for name, section in OF_STUDIES.items()),
    (PretrainingConfig, {"config"}, "tools.pretraining"),
    *((s.config, {"config", "_config"}, (s.package.__name__, "llamachat.training")) for s in STAGES.values()),
)


def attributes_read() -> dict[str, set[tuple[str, str]]]:
    """Field name -> (module, name of what it was read from)."""
    reads: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for name, path in modules().items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                reads[node.attr].add((name, ast.unparse(node.value).rpartition(".")[2]))
    return reads


def test_every_key_of_a_recipe_is_read() -> None:
    reads = attributes_read()
    by_name = {stage.section for stage in STAGES.values()}  # `Stage.section` names the section that it reads
    unread = {
        f"{section.__name__}.{name}"
        for section, holders, package in HOLDERS
        for name in section.model_fields
        if not (section is RecipeSections and name in by_name)
        and not any(holder in holders and module.startswith(package) for module, holder in reads[name])
    }
    assert not unread


def pyproject() -> dict[str, dict]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_shipped_and_checked() -> None:
    tools = pyproject()["tool"]
    assert sorted(tools["hatch"]["build"]["targets"]["wheel"]["packages"]) == packages()
    assert sorted(tools["ruff"]["lint"]["isort"]["known-first-party"]) == sorted([*packages(), "tests"])
    assert sorted(tools["pyright"]["include"]) == sorted([*packages(), "benchmarks", "tests"])


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


def test_tools_for_tests_lint_and_types_are_installed_only_where_they_are_used() -> None:
    def extras(target: str) -> list[str]:
        command = ["make", "--dry-run", "--always-make", target, "VENV="]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return re.findall(r"-e '\.\[(\w+)\]'", printed)

    assert (extras("all"), extras("test"), extras("check")) == ([], ["test"], ["test", "check"])


def normal(name: str) -> str:
    """A package's name as indices compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_tracked_files_stay_small() -> None:
    # A clone may belong to another user than the one who tests it.
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode or not (ROOT / ".git").exists():
        pytest.skip("not a git clone: nothing says which files are tracked")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    assert len(sizes) > 100, "the files were listed"
    assert sum(sizes.values()) < MOST_TRACKED_BYTES
