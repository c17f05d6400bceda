"""Export the notebooks as pages: what `make html` calls.

A page needs nothing but the fonts next to it, and has no script: formulas become MathML here, and the style
is in the page. Template, style and fonts are in `template/`; the index page is made from the README.
"""

from __future__ import annotations

import base64
import io
import mimetypes
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import nbformat
import PIL.Image
from bs4 import BeautifulSoup, Tag
from jinja2 import pass_context
from math_core import LatexError, LatexToMathML
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath, markdown2html_mistune
from nbconvert.preprocessors import ClearOutputPreprocessor

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(__file__).resolve().parent / "template"
MATHML = LatexToMathML(fancy_error=False)
LONG = 32  # characters of a formula in the text that a phone's line might not hold


class PageError(ValueError):
    """A page that cannot be made; the message names the notebook, the cell and what is wrong."""


class Page(NamedTuple):
    """What the frame of a page says; `index.html.j2` reads it."""

    file: str
    title: str
    description: str
    notebook: str = ""  # the address of its notebook


class Renderer(IPythonRenderer):
    """nbconvert's, with MathML in the place of TeX; ``where`` names the notebook and the cell."""

    def __init__(self, where: str, **options):
        super().__init__(escape=False, **options)
        self.where = where

    def mathml(self, formula: str, display: bool) -> str:
        try:
            return MATHML.convert_with_local_state(formula, displaystyle=display)
        except LatexError as error:
            problem = f"the formula {formula.strip()!r} does not convert: {error}"
            raise PageError(f"{self.where}: {problem}") from error

    def inline_math(self, body: str) -> str:
        return self.mathml(body, display=False)

    def block_math(self, body: str) -> str:
        return f'<span class="formula" tabindex="0">{self.mathml(body, display=True)}</span>'

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")


@pass_context
def markdown2html(context, source: str) -> str:
    """The filter of that name: Markdown to HTML."""
    cell, name = context["cell"], context["resources"]["metadata"]["name"]
    renderer = Renderer(f"{name}, cell {cell['id']}", attachments=cell.get("attachments", {}))
    return MarkdownWithMath(renderer=renderer).render(source)


def shown_width(src: str) -> int | None:
    """How many pixels across a PNG in a data URI is to be shown: a figure's inch has 100."""
    if not src.startswith("data:image/png;base64,"):
        return None
    with PIL.Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))) as image:
        return round(100 * image.width / image.info.get("dpi", (100,))[0])


def finish_formulas(soup: BeautifulSoup) -> None:
    """Braces keep their distance, primes stand at their height, and a long formula in the text can scroll."""
    for operator in soup.main("mo", string=["\u23de", "\u23df", "→", "←"]):
        script = operator.parent
        if script.name in ("munder", "mover", "munderover"):
            script["class"] = "stretched"
            script.attrs.pop("accent", None)
            script.attrs.pop("accentunder", None)
    for prime in soup.main("mo", string="′"):  # the font's prime is raised as it is
        if prime.parent.name == "msup":
            prime.parent.name = "mrow"
            prime["lspace"] = prime["rspace"] = "0"
    for formula in soup.main("math", display=None):
        if len(formula.get_text()) > LONG:
            formula.wrap(soup.new_tag("span", attrs={"class": "long", "tabindex": "0"}))


def frame_images(soup: BeautifulSoup, folder: Path) -> None:
    """Each image comes into the page, gets a card to lie on, and its width, so that nothing moves later."""
    for image in soup.main("img"):
        path, card = folder / unquote(image["src"]), image.parent
        if not image["src"].startswith("data:") and path.is_file():
            content = base64.b64encode(path.read_bytes()).decode()
            image["src"] = f"data:{mimetypes.guess_type(path)[0]};base64,{content}"
        if card.name == "p":
            card.name = "div"
        card["class"], card["tabindex"] = [*card.get("class", []), "figure"], "0"
        width = image.get("width") or shown_width(image["src"])
        if width:
            image["style"] = f"--width: {width}px"


def frame_tables(soup: BeautifulSoup) -> None:
    """A table scrolls inside a box; a header without text is no header."""
    for table in soup.main("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "table", "tabindex": "0"}))
        for header in table("th"):
            if not header.get_text(strip=True) and not header.find("math"):
                header.name = "td"
            elif not header.has_attr("scope"):
                header["scope"] = "col" if header.find_parent("thead") else "row"


def list_headings(soup: BeautifulSoup) -> None:
    """Put the second and third level into the navigation; a second heading of one text gets a number."""
    seen, contents = Counter(), soup.new_tag("ol")
    for heading in soup.main(re.compile("^h[1-6]$"), id=True):
        link, name = heading.find("a", "anchor-link"), heading["id"]
        seen[name] += 1
        heading["id"] = name if seen[name] == 1 else f"{name}-{seen[name]}"
        link["href"] = f"#{heading['id']}"
        link["aria-label"] = f"Permalink: {heading.get_text().removesuffix(link.get_text()).strip()}"
        if heading.name in ("h2", "h3"):
            item = soup.new_tag("li", attrs={"class": heading.name})
            entry = deepcopy(heading)
            entry.find("a", "anchor-link").decompose()
            entry.name, entry.attrs = "a", {"href": link["href"]}
            item.append(entry)
            contents.append(item)
    if contents.contents:
        soup.find("nav", "toc").details.append(contents)
    else:
        soup.find("nav", "toc").decompose()


class Site:
    """The pages that are being made, and the files that go with them."""

    def __init__(self, chapters: Sequence[Path], base: Path):
        self.base, self.chapters = base, {base / path.name for path in chapters}
        self.files: dict[str, bytes] = {}  # address -> what is in the file

    def rewrite_links(self, main: Tag, folder: Path, name: str) -> None:
        """From notebook to notebook becomes from page to page; other files of the collection come along."""
        for link in main("a", href=re.compile(r"^(?!\w+:|#)")):
            target, sign, fragment = link["href"].partition("#")
            path = (folder / unquote(target)).resolve()
            if path in self.chapters:
                target = f"{path.stem}.html"
            elif path == ROOT / "README.md":
                target = "index.html"
            elif path.is_file():
                inside = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(path.name)
                target = f"files/{inside.as_posix()}"
                self.files[target] = path.read_bytes()
            else:
                cell = link.find_parent(id=re.compile("^cell-id="))
                where = f"{name}, cell {cell['id'].removeprefix('cell-id=')}" if cell else name
                raise PageError(f"{where}: the link {link['href']!r} leads nowhere")
            link["href"] = target + sign + fragment

    def make_page(self, notebook: nbformat.NotebookNode, folder: Path, page: Page, **steps) -> str:
        """The notebook as HTML; its relative links start in ``folder``."""
        name = Path(page.notebook).name or "README.md"
        resources = {"metadata": {"name": name}, "page": page, **steps}
        exporter = HTMLExporter(
            filters={"markdown2html": markdown2html},
            template_name=TEMPLATE.name,
            extra_template_basedirs=[str(TEMPLATE.parent)],
            exclude_input_prompt=True,
            exclude_output_prompt=True,
        )
        html, _ = exporter.from_notebook_node(notebook, resources)
        soup = BeautifulSoup(html, "html.parser")
        for tag in soup.main(["script", "style", "iframe", "link"]):
            tag.decompose()
        for pre in soup.main("pre"):
            pre["tabindex"] = "0"
        finish_formulas(soup)
        frame_images(soup, folder)
        frame_tables(soup)
        list_headings(soup)
        self.rewrite_links(soup.main, folder, name)
        return str(soup)


def title_and_lead(markdown: str, default: str) -> tuple[str, str]:
    """The first heading, and the paragraph after it, as plain text."""
    soup = BeautifulSoup(markdown2html_mistune(markdown), "html.parser")
    for link in soup("a", "anchor-link"):
        link.decompose()
    title, lead = soup.h1, soup.select_one("h1 + p")
    return plain(title) if title else default, plain(lead) if lead else ""


def plain(tag: Tag) -> str:
    """Its text in a line, without the marks of formulas."""
    return " ".join(tag.get_text().replace("$", "").split())


def index_source(readme: str) -> str:
    """The part of the README that the index page shows: its introduction, and its map of the notebooks."""
    introduction, *sections = re.split(r"^(?=## )", readme, flags=re.MULTILINE)
    notebooks = [section for section in sections if section.startswith("## The notebooks\n")]
    return "\n".join([introduction, *notebooks])


def export(paths: Sequence[Path], folder: Path, base: Path, readme: Path = ROOT / "README.md") -> list[str]:
    """Export the notebooks at ``paths`` and an index page, made from ``readme``; return the pages' names.

    ``folder`` is made anew, and left as it was if a page cannot be made. Links of the notebooks are read from
    ``base``, where they are in the collection.

    Raises:
        PageError: there are no notebooks, a formula does not convert, or a link leads nowhere.
    """
    if not paths:
        raise PageError("there are no notebooks to export: `make run` comes first")
    site, text = Site(paths, base.resolve()), readme.read_text(encoding="utf-8")
    index = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(index_source(text), id="readme")])
    notebooks, pages = [index], [Page("index.html", *title_and_lead(text, readme.stem))]
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        title = title_and_lead(prose, path.stem)
        pages.append(Page(f"{path.stem}.html", *title, f"files/{path.name}"))
        notebooks.append(notebook)
        bare, _ = ClearOutputPreprocessor().preprocess(deepcopy(notebook), {})
        bare.metadata.pop("collection", None)  # what made the outputs
        site.files[pages[-1].notebook] = nbformat.writes(bare).encode()

    for i, (notebook, page) in enumerate(zip(notebooks, pages, strict=True)):
        steps = {"book": pages[0].title, "previous": pages[i - 1] if i > 1 else None}
        steps["next"] = pages[i + 1] if i + 1 < len(pages) else None
        html = site.make_page(notebook, site.base if i else readme.resolve().parent, page, **steps)
        site.files[page.file] = html.encode()

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(TEMPLATE / "fonts", folder / "fonts", ignore=shutil.ignore_patterns("*.py", "__*"))
    for address, content in site.files.items():
        (folder / address).parent.mkdir(parents=True, exist_ok=True)
        (folder / address).write_bytes(content)
    return [page.file for page in pages]
