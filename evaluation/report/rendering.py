"""A page as one HTML file that loads nothing, and as Markdown beside its pictures."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from evaluation.report.page import Block, Cell, Gallery, Page, Picture, Points, Sample, Table, Text

_TEMPLATES = Path(__file__).with_name("templates")
_CODE = re.compile(r"`([^`]+)`")
_FENCE = re.compile(r"`{3,}")


def html(page: Page) -> str:
    """The page with its pictures inside; whatever text it holds is shown, never run."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["coded"] = lambda text: Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))
    environment.filters["data_uri"] = _data_uri
    return environment.get_template("report.html.jinja").render(page=page)


def markdown(page: Page, folder: Path) -> str:
    """The same as Markdown; pictures are named as seen from `folder`."""
    lines = [f"# {_plain(page.title)}", ""]
    lines += [f"- {what}: {_plain(value)}" for what, value in page.facts]
    for section in page.sections:
        lines += ["", f"## {section.title}"]
        for block in section.blocks:
            lines += ["", *_lines(block, folder)]
    return "\n".join(lines) + "\n"


def _lines(block: Block, folder: Path) -> list[str]:
    match block:
        case Text():
            return [f"> {_plain(block.text)}" if block.tone == "missing" else _plain(block.text)]
        case Points():
            return [f"- {_plain(line)}" for line in block.lines]
        case Table():
            return _table(block)
        case Picture():
            return [_picture(block, folder), "", f"*{_plain(block.caption)}*"]
        case Gallery():
            pictures = [line for one in block.pictures for line in (_picture(one, folder), "")]
            return [f"### {_plain(block.title)}", "", *pictures][:-1]
        case Sample():
            return _sample(block)


def _table(table: Table) -> list[str]:
    lines = [
        f"**{_plain(table.caption)}**",
        "",
        _row([_plain(text) for text in table.head]),
        "|" + "---|" * len(table.head),
        *(_row([_cell(cell) for cell in cells]) for cells in table.rows),
    ]
    return [*lines, "", f"{_plain(table.note)}"] if table.note else lines


def _cell(cell: Cell) -> str:
    text = f"{_plain(cell.text)} {_plain(cell.beside)}".strip()
    return f"**{text}** (best)" if cell.is_best else text


def _row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def _picture(picture: Picture, folder: Path) -> str:
    alt = _plain(picture.alt).replace("[", "(").replace("]", ")")
    return f"![{alt}]({picture.path.relative_to(folder).as_posix()})"


def _sample(sample: Sample) -> list[str]:
    lines = ["<details>", f"<summary>{_plain(sample.title)}</summary>", ""]
    for role, text in sample.prompt:
        lines += [f"{role or 'prompt'}:", "", *_fenced(text), ""]
    for answer in sample.answers:
        facts = f" ({answer.facts})" if answer.facts else ""
        lines += [f"{answer.policy}{facts}:", "", *_fenced(answer.text), ""]
    return [*lines, "</details>"]


def _fenced(text: str) -> list[str]:
    """As code, behind a fence longer than any in it: Markdown and HTML in it stay letters."""
    longest = max((len(match) for match in _FENCE.findall(text)), default=2)
    fence = "`" * (longest + 1)
    return [f"{fence}text", text, fence]


def _plain(text: str) -> str:
    """Text of ours or of the run, one line, without a tag that Markdown would pass on."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
