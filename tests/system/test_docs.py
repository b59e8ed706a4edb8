"""Docs: commands, links and generated pages are up to date; `test_docs_pages.py` runs the examples."""

import re
import shlex
import subprocess
import sys

import pytest
from docs_pages import DOCS, FENCE, PAGES, ROOT, blocks


def indented(page):
    """Yield the blocks that are indented by four spaces, without a language."""
    text = FENCE.sub("", PAGES[page].read_text())
    for found in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE):
        yield "", "", "".join(line[4:] + "\n" for line in found.splitlines())


def test_make_targets_in_the_docs_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        name
        for page in PAGES.values()
        for name in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)
    }
    assert named
    assert named <= targets


def documented_commands():
    """Yield page and command of every ftdata call in the text and in blocks that are not run."""
    for page, path in PAGES.items():
        for language, _, text in (*blocks(page), *indented(page)):
            if language in ("sh", "yaml", ""):
                for line in text.replace("\\\n", " ").splitlines():
                    for found in re.findall(r"(?:^|&& |-m |run: |\w=\S+ )\s*ftdata (.*?)(?=  #| && |$)", line):
                        yield page, found
        for found in re.findall(r"`ftdata ([a-z][^`]*)`", FENCE.sub("", path.read_text())):
            yield page, found.partition(" ...")[0]


@pytest.mark.parametrize(("page", "command"), list(documented_commands()))
def test_commands_and_options_in_the_docs_exist(page, command, reference):
    """Every command and option that the docs mention but do not run; `A|B` are alternatives."""
    words = shlex.split(command)
    of = next((name for name in reference.NAMES if f"ftdata {command} ".startswith(f"{name} ")), None)
    assert of or words in (["templates"], ["config"], ["cache"], ["--help"], ["--version"]) or "|" in command, command
    for word in words:
        if word.startswith("-") and word not in ("-", "--help", "-h", "--version"):
            assert of and word.partition("=")[0] in reference.NAMES[of], (of, word)


@pytest.fixture(scope="module")
def reference():
    """`docs/scripts/reference.py`, with the flags of each command."""
    import importlib.util

    sys.path.insert(0, str(DOCS / "scripts"))
    spec = importlib.util.spec_from_file_location("reference", DOCS / "scripts" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(DOCS / "scripts"))
    module.NAMES = {
        name: {flag for option in module.options(function) for flag in module.flags(*option)}
        for name, function in module.every_command()
    }
    return module


@pytest.mark.parametrize(
    "name",
    ["api.md", "commands.md", "configuration.md", "errors.md", "checks.md", "flags.md", "schemas.md", "plugins.md"],
)
def test_reference_pages_are_up_to_date(name, reference):
    """`python docs/scripts/reference.py` updates the pages."""
    if name == "api.md":
        assert {path.name for path in (DOCS / "reference").iterdir()} == {
            name,
            *(page for page in reference.PAGES if "/" not in page),
        }
    else:
        assert (DOCS / "reference" / name).read_text() == reference.PAGES[name]()


def test_every_option_has_a_help_text(reference):
    for name, function in reference.every_command():
        assert function.__doc__, name
        for one, _, info in reference.options(function):
            assert info.help, (name, one.name)
            assert not info.help.endswith("."), (name, one.name, info.help)


def test_help_names_every_format():
    """Each reader is listed by its first suffix."""
    from ftdata.cli.options import FORMATS
    from ftdata.readers import readers

    first = {reader: name for name, reader in reversed(readers.registered().items())}
    assert set(FORMATS) == set(first.values()), "FORMATS in ftdata/cli/options.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The page of the Python reference, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "dirhtml", DOCS, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "reference" / "api" / "index.html"


@pytest.mark.long  # the site is built by a workflow of its own as well
def test_every_public_name_is_in_the_reference(site):
    import ftdata
    import ftdata.testing
    import ftdata.train
    from ftdata import errors

    page = site.read_text()
    kinds = [
        name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, errors.FtdataError)
    ]
    wanted = {*ftdata.__all__, *ftdata.train.__all__, *ftdata.testing.__all__, *kinds} - {"__version__"}
    there = set(re.findall(r'id="ftdata\.([\w.]+)"', page))
    assert not {name for name in wanted if not any(one.rpartition(".")[2] == name for one in there)}


def anchors(text):
    """Yield the anchors of the headings of a page, as GitHub generates them."""
    plain = FENCE.sub("", text)
    for heading in re.findall(r"^#+ (.*)$", plain, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_exist(page):
    text = FENCE.sub("", PAGES[page].read_text())
    inline, beside = re.findall(r"\]\(([^)\s]+)", text), re.findall(r"^\[[^\]]+\]: (\S+)", text, re.MULTILINE)
    for target in (*inline, *beside, *re.findall(r"(?:src|href)=\"([^\"]+)\"", text)):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        found = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert found.exists(), target
        assert not anchor or anchor in list(anchors(found.read_text())), target


def test_every_page_is_in_the_table_of_contents():
    listed = re.findall(
        r"^([\w/-]+)$",
        "".join(
            text
            for _, _, text in re.findall(
                r"^```({)(toctree})\n(.*?)^```", (DOCS / "index.md").read_text(), re.DOTALL | re.MULTILINE
            )
        ),
        re.MULTILINE,
    )
    assert {f"docs/{name}.md" for name in listed} == {page for page in PAGES if page.startswith("docs/")} - {
        "docs/index.md"
    }


def test_configurations_in_the_docs_are_valid():
    from ftdata.config import make_config
    from ftdata.yaml12 import parse_yaml

    shown = [
        parse_yaml(text)
        for page in PAGES
        for language, _, text in blocks(page)
        if language == "yaml" and re.search(r"^model:", text, re.MULTILINE)
    ]
    assert shown
    for values in shown:
        make_config(values)


@pytest.mark.slow
def test_site_is_built_without_warnings(site):
    assert "build_sft_dataset" in site.read_text()


@pytest.mark.long
def test_concept_diagrams_are_up_to_date(tmp_path):
    """`python docs/scripts/concepts.py` updates the diagrams."""
    subprocess.run([sys.executable, DOCS / "scripts" / "concepts.py", tmp_path], check=True)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text() for path in (DOCS / "concepts").glob("*.svg")}
