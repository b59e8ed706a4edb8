"""House rules that a linter has not: what could run the code of strangers stands in few places, each with its reason."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ftdata"
MODULES = {
    "pickle",
    "cPickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "subprocess",
    "pty",
    "runpy",
    "code",
}
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "torch.load", "np.load", "numpy.load", "exec_module", "load_module", "import_module",
}  # fmt: skip
OPTIONS = {"shell", "trust_remote_code", "allow_pickle"}
ALLOWED = {
    ("__init__.py", "import_module"): "names of this package, in a table",
    ("config.py", "yaml.load"): "with a SafeLoader, and the result is looked through",
    ("registry.py", "exec_module"): "a plug-in file that the user names on the command line",
    ("templates/sandbox.py", "exec"): "what Jinja's sandbox generated, as Jinja itself runs it",
    ("templates/child.py", "subprocess"): "our own interpreter, with a list of arguments",
    ("train/sft.py", "pickle"): "the name of the error by which torch refuses one",
}


def found(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            yield from ((node.lineno, name) for name in names if name and name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            bare = (
                called.rpartition(".")[2]
                if called.rpartition(".")[2] in ("exec_module", "load_module", "import_module")
                else called
            )
            if bare in CALLS:
                yield node.lineno, bare
            for option in node.keywords:
                value = option.value.value if isinstance(option.value, ast.Constant) else ...
                # What a name stands for is the user's; only of trust is that enough.
                if value is True or (option.arg != "trust_remote_code" and value is not False):
                    yield from [(node.lineno, f"{option.arg}={ast.unparse(option.value)}")] * (option.arg in OPTIONS)


def test_nothing_runs_the_code_of_strangers():
    """No pickle, no eval, no shell, no unsafe YAML; trust in remote code is what the user says, never a constant."""
    seen = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        seen |= {(name, what): f"{name}:{line} {what}" for line, what in found(path)}
    assert [place for key, place in seen.items() if key not in ALLOWED] == []
    assert [key for key in ALLOWED if key not in seen] == []


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from marshal import loads", "eval(x)", "exec(x)", "yaml.load(x)", "run(x, shell=True)",
     "torch.load(x)", "f(trust_remote_code=True)", "np.load(x, allow_pickle=True)", "os.system(x)"],
)  # fmt: skip
def test_the_rule_finds_what_it_forbids(line, tmp_path):
    (tmp_path / "a.py").write_text(line)
    assert list(found(tmp_path / "a.py"))
