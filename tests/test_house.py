"""The rules of the house, held by reading the source: see CONTRIBUTING.md for the reasons."""

import ast
import fnmatch
import graphlib
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "es_trl"
LIBRARY = sorted(PACKAGE.rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))
HEAVY = {"torch", "diffusers", "transformers", "peft", "trl", "accelerate", "datasets", "pandas", "scipy", "wandb"}

# room -> the rooms it may import from; an import may only go down.
MAY_IMPORT = {
    "es": set(),
    "assets": set(),
    "rewards": {"assets"},
    "data": {"assets"},
    "pipelines": {"es", "assets"},
    "evaluation": {"es", "pipelines", "data", "rewards", "assets", "hub"},
    "hub": {"es", "pipelines", "data", "rewards", "assets"},
    "report": {"es", "assets", "evaluation", "hub"},
    "run": {"es", "pipelines", "data", "rewards", "assets", "evaluation", "hub"},
    "trainer": {"es", "pipelines", "data", "rewards", "assets", "evaluation", "hub", "run"},
    "replay": {"pipelines", "rewards", "run", "trainer"},
    "files": set(),
    "lazy": set(),
    "lock": set(),
    "version": set(),
    "formatting": set(),
    "names": set(),
    "pictures": set(),
    "samples": set(),
}
# packages whose names are imported when they are used
LAZY = ["", "cli", "evaluation", "pipelines", "replay", "rewards", "run", "trainer"]
# single files that every room but the mathematics may use, and that know no room
FOR_ALL = {"files", "formatting", "lazy", "lock", "names", "pictures", "samples", "version"}
# what stands above the rooms and takes only what a room's front door gives: `from es_trl.room import name`
FRONT_DOORS_ONLY = ("cli",)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(tree: ast.AST, module: str = "", is_package: bool = False) -> list[tuple[int, str, list[str]]]:
    """Every import as (line, absolute module, imported names), those inside functions too, relative ones resolved."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            target = node.module or ""
            if node.level:
                parts = module.split(".")
                base = parts[: len(parts) - node.level + is_package]
                target = ".".join([*base, *([node.module] if node.module else [])])
            found.append((node.lineno, target, [alias.name for alias in node.names]))
    return found


def library_imports(path: Path) -> list[tuple[int, str, list[str]]]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    return imports_of(tree_of(path), ".".join(parts[:-1] if is_package else parts), is_package)


def direction_faults(module: str, imports: list[tuple[int, str, list[str]]]) -> list[str]:
    """What is wrong with the imports of one library module, as `line: reason`."""
    room = module.split(".")[1] if "." in module else ""
    faults = []
    for line, target, names in imports:
        if target.split(".")[0] != "es_trl":
            if room == "es" and target.split(".")[0] not in {"torch", *sys.stdlib_module_names}:
                faults.append(f"{line}: es imports {target}: the mathematics is torch and the standard library")
            continue
        # `from es_trl import rewards` enters the room `rewards`; `from es_trl import __version__` enters none.
        targets = [f"es_trl.{name}" for name in names if name != "__version__"] if target == "es_trl" else [target]
        for other in targets:
            to = other.split(".")[1]
            if to == room:
                continue
            if room in FRONT_DOORS_ONLY:
                if to not in MAY_IMPORT or other.count(".") > 1 or any(name.startswith("_") for name in names):
                    faults.append(f"{line}: {room} takes public names of a room only, not {other}")
            elif to not in MAY_IMPORT[room] and (to not in FOR_ALL or room == "es"):
                faults.append(
                    f"{line}: {room} must not import {other} (allowed: {sorted(MAY_IMPORT[room]) or 'nothing'})"
                )
    return faults


def forbidden(tree: ast.AST, may_print: bool) -> list[str]:
    """Constructs that run code out of data, or write where a library must not, as `line: what`."""
    faults = []
    for line, module, names in imports_of(tree):
        top = module.split(".")[0]
        if top in {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}:
            faults.append(f"{line}: import {top}")
        if module == "torch" and {"load", "save"} & set(names):
            faults.append(f"{line}: torch.load / torch.save")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        flags = {k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is True}
        if called == "torch.load" and "weights_only" in flags:  # builds tensors and nothing else
            continue
        if called in {"torch.load", "torch.save", "eval", "exec", "os.system"}:
            faults.append(f"{node.lineno}: {called}")
        if called in {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}:
            faults.append(f"{node.lineno}: {called}, use yaml.safe_load")
        faults += [f"{node.lineno}: {f}=True" for f in flags & {"trust_remote_code", "allow_pickle", "shell"}]
        if called == "print" and not may_print:
            faults.append(f"{node.lineno}: print, use logging")
    return faults


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_file(path):
    """Imports go down, a file is short, says what it is for, and holds nothing forbidden."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = ".".join(p for p in parts if p != "__init__")
    if module != "es_trl":
        assert parts[1] in {*MAY_IMPORT, *FRONT_DOORS_ONLY}, f"{parts[1]} is no room of the house: see CONTRIBUTING.md"
        assert direction_faults(module, library_imports(path)) == []
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{lines} lines: split the file by idea"
    assert long_functions(path) == []
    assert written_from_outside(tree_of(path)) == []
    assert ast.get_docstring(tree_of(path)), "one sentence at the top says what the file is for"
    assert forbidden(tree_of(path), may_print=False) == []


def long_functions(path: Path) -> list[str]:
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name, lines = f"{name_of(path)}: {node.name}", node.end_lineno - node.lineno + 1
            if lines > 80:
                found.append(f"{name} has {lines} lines: take a part out")
    return found


def written_from_outside(tree: ast.Module) -> list[str]:
    """Names of other modules, and flags of a trainer or of its parts, that a module writes."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    faults = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                if not isinstance(part, ast.Attribute):
                    continue
                owner = ast.unparse(part.value)
                other_part = owner.startswith("trainer.") or owner == "trainer" or owner.startswith("self.trainer")
                if other_part and owner.split(".")[-1] not in TRAINERS_OWN:
                    faults.append(f"{part.lineno}: {ast.unparse(part)} is written from outside")
                if owner in modules and owner[0].islower():
                    faults.append(f"{part.lineno}: {ast.unparse(part)} is state of another module")
    return faults


# Of the Trainer that we build on, and written where the Trainer itself would: its state and its last log.
TRAINERS_OWN = {"state"}


# It writes heads in the format in which others have published them, to read them with the product's own reader.
STANDS_IN_FOR_PICKLES = {"reward_table.py"}


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_file(path):
    """Recipes use what a user may use: no underscore names of ours, nothing forbidden."""
    faults = forbidden(tree_of(path), may_print=True)
    if path.name in STANDS_IN_FOR_PICKLES:
        faults = [fault for fault in faults if not fault.endswith("torch.save")]
    assert faults == []
    for line, target, names in imports_of(tree_of(path)):
        if target.split(".")[0] == "es_trl":
            private = [part for part in [*target.split("."), *names] if part.startswith("_") and part != "__version__"]
            assert not private, f"line {line}: {target} {private} is private"


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("es_trl.es.noise", "from es_trl.pipelines import PipelineAdapter"),
        ("es_trl.es.noise", "import numpy"),
        ("es_trl.rewards.clip", "from ..trainer.base import DiffusionTrainer"),
        ("es_trl.rewards.clip", "def f():\n    from es_trl import data"),
        ("es_trl.pipelines.adapter", "import es_trl.rewards"),
        ("es_trl.evaluation.result", "from ..trainer import ESTrainer"),
        ("es_trl.hub.card", "from ..evaluation import evaluate"),
        ("es_trl.es.noise", "from ..formatting import number"),
        ("es_trl.formatting", "from .hub import md_escape"),
        ("es_trl.trainer.base", "from es_trl import cli"),
        ("es_trl.trainer.base", "from es_trl import ESConfig"),
        ("es_trl.cli", "from es_trl.run.checkpoint import restore"),
    ],
)
def test_wrong_import_is_seen(module, code):
    assert direction_faults(module, imports_of(ast.parse(code), module)) != []


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("es_trl.es.noise", "import math, torch\nfrom .keys import make_generator"),
        (
            "es_trl.trainer.base",
            "from ..hub import card\nfrom es_trl import __version__, evaluation",
        ),
        ("es_trl.cli", "from es_trl.trainer import ESConfig"),
        ("es_trl.hub.card", "from ..formatting import number"),
    ],
)
def test_right_import_is_left_alone(module, code):
    assert direction_faults(module, imports_of(ast.parse(code), module)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "from torch import save",
        "np.load(p, allow_pickle=True)",
        "eval('1')",
        "exec('1')",
        "yaml.load(f, Loader=yaml.FullLoader)",
        "f(trust_remote_code=True)",
        "subprocess.run('ls', shell=True)",
        "print(1)",
    ],
)
def test_forbidden_construct_is_seen(code):
    assert len(forbidden(ast.parse(code), may_print=False)) == 1


def test_harmless_lookalikes_are_left_alone():
    lines = [
        "model.eval()",
        "np.load(p)",
        "torch.load(p, weights_only=True)",
        "yaml.safe_load(f)",
        "f(trust_remote_code=False)",
        "safetensors.torch.load(b)",
    ]
    code = "\n".join(lines)
    assert forbidden(ast.parse(code), may_print=False) == []


class WithoutTyping(ast.NodeTransformer):
    """Takes out what only type checkers import."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        return node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)


def test_no_files_import_each_other():
    """Not in a circle either, nor from inside a function."""
    modules = {".".join(p for p in f.relative_to(ROOT).with_suffix("").parts if p != "__init__"): f for f in LIBRARY}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        found = imports_of(WithoutTyping().visit(tree_of(path)), module, path.name == "__init__.py")
        named = [(target, f"{target}.{name}") for _, target, names in found for name in names or [""]]
        graph[module] = {inner if inner in modules else outer for outer, inner in named} & set(modules) - {module}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def test_the_room_of_methods_stays_small():
    assert len(list((PACKAGE / "trainer").glob("*.py"))) <= 25, "what is not a method's own belongs elsewhere"


def test_top_level_folders():
    """es_trl, recipes, tests, docs: nothing else beside them but what .gitignore names and dot folders."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.endswith("/")]
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    folders = {f for f in folders if not any(fnmatch.fnmatch(f, pattern) for pattern in ignored)}
    assert folders == {"es_trl", "recipes", "tests", "docs"}


def test_recipe_configs_fit_on_a_screen():
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        content = [line for line in lines if line.strip() and not line.strip().startswith("#")]
        assert len(content) <= 60, f"{name_of(path)}: {len(content)} lines"
        assert isinstance(yaml.safe_load("\n".join(lines)), dict), name_of(path)


def test_documents_link_to_what_exists():
    """Links and pictures of every page point to files of the checkout, and every docs page is in the menu."""
    menu = (ROOT / "mkdocs.yml").read_text()
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")]
    pages += (ROOT / "tests").rglob("*.md")
    broken = []
    for page in pages:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
        targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
        for target in targets:
            local = target.split("#")[0]
            if local and not re.match(r"[a-z]+:", local) and not (page.parent / local).exists():
                broken.append(f"{name_of(page)}: {target}")
        if (ROOT / "docs") in page.parents and str(page.relative_to(ROOT / "docs")) not in menu:
            broken.append(f"{name_of(page)}: not in the nav of mkdocs.yml")
    assert broken == []


def test_import_is_free():
    """`import es_trl` loads nothing heavy, and a typo is answered with the name that was meant."""
    code = (
        "import es_trl, json, sys\n"
        "names = sorted(set(dir(es_trl)) & set(es_trl.__all__))\n"
        "try:\n    es_trl.ESTrianer\nexcept AttributeError as error:\n    message = str(error)\n"
        "es_trl.__version__\n"
        "print(json.dumps([sorted(sys.modules), names, message]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded, names, message = json.loads(done.stdout)
    assert not HEAVY & set(loaded)
    assert len(names) >= 10
    assert "ESTrainer" in message and "ESTrianer" in message


def test_public_names_exist():
    import es_trl

    for name in es_trl.__all__:
        assert callable(getattr(es_trl, name)), name
    assert es_trl.__version__ == (ROOT / "VERSION").read_text().strip()


def test_editors_see_the_public_names():
    """A package's public names are those that it imports under TYPE_CHECKING, and each can be had."""
    for package in LAZY:
        shown = {name for _, target, names in library_imports(PACKAGE / package / "__init__.py") for name in names}
        module = importlib.import_module(f"es_trl.{package}".rstrip("."))
        shown -= {"TYPE_CHECKING", "attach", "__version__"}
        assert shown <= set(module.__all__)
        hidden = [name for name in shown if (PACKAGE / package / f"{name}.py").exists()]
        assert hidden == [], "a file of that name, once imported, stands in the name's place"
        for name in module.__all__:
            assert hasattr(module, name), name


def declared(section: dict, extras: list[str]) -> set[str]:
    lines = section["dependencies"] + [line for extra in extras for line in section["optional-dependencies"][extra]]
    cut = str.maketrans(dict.fromkeys("[<>=!~;(", " "))
    return {line.translate(cut).split()[0].lower().replace("_", "-") for line in lines}


def test_every_import_is_declared():
    """A fresh install must not miss a module, and without an extra only the function that needs it may fail."""
    section = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    always, anywhere = declared(section, []), declared(section, list(section["optional-dependencies"]))
    distributions = metadata.packages_distributions()
    missing = {}
    for path in LIBRARY:
        at_import_time = {node.lineno for node in tree_of(path).body if isinstance(node, ast.Import | ast.ImportFrom)}
        for line, target, _ in library_imports(path):
            top = target.split(".")[0]
            if top == "es_trl" or top in sys.stdlib_module_names:
                continue
            owners = {name.lower().replace("_", "-") for name in distributions.get(top, [top])}
            if not owners & (always if line in at_import_time else anywhere):
                missing[f"{name_of(path)}:{line}"] = top
    assert missing == {}


def test_one_ruff_everywhere():
    """The dev extra, pre-commit and the workflow format with the same version."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pin = next(line for line in extras["dev"] if line.startswith("ruff==")).removeprefix("ruff==")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["rev"] for repo in hooks if repo["repo"].endswith("ruff-pre-commit")] == [f"v{pin}"]
    assert f"ruff=={pin}" in (ROOT / ".github/workflows/quality.yml").read_text()


@pytest.mark.parametrize("name", ["cpu", "single_gpu", "multi_gpu"])
def test_accelerate_configs_load(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / f"recipes/accelerate_configs/{name}.yaml"))
    assert config.mixed_precision == "no"
    assert config.use_cpu == (name == "cpu")
    assert (config.num_processes > 1) == (name == "multi_gpu")


def test_wheel_carries_the_assets(tmp_path):
    """An installed package has every shipped file that a checkout has."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "VERSION", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "es_trl", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    shipped = {str(p.relative_to(source)) for p in (source / "es_trl").rglob("*") if p.is_file()}
    assert shipped <= inside, sorted(shipped - inside)
    assert not [name for name in inside if name.startswith(("tests", "recipes", "docs"))]
