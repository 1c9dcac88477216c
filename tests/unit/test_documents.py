"""The documents that people read first: the two READMEs say the same, and no link leads nowhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
READMES = ("README.md", "README.zh-CN.md")


def test_the_two_readmes_have_the_same_blocks_and_the_same_parts() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in READMES)

    def commands(text: str) -> list[str]:
        return [re.sub(r"#.*", "", block) for block in BLOCK.findall(text)]

    assert commands(english) == commands(chinese)
    for pattern in (r"^#+ ", r"^- ", r"^\| `?", r"<!-- tested -->"):
        assert len(re.findall(pattern, english, re.M)) == len(re.findall(pattern, chinese, re.M)), pattern
    assert LINK.findall(english)[1:] == LINK.findall(chinese)[1:]


@pytest.mark.parametrize("name", (*READMES, "docs/guides/first-payment.md"))
def test_links_lead_somewhere(name: str) -> None:
    file = ROOT / name
    broken = [link for link in LINK.findall(file.read_text(encoding="utf-8")) if not (file.parent / link).exists()]

    assert broken == []
