"""What people read is true as far as a test can tell without running it: the two READMEs say the same, links lead somewhere, Python
compiles, and commands exist. What is marked as tested is run by `flows/cli/test_documents.py`."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kassa.cli.main import program

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
READMES = ("README.md", "README.zh-CN.md")
DOCUMENTS = sorted([*READMES, *(str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md"))])
IN_ASYNC = "async function"
"""The words by which a document says, before a block or in it, that the block belongs inside one. Else `await` needs its own."""


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> Iterator[tuple[int, str, str]]:
    """The line on which each block of a language begins, the paragraph before it, and the block."""
    for found in BLOCK.finditer(text):
        if found[1] == language:
            before = text[: found.start()]
            yield before.count("\n") + 1, before.rstrip().rpartition("\n\n")[2], found[2]


# Both READMEs


def test_the_two_readmes_have_the_same_blocks_and_the_same_parts() -> None:
    english, chinese = (read(name) for name in READMES)

    def commands(text: str) -> list[str]:
        return [re.sub(r"#.*", "", block) for _, block in BLOCK.findall(text)]

    assert commands(english) == commands(chinese)
    for pattern in (r"^#+ ", r"^- ", r"^\| `?", r"<!-- tested -->"):
        assert len(re.findall(pattern, english, re.M)) == len(re.findall(pattern, chinese, re.M)), pattern
    assert LINK.findall(english)[1:] == LINK.findall(chinese)[1:]


# Links


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_their_anchors_lead_somewhere(name: str) -> None:
    broken = [link for link in LINK.findall(prose(read(name))) if not leads_somewhere(ROOT / name, link)]

    assert broken == []


def test_anchors_are_what_github_makes_of_headings() -> None:
    text = "# The `kassa up` page\n\n```bash\n# none\n```\n\n## Names, on [each](x.md) broker!\n\n## 2. 一分钟\n\n## 2. 一分钟\n"

    assert anchors(text) == {"the-kassa-up-page", "names-on-each-broker", "2-一分钟", "2-一分钟-1"}


def prose(text: str) -> str:
    """Without code, in which brackets are no links, and `#` is no heading."""
    return BLOCK.sub("", text)


def leads_somewhere(file: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = file.parent / path if path else file
    return target.exists() and (not anchor or anchor in anchors(target.read_text(encoding="utf-8")))


def anchors(text: str) -> set[str]:
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(text), re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        again = sum(one == slug or bool(re.fullmatch(rf"{re.escape(slug)}-\d+", one)) for one in found)
        found.add(f"{slug}-{again}" if again else slug)
    return found


# Python


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_of_documents_compiles_and_imports_what_there_is(name: str) -> None:
    assert [problem for block in blocks(read(name), "python") for problem in python_problems(*block)] == []


def test_await_outside_a_function_needs_a_word_about_it() -> None:
    text = "Some words.\n\n```python\nawait it()\n```\n\nIn your async function:\n\n```python\nawait it()\n```\n"

    assert [list(python_problems(*block)) for block in blocks(text, "python")] == [
        ["line 3: 'await' outside function"], []
    ]  # fmt: skip


def test_names_that_are_not_in_kassa_are_seen() -> None:
    text = "```python\nfrom kassa.client import Kassa, Cassa, webhooks\nfrom kassa.cashier import Till\n```\n"

    assert [list(python_problems(*block)) for block in blocks(text, "python")] == [
        ["line 1: there is no kassa.client.Cassa", "line 1: there is no kassa.cashier.Till"]
    ]


def python_problems(line: int, before: str, block: str) -> Iterator[str]:
    is_inside = IN_ASYNC in before or IN_ASYNC in block
    try:
        compile(block, "block", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT if is_inside else 0, dont_inherit=True)
    except SyntaxError as error:
        yield f"line {line}: {error.msg}"
        return
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "kassa":
            yield from (
                f"line {line}: there is no {node.module}.{one.name}"
                for one in node.names
                if not is_there(node.module, one.name)
            )


def is_there(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return False


# Commands


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_of_documents_exist_with_their_options(name: str) -> None:
    assert [problem for block in blocks(read(name), "bash") for problem in command_problems(*block)] == []


def test_wrong_commands_are_seen_wherever_they_stand() -> None:
    text = (
        "```bash\nA=1 kassa ledger balance | head   # no\nkassa queue dead   # no\nkassa queue replay x --al; kassa up \\\n"
        '  --broker "a#b" --port x\ncurl -d "kassa nothing\nkassa nothing" >out\nX=$(.venv/bin/kassa worker nobody)\n```\n'
    )

    ((*_, problems),) = [(block, list(command_problems(*block))) for block in blocks(text, "bash")]
    assert [problem.partition(":")[0] for problem in problems] == [
        "kassa ledger balance", "kassa queue dead", "kassa queue replay x --al", "kassa up --broker a#b --port x",
        "kassa worker nobody",
    ]  # fmt: skip


def command_problems(line: int, before: str, block: str) -> Iterator[str]:
    for words in commands_of(block):
        try:
            parse(words)
        except click.UsageError as error:
            yield f"kassa {' '.join(words)}: {error.format_message()}"


def commands_of(block: str) -> Iterator[list[str]]:
    """The words behind each `kassa` of a block."""
    text = re.sub(r"(^|\s)#\s.*$", "", block.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|&()<>\n")
    lexer.whitespace, lexer.commenters = " \t", ""
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*lexer, "\n"]:
        if token.strip(";|&()<>\n"):
            words.append(token)
            continue
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        if words and words[0] in ("kassa", ".venv/bin/kassa"):
            yield words[1:]
        words = []


def parse(words: list[str]) -> None:
    """As the program does it, up to the moment when it would begin. Raises click.UsageError."""
    command: click.Command = program
    context = click.Context(program, info_name="kassa")
    while isinstance(command, click.Group) and words:
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        command, context = found, click.Context(found, parent=context, info_name=name)
    command.make_context(context.info_name, words, parent=context.parent)
