"""Export the notebooks as pages: what `make html` calls.

A page needs nothing but the fonts next to it, and has no script: formulas become MathML here, and the style
is in the page. Template, style and fonts are in `template/`; the index page is made from the README.
"""

import base64
import re
import shutil
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from urllib.parse import quote, unquote

import nbformat
from bs4 import BeautifulSoup, NavigableString
from jinja2 import pass_context
from math_core import LatexError, LatexToMathML
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(__file__).resolve().parent / "template"
MATHML = LatexToMathML(fancy_error=False)
LOCAL = re.compile(r"^(?!\w+:|#)")  # a link's address within the collection
# A sign or an 's behind a formula must not begin a line; nor must a unit behind its number.
SIGN_BEHIND = re.compile(r"(<math>(?:(?!</math>).)*</math>(?:[.,:;?!)]+|['’]s\b))", re.DOTALL)
TYPOGRAPHY = {  # of prose: what to set in the place of a typewriter's signs
    re.compile(r"(?<=\d) (?=%|(?:[KMG]i?B|bits?|bytes?|images)\b)"): "\u00a0",
    re.compile("'"): "’",
    re.compile('"([^"]*)"'): r"“\1”",
}


class PageError(ValueError):
    """A page that cannot be made; the message names the notebook, the cell and what is wrong."""


def to_mathml(formula: str, display: bool) -> str:
    """TeX as MathML. The font's prime is raised as it is, so it must not be a superscript."""
    formula = re.sub(r"'(?!\w)", r"\\mathord{\\prime}", formula)
    return MATHML.convert_with_local_state(formula, displaystyle=display)


class Renderer(IPythonRenderer):
    """nbconvert's, with MathML in the place of TeX."""

    def inline_math(self, body: str) -> str:
        return to_mathml(body, display=False)

    def block_math(self, body: str) -> str:
        return f'<span class="formula">{to_mathml(body, display=True)}</span>'


@pass_context
def markdown2html(context, source: str) -> str:
    """The filter of that name: Markdown to HTML."""
    cell, name = context["cell"], context["resources"]["metadata"]["name"]
    renderer = Renderer(escape=False, attachments=cell.get("attachments", {}))
    try:
        page = MarkdownWithMath(renderer=renderer).render(source)
        page = re.sub(r"(?<=</math>)(</(?:strong|em|a)>)([.,:;?!)]+)", r"\2\1", page)
        return SIGN_BEHIND.sub(r'<span class="together">\1</span>', page)
    except LatexError as error:
        raise PageError(f"{name}, cell {cell['id']}: a formula does not convert: {error}") from error


def finish(soup: BeautifulSoup) -> None:
    """Set the prose, list the headings in the navigation, and let the reader scroll what is too wide."""
    for text in soup.main(string=True):
        if type(text) is NavigableString and not text.find_parent(["pre", "code", "math"]):  # no comment
            prose = str(text)
            for found, sign in TYPOGRAPHY.items():
                prose = found.sub(sign, prose)
            text.replace_with(prose)
    for image in soup.main("img"):
        image.parent["class"] = "figure"
    for table in soup.main("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "table"}))
    for box in soup.main.select("pre, .formula, .table, .figure"):
        box["tabindex"] = "0"
    for heading in soup.main(["h2", "h3"]):
        item = soup.new_tag("li", attrs={"class": heading.name})
        item.append(soup.new_tag("a", href=f"#{heading['id']}"))
        item.a.extend(deepcopy(heading).contents[:-1])  # without the ¶, a link to itself
        soup.find("nav", "toc").ol.append(item)


def index_source(readme: str) -> str:
    """The part of the README that the index page shows: its introduction, and its map of the notebooks."""
    introduction, *sections = re.split(r"^(?=## )", readme, flags=re.MULTILINE)
    return "\n".join([introduction, *(part for part in sections if part.startswith("## The notebooks\n"))])


def export(paths: Sequence[Path], folder: Path, root: Path = ROOT) -> list[str]:
    """Export the notebooks at ``paths`` and an index page into ``folder``, made anew; the names of the pages.

    The collection is in ``root``: README.md, notebooks/ and what they link to, which comes along. A
    `PageError` if there are no notebooks, or a formula does not convert.
    """
    if not paths:
        raise PageError("there are no notebooks to export: `make run` comes first")
    readme = root / "README.md"
    index = nbformat.v4.new_markdown_cell(index_source(readme.read_text(encoding="utf-8")), id="readme")
    notebooks = {readme: nbformat.v4.new_notebook(cells=[index])}  # by the file where their links start
    notebooks |= {root / "notebooks" / path.name: nbformat.read(path, as_version=4) for path in paths}
    addresses = {source: f"{source.stem}.html" for source in notebooks} | {readme: "index.html"}
    lines = [notebook.cells[0].source.partition("\n")[0] for notebook in notebooks.values()]
    titles = dict(zip(addresses.values(), [line.lstrip("# ") for line in lines], strict=True))
    exporter = HTMLExporter(
        filters={"markdown2html": markdown2html},
        template_name=TEMPLATE.name,
        extra_template_basedirs=[str(TEMPLATE.parent)],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(TEMPLATE / "fonts", folder / "fonts")
    (folder / "files").mkdir()
    for path in paths:
        shutil.copy(path, folder / "files")
    for source, notebook in notebooks.items():
        resources = {"metadata": {"name": source.name}, "page": addresses[source], "titles": titles}
        soup = BeautifulSoup(exporter.from_notebook_node(notebook, resources)[0], "html.parser")
        finish(soup)
        for image in soup.main("img", src=LOCAL):
            content = base64.b64encode((source.parent / image["src"]).read_bytes()).decode()
            image["src"] = f"data:image/png;base64,{content}"
        for link in soup.main("a", href=LOCAL):
            target, sign, fragment = link["href"].partition("#")
            path = (source.parent / unquote(target)).resolve()
            if path not in addresses:
                addresses[path] = f"files/{path.relative_to(root).as_posix()}"
                (folder / addresses[path]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / addresses[path])
            link["href"] = quote(addresses[path]) + sign + fragment
        (folder / addresses[source]).write_text(str(soup), encoding="utf-8")
    return list(titles)
