"""The documents are true: commands parse, code runs, links resolve, and files, options, keys and names exist."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser

from simmim.cli.arguments import split_options
from simmim.cli.main import _parser, main
from simmim.config import KINDS, Recipe
from simmim.config.loading import load_recipe, read_options
from simmim.config.sections import Settings
from simmim.evaluation.dispatch import EVALUATION_OPTIONS
from tests.test_architecture import LAYERS

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""Pages that name no old name."""
EXECUTED = ["README.md", "quick-start.md", "python.md", "changing-resolution.md", "multi-channel-data.md"]
SIMMIM_TOOLS = ("pretrain", "run", "finetune", "evaluate")
PLAIN = (
    r"\bjudg|\bheld[- ]out|\brooms?\b|\bfloors?\b|\blook(s|ed|ing)? (at|like)\b|\bsavers?\b|\bmoments of\b|\brivals?\b"
)
QUESTION = r"(What|How(?!-to)|Where|Why|Which|Who|Whether|Does|Do|Is|Will|Can)\b"


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the fenced code blocks of a page."""
    language, start, lines = None, 0, []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = re.match(r"\s*```(\w*)", line)
        if fence and language is None:
            language, start, lines = fence[1], number, []
        elif fence:
            yield Block(page, start, language or "sh", "\n".join(lines) + "\n")
            language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{page} ends inside a code block"


def prose_of(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose_of(page))


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RECIPES = {"RECIPE": "recipes/demo.yaml"}
"""Replacements for words that stand for a recipe in a command."""
LANGUAGES = {"sh", "text", "python", "yaml"}
COMMANDS = [
    (f"{name_of(block.page)}:{block.line}", line)
    for block in BLOCKS
    if block.language == "sh"
    for line in block.text.replace("\\\n", " ").splitlines()
    if shlex.split(line, comments=True)
]


def commands_of(parser: argparse.ArgumentParser, name: str = "simmim") -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of all commands by their full names."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        return {name: parser}
    found = {}
    for word, command in inner[0].choices.items():
        found |= commands_of(command, f"{name} {word}")
    return found


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings if option.startswith("--")}


# Commands


@pytest.fixture(scope="module", autouse=True)
def _written_recipes(tmp_path_factory) -> None:
    """Write the recipes in documents whose first line names their file."""
    folder = tmp_path_factory.mktemp("recipes")
    for block in BLOCKS:
        named = re.match(r"# (\w+\.yaml)\n", block.text)
        if block.language == "yaml" and named:
            (folder / named[1]).write_text(block.text)
            RECIPES[named[1]] = str(folder / named[1])


def check_simmim(words: list[str]) -> None:
    """Parse a command as the command line does; load its recipe with its overrides, and read its options."""
    arguments, further = _parser().parse_known_args([RECIPES.get(word, word) for word in words])
    assert all("=" in word and not word.startswith("-") for word in further), f"unknown arguments {further}"
    overrides = [*arguments.overrides, *further]
    recipe = getattr(arguments, "recipe", None)
    if recipe is not None and "=" not in recipe:
        loaded = load_recipe(recipe, overrides)
        stage = getattr(arguments, "stage", None)
        assert stage is None or stage in loaded.stages
    if words[0] in ("evaluate", "predict"):
        options = split_options([*arguments.data, *overrides])[1]
        accepted = []
        for model in EVALUATION_OPTIONS.values():
            try:
                read_options(model, options)
                accepted.append(model)
            except ValueError:
                continue
        assert accepted, f"no export has the options {options}"


class Parsed(Exception):
    """The arguments of a tool are valid; it need not run."""


def check_tool(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a tool up to the end of its argument parsing."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *given, **named):
        parse(parser, *given, **named)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(Parsed):
        runpy.run_path(words[0], run_name="__main__")


def check_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(words[0])
    assert script.is_file(), script
    if script.parent.name == "tools" and script.stem in SIMMIM_TOOLS:
        check_simmim([script.stem, *words[1:]])
    elif script.parent.name == "tools":
        check_tool(words, monkeypatch)


def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize(("where", "line"), COMMANDS, ids=[where for where, _ in COMMANDS])
def test_commands_are_accepted(where, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    match words:
        case ["make", target]:
            assert target in make_targets()
        case ["simmim" | ".venv/bin/simmim", *arguments]:
            check_simmim(arguments)
        case ["python", *arguments]:
            check_script(arguments, monkeypatch)
        case ["accelerate", "launch", *arguments]:
            launched = launch_command_parser().parse_args(arguments)
            assert launched.config_file is None or Path(launched.config_file).is_file()
            check_script([launched.training_script, *launched.training_script_args], monkeypatch)
        case ["sbatch", script, *arguments]:
            assert Path(script).is_file()
            check_simmim(["run", *arguments])
        case ["pip", "install", package]:
            assert set(re.findall(r"\[(\w+)\]", package)) <= extras()
        case ["source", ".venv/bin/activate"]:
            pass
        case _:
            raise AssertionError(f"{where}: cannot check {line!r}; mark a block that is no commands as text")


def test_commands_are_found_and_mistakes_are_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(COMMANDS) > 60
    with pytest.raises(SystemExit):
        check_simmim(["pretrain"])
    with pytest.raises(ValueError, match="shares"):
        check_simmim(["pretrain", "recipes/demo.yaml", "data.shares=0.5"])
    with pytest.raises(AssertionError):
        check_simmim(["evaluate", "EXPORT", "DATA", "zooms=2"])
    with pytest.raises(SystemExit):
        check_script(["tools/benchmark.py", "step", "--competitors", "timm"], monkeypatch)


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_commands_in_sentences_exist(page):
    commands = {word for name in commands_of(_parser()) for word in name.split()[1:2]} | {"COMMAND"}
    for code in inline_code(page):
        if code.startswith("simmim ") and not code.startswith("simmim --"):
            assert code.split()[1] in commands, code
        if code.startswith("make "):
            assert code.split()[1] in make_targets(), code


def test_the_reference_has_every_command_and_option():
    text = (ROOT / "docs/command-line.md").read_text()
    sections = dict(re.findall(r"^## (simmim [a-z]+)$(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    commands = commands_of(_parser())
    assert set(sections) == {" ".join(name.split()[:2]) for name in commands}
    for name, parser in commands.items():
        section = sections[" ".join(name.split()[:2])]
        usage = "\n".join(re.findall(rf"^{name}\b.*(?:\n {{4}}.*)*", section, re.MULTILINE)) + section.split("```")[-1]
        assert options_of(parser) - {"--help"} <= set(re.findall(r"--[a-z][a-z-]*", usage)), name
        for command in re.findall(rf"^{name.split()[0]} .*(?:\n {{4}}.*)*", section, re.MULTILINE):
            known = next(parser for known, parser in commands.items() if command.startswith(known))
            assert set(re.findall(r"--[a-z][a-z-]*", command)) <= options_of(known), command


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_options_in_sentences_exist(page):
    known = {option for parser in commands_of(_parser()).values() for option in options_of(parser)}
    for tool in (ROOT / "tools").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', tool.read_text()))
    known |= options_of(launch_command_parser())
    found = {option for code in inline_code(page) for option in re.findall(r"(?<!\S)--[a-z][a-z_-]+", code)}
    assert found <= known


# Recipes


def fields_of(models: list[type[Settings]], key: str) -> list[type[Settings]]:
    """Return the models that the value of a key may have; raises where no model has the key."""
    fields = [model.model_fields[key] for model in models if key in model.model_fields]
    assert fields, key
    found: list[type[Settings]] = []
    for field in fields:
        options = getattr(field.annotation, "__args__", (field.annotation,))
        found += [kind for kind in options if isinstance(kind, type) and issubclass(kind, Settings)]
    return found


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_recipe_keys_exist(page):
    for code in inline_code(page):
        key = code.split("=")[0]
        keys = r"(data|encoder|labels|mask|speed|stages\.\w+)(\.[a-z_]+)+"
        if not re.fullmatch(keys, key) or Path(key).suffix in (".json", ".safetensors"):
            continue
        first, *rest = key.split(".")
        models: list[type[Settings]] = list(set(KINDS.values()))
        if first == "stages":
            rest = rest[1:]
        elif first in ("data", "encoder"):
            models = fields_of([Recipe], first)
        else:
            rest = [first, *rest]
        for part in rest:
            models = fields_of(models, part)


def test_the_reference_of_recipes_names_stages_as_recipes_do():
    named = re.findall(r"^## stages\.(\w+)", (ROOT / "recipes/README.md").read_text(), re.MULTILINE)
    assert named and set(named) <= set(KINDS)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda b: f"{b.page.name}:{b.line}")
def test_recipes_in_documents_are_valid(block):
    assert Recipe.model_validate(yaml.safe_load(block.text)).stages


# Python


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """Return a folder with ``runs/demo/pretrain/export``: the demo after one step."""
    folder = tmp_path_factory.mktemp("documents")
    command = ["pretrain", str(ROOT / "recipes/demo.yaml"), "--out", str(folder / "runs"), "--precision", "fp32"]
    smaller = ["data.num_images=40", "data.validation_images=8", "stages.pretrain.schedule.epochs=0.5"]
    assert main([*command, *smaller, "stages.pretrain.schedule.warmup_epochs=0.1"]) == 0
    return folder


@pytest.mark.parametrize("name", EXECUTED)
def test_code_runs(name, demo, monkeypatch):
    monkeypatch.chdir(demo)
    torch.manual_seed(0)
    page = next(page for page in PAGES if page.name == name)
    blocks = [block for block in blocks_of(page) if block.language == "python"]
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_compiles_and_imports_what_exists(page):
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{name_of(page)}:{block.line}"
        if block.language == "python":
            tree = ast.parse(block.text)
            imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(imports, []), str(page), "exec"), {})


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_modules_functions_and_tests_in_sentences_exist(page):
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for code in inline_code(page):
        dotted = re.match(r"(?:swin|simmim)(?:\.[A-Za-z_]\w*)+", code)
        if dotted:
            resolve(dotted[0])
        if re.fullmatch(r"test_\w+", code) and code != "test_top1":
            assert f"def {code}(" in tests, code


def resolve(dotted: str) -> object:
    """Return a module, or an attribute of one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(dotted)


# Pages and links


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def links_of(page: Path) -> list[tuple[Path, str]]:
    """Return the files and anchors that a page links to, without those on the web."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose_of(page))
    local = [target.partition("#") for target in targets if "://" not in target]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in local]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "recipes/README.md"], ids=name_of)
def test_links_resolve(page):
    for target, anchor in links_of(page):
        assert target.exists(), target
        assert not anchor or anchor in anchors_of(target), f"{target.name}#{anchor}"


def test_every_page_is_reachable_from_the_index():
    reached, waiting = set(), [ROOT / "docs/index.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            waiting += [target for target, _ in links_of(page) if target.suffix == ".md"]
    assert set(DOCS) <= reached
    assert ROOT / "docs/index.md" in [target for target, _ in links_of(ROOT / "README.md")]


def test_every_figure_is_shown():
    shown = {target for page in PAGES for target, _ in links_of(page)}
    assert set((ROOT / "docs/figures").iterdir()) <= shown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_in_sentences_exist(page):
    names = r"(?<![\w/.-])(?:recipes|tools|docs|swin|simmim|notebooks|tests)/[\w./-]*\w"
    for path in re.findall(names, prose_of(page)):
        assert (ROOT / path).exists(), path


def test_the_readme_is_short_and_has_the_first_commands():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= 600
    for command in ("make demo", "make test", "make test-all", "make check", "simmim pretrain", "simmim finetune"):
        assert command in readme
    assert "load_encoder" in readme and "docs/figures/" in readme


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_layer_table_is_that_of_the_import_test(name):
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", (ROOT / name).read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(LAYERS) + 1))
    assert [set(re.findall(r"`([\w.]+)`", modules)) for _, modules in rows] == LAYERS


def test_every_extra_is_documented():
    page = (ROOT / "docs/installation.md").read_text()
    assert {name for name in extras() if f"`{name}`" not in page} == set()


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_words_are_those_of_the_field_and_headings_are_nouns(page):
    prose = prose_of(page)
    assert not [found[0] for found in re.finditer(PLAIN, prose, re.IGNORECASE)]
    for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE):
        assert not re.match(QUESTION, heading) and not heading.endswith(("?", ".", "!")), heading
