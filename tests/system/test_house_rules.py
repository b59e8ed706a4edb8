"""House rules that the linter does not cover: code that could run untrusted code is in few places, each with a reason."""

import ast
import functools
import re
import statistics
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ftdata"


@functools.cache
def parse(path):
    """Parse a module once for all rules."""
    return ast.parse(path.read_text())


MODULES = {
    "pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "subprocess", "pty", "runpy", "code",
    "builtins", "torch.hub", "torch.jit",
}  # fmt: skip
CALLS = {
    "eval", "exec", "compile", "__import__", "exec_module", "load_module", "import_module", "unsafe_load", "full_load",
    "system", "popen", "read_pickle", "posix_spawn", "create_subprocess_shell", "create_subprocess_exec", "load_url",
    *(f"{kind}{end}" for kind in ("exec", "spawn") for end in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
}  # fmt: skip
LOADERS = {"torch", "yaml", "np", "numpy", "joblib", "jit", "hub"}
OPTIONS = {"shell", "trust_remote_code", "allow_pickle"}
ALLOWED = {
    ("__init__.py", "import_module"): "names of this package, in a table",
    ("exporters/formats.py", "import_module"): "modules of this package, in a table",
    ("yaml12.py", "yaml.load"): "with a SafeLoader, and the result is looked through",
    ("registry.py", "exec_module"): "a plug-in file that the user names on the command line",
    ("templates/python_template.py", "exec_module"): "a template file that the user names, in the worker process",
    ("templates/sandbox/environment.py", "exec"): "what Jinja's sandbox generated, as Jinja itself runs it",
    ("templates/worker/process.py", "subprocess"): "our own interpreter, with a list of arguments",
    ("templates/engines.py", "subprocess"): "Node.js with a constant script, if the user asks for it",
    ("train/runs/train_model.py", "pickle"): "the name of the error by which torch refuses one",
}


def find_forbidden_calls(path):
    tree = parse(path)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {each.asname: each.name for each in node.names if each.asname}
        if isinstance(node, ast.ImportFrom):
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            asked = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            yield from ((node.lineno, name) for name in asked if name in MODULES or name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            yield from calls(node, names)
        elif isinstance(node, ast.Dict):
            # What is handed on as `**options`.
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in OPTIONS and is_true(value):
                    yield node.lineno, f"{key.value}={ast.unparse(value)}"


def calls(node, names):
    first, _, rest = ast.unparse(node.func).partition(".")
    whole = f"{names.get(first, first)}.{rest}".rstrip(".")
    owner, _, name = whole.rpartition(".")
    # `re.compile` and methods of the same names are others.
    if (name in CALLS and name not in ("compile", "eval")) or whole in ("compile", "eval", "builtins.eval"):
        yield node.lineno, name
    elif name == "load" and owner.rpartition(".")[2] in LOADERS:
        yield node.lineno, f"{owner.rpartition('.')[2]}.load"
    elif (
        whole == "getattr"
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
        and node.args[1].value in CALLS
    ):
        yield node.lineno, f"getattr {node.args[1].value}"
    for option in node.keywords:
        if option.arg in OPTIONS and (
            is_true(option.value) or (option.arg != "trust_remote_code" and not is_false(option.value))
        ):
            yield node.lineno, f"{option.arg}={ast.unparse(option.value)}"


def is_true(node):
    """Return whether this expression can be true independent of user input."""
    return any(
        isinstance(one, ast.Constant) and one.value in (True, 1)
        for one in ast.walk(node)
        if not isinstance(one, ast.Call)
    ) and not (isinstance(node, ast.Call | ast.Subscript))


def is_false(node):
    return isinstance(node, ast.Constant) and node.value is False


def test_no_module_runs_untrusted_code():
    """G17: no pickle, eval, shell or unsafe YAML; `trust_remote_code` is never a true constant."""
    seen = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        seen.update((str(path.relative_to(PACKAGE)), what) for _, what in find_forbidden_calls(path))
    assert seen == Counter(list(ALLOWED))


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from marshal import loads", "eval(x)", "exec(x)", "yaml.load(x)", "run(x, shell=True)", "import _pickle",
     "torch.load(x)", "f(trust_remote_code=True)", "np.load(x, allow_pickle=True)", "os.system(x)", "from os import system\nsystem(x)",
     "from torch import load\nload(x)", "import torch as t\nt.load(x)", "import yaml as y\ny.load(x, y.Loader)", "getattr(os, 'system')(x)",
     "pd.read_pickle(x)", "torch.jit.load(x)", "torch.hub.load(x)", "asyncio.create_subprocess_shell(x)", "os.execvp(x)",
     "os.posix_spawn(x)", "f(**{'trust_remote_code': True})", "f(trust_remote_code=config.trust or 1)", "import builtins"],
)  # fmt: skip
def test_rule_detects_forbidden_calls(line, tmp_path):
    (tmp_path / "a.py").write_text(line)
    assert list(find_forbidden_calls(tmp_path / "a.py"))


def functions():
    """Yield file, name and length of every function, without its docstring."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                told = first.end_lineno - first.lineno + 1 if ast.get_docstring(node, clean=False) else 0
                yield path.relative_to(PACKAGE), node.name, node.end_lineno - node.lineno + 1 - told


def test_functions_and_modules_are_short():
    found = list(functions())
    lengths = sorted(length for _, _, length in found)
    assert [one for one in found if one[2] > 80] == []
    assert statistics.median(lengths) <= 12
    assert lengths[len(lengths) * 9 // 10] <= 35
    every = [*PACKAGE.rglob("*.py"), *Path(__file__).parents[1].rglob("*.py")]
    assert {path.name: n for path in every if (n := len(path.read_text().splitlines())) > 500} == {}


REASON = re.compile(r"# (?:noqa: [A-Z0-9, ]+|type: ignore\[[\w, -]+\])(?:  ?\(.+\)|  # .+)")


def test_every_lint_exception_has_a_reason():
    """`# noqa: RULE  (why)`; `pyproject.toml` lists the exceptions for whole files with their reasons."""
    bare = [
        f"{path.relative_to(PACKAGE)}:{number}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"#\s*(noqa|type:\s*ignore|ruff:|mypy:)", line) and not REASON.search(line)
    ]
    assert bare == []
    ignored = (PACKAGE.parent / "pyproject.toml").read_text().partition("\nignore = [")[2].partition("\n]")[0]
    assert [line for line in ignored.splitlines() if line.strip() and "#" not in line] == []


def broad(path):
    """Yield the lines that catch every exception without raising it again."""
    lines = path.read_text().splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        is_suppressed = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress")
        is_told = "# (" in lines[node.lineno - 1] if is_suppressed else False
        if is_suppressed and not is_told and {"Exception", "BaseException"} & {ast.unparse(one) for one in node.args}:
            yield node.lineno
        if isinstance(node, ast.ExceptHandler):
            names = {one.id for one in ast.walk(node.type or ast.Name("Exception")) if isinstance(one, ast.Name)}
            raises = any(isinstance(one, ast.Raise) for one in ast.walk(node))
            if names & {"Exception", "BaseException"} and not raises and not REASON.search(lines[node.lineno - 1]):
                yield node.lineno


def test_broad_except_clauses_have_a_reason():
    assert {str(path): found for path in sorted(PACKAGE.rglob("*.py")) if (found := list(broad(path)))} == {}


HEAVY = {
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "pandas",
    "bitsandbytes",
    "accelerate",
    "matplotlib",
    "ray",
}


def import_time_nodes(node):
    """Yield the nodes that run when a module is imported, without those for type checkers."""
    for one in ast.iter_child_nodes(node):
        if isinstance(one, ast.If) and ast.unparse(one.test) == "TYPE_CHECKING":
            continue
        if not isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield one
            yield from import_time_nodes(one)


def test_heavy_libraries_are_imported_on_use():
    """Only modules in `train/`, which are imported on use, may import them at the top."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if PACKAGE / "train" not in path.parents or (path.parent == PACKAGE / "train" and path.name == "__init__.py"):
            top = list(import_time_nodes(parse(path)))
            named = [one.module or "" for one in top if isinstance(one, ast.ImportFrom)]
            named += [each.name for one in top if isinstance(one, ast.Import) for each in one.names]
            assert not HEAVY & {name.partition(".")[0] for name in named}, path


def test_architecture_page_lists_every_module():
    """The page lists exactly the modules and folders of the package."""
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    table = page.partition("| layer | modules |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)/?`", table))
    there = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__", "_version"}
    there |= {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert there <= named
    assert named <= {path.stem for path in PACKAGE.rglob("*") if path.suffix == ".py" or path.is_dir()}


def test_no_folder_of_tests_is_skipped(pytestconfig):
    """pytest's default skips folders named `build`."""
    patterns = pytestconfig.getini("norecursedirs")
    roots = (PACKAGE, Path(__file__).parents[1])
    folders = {path.parent.name for root in roots for path in root.rglob("*.py")}
    assert [folder for folder in folders if any(fnmatch(folder, pattern) for pattern in patterns)] == []
