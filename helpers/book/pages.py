"""Export the notebooks as pages: what `make html` calls.

A page asks for nothing but the fonts beside it, and has no script: formulas become MathML here, and the style
stands in the page. Template, style and fonts are in `template/`; the index page is made from the README.
"""

from __future__ import annotations

import base64
import io
import mimetypes
import re
import shutil
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urldefrag

import nbformat
import PIL.Image
from bs4 import BeautifulSoup, Tag
from jinja2 import pass_context
from math_core import LatexError, LatexToMathML
from nbconvert import HTMLExporter
from nbconvert.filters import Highlight2HTML
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

__all__ = ["Page", "PageError", "export"]

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(__file__).resolve().parent / "template"
MATHML = LatexToMathML(fancy_error=False)
# Most of a highlighted page is names, operators and brackets, which have the colour of the text anyway.
PLAIN = re.compile(r'<span class="(?:n|nb|nn|bp|o|p|w|err)">([^<]*)</span>')
LONG = 32  # characters of a formula in the text that a phone's line might not hold


class PageError(ValueError):
    """A page that cannot be made; the message names the notebook, the cell and what is wrong."""


class Neighbour(NamedTuple):
    """Where a step leads."""

    file: str
    title: str


class Page(NamedTuple):
    """What the frame of a page says; `index.html.j2` reads it."""

    file: str
    title: str
    description: str
    book: str
    made: str = ""
    notebook: str = ""
    previous: Neighbour | None = None
    next: Neighbour | None = None


# From Markdown to HTML -----------------------------------------------------------------------------------


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

    def block_code(self, code: str, info: str | None = None) -> str:
        return PLAIN.sub(r"\1", super().block_code(code, info))

    def inline_math(self, body: str) -> str:
        return self.mathml(body, display=False)

    def block_math(self, body: str) -> str:
        return f'<span class="formula" tabindex="0">{self.mathml(body, display=True)}</span>'

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")


class Exporter(HTMLExporter):
    """nbconvert's, with our template and our renderer."""

    def __init__(self):
        highlight = Highlight2HTML(pygments_lexer="ipython3")
        super().__init__(
            filters={"highlight_code": lambda *args, **named: PLAIN.sub(r"\1", highlight(*args, **named))},
            template_name=TEMPLATE.name,
            extra_template_basedirs=[str(TEMPLATE.parent)],
            exclude_input_prompt=True,
            exclude_output_prompt=True,
        )

    @pass_context
    def markdown2html(self, context, source: str) -> str:
        """The filter of that name: Markdown to HTML."""
        cell, name = context["cell"], context["resources"]["metadata"]["name"]
        renderer = Renderer(f"{name}, cell {cell['id']}", attachments=cell.get("attachments", {}))
        return MarkdownWithMath(renderer=renderer).render(source)


# What the text of a page still needs ---------------------------------------------------------------------


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
    """Each image comes into the page, gets a card to stand on, and its width, so that nothing moves later."""
    for image in soup.main("img"):
        path = folder / unquote(image["src"])
        if not image["src"].startswith("data:") and path.is_file():
            kind, _ = mimetypes.guess_type(path)
            image["src"] = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
        card = image.parent
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


def make_ids_unique(soup: BeautifulSoup) -> None:
    """A second heading of the same words gets a number, and its permalink with it."""
    seen: dict[str, int] = {}
    for tag in soup.main(id=True):
        name = tag["id"]
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            tag["id"] = f"{name}-{seen[name]}"
            for link in tag("a", "anchor-link"):
                link["href"] = f"#{tag['id']}"


def fill_contents(soup: BeautifulSoup) -> None:
    """List the headings of the second and third level in the page's navigation."""
    details = soup.find("nav", "toc").details
    levels = {"h2": soup.new_tag("ol")}
    for heading in soup.main(["h2", "h3"]):
        link = heading.find("a", "anchor-link")
        if link is None:
            continue
        link["aria-label"] = f"Permalink: {heading.get_text().removesuffix(link.get_text()).strip()}"
        item, entry = soup.new_tag("li"), soup.new_tag("a", href=link["href"])
        copied = BeautifulSoup(str(heading), "html.parser").find(heading.name)
        copied.find("a", "anchor-link").decompose()
        entry.extend(list(copied.contents))
        item.append(entry)
        if heading.name == "h2":
            levels["h2"].append(item)
            levels.pop("h3", None)
        else:
            if "h3" not in levels:
                levels["h3"] = soup.new_tag("ol")
                (levels["h2"].find_all("li", recursive=False) or [levels["h2"]])[-1].append(levels["h3"])
            levels["h3"].append(item)
    if levels["h2"].contents:
        details.append(levels["h2"])
    else:
        details.parent.decompose()


class Site:
    """The pages that are being made, and the files beside them."""

    def __init__(self, chapters: Sequence[Path], base: Path):
        self.base = base  # where the notebooks stand in the collection
        self.chapters = {path.stem: path for path in chapters}
        self.files: dict[str, bytes] = {}  # address -> what is in the file

    def keep(self, path: Path) -> str:
        """Put the file at ``path`` beside the pages and return its address."""
        inside = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(path.name)
        address = f"files/{inside.as_posix()}"
        self.files[address] = path.read_bytes()
        return address

    def keep_notebook(self, path: Path, notebook: nbformat.NotebookNode) -> str:
        """Put the notebook beside the pages, without the outputs that its page shows; return its address."""
        bare = deepcopy(notebook)
        for cell in bare.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        bare.metadata.pop("collection", None)
        address = f"files/{path.name}"
        self.files[address] = nbformat.writes(bare).encode()
        return address

    def address(self, href: str, folder: Path) -> str | None:
        """Where a link in a text that stands in ``folder`` leads on the site; None if nowhere."""
        target, fragment = urldefrag(href)
        path = (folder / unquote(target)).resolve()
        if path.parent == self.base and path.suffix == ".ipynb" and path.stem in self.chapters:
            target = f"{path.stem}.html"
        elif path == ROOT / "README.md":
            target = "index.html"
        elif path.is_file():
            target = self.keep(path)
        else:
            return None
        return f"{target}#{fragment}" if fragment else target


def rewrite_links(main: Tag, site: Site, folder: Path, name: str) -> None:
    """From notebook to notebook becomes from page to page; other files of the collection come along."""
    for link in main("a", href=True):
        if re.match(r"\w+:|#", link["href"]):
            continue
        address = site.address(link["href"], folder)
        if address is None:
            cell = link.find_parent(id=re.compile("^cell-id="))
            where = f"{name}, cell {cell['id'].removeprefix('cell-id=')}" if cell else name
            raise PageError(f"{where}: the link {link['href']!r} leads nowhere")
        link["href"] = address


def make_page(notebook: nbformat.NotebookNode, page: Page, site: Site, folder: Path) -> str:
    """The notebook as HTML; its relative links start in ``folder``."""
    name = Path(page.notebook).name or "README.md"
    html, _ = Exporter().from_notebook_node(notebook, {"metadata": {"name": name}, "page": page})
    soup = BeautifulSoup(html, "html.parser")
    for tag in soup.main(["script", "style", "iframe", "link"]):
        tag.decompose()
    for pre in soup.main("pre"):
        pre["tabindex"] = "0"
    finish_formulas(soup)
    frame_images(soup, folder)
    frame_tables(soup)
    make_ids_unique(soup)
    fill_contents(soup)
    rewrite_links(soup.main, site, folder, name)
    return str(soup)


# The pages -----------------------------------------------------------------------------------------------


def plain(markdown: str) -> str:
    """A line of Markdown without its marks."""
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", markdown)
    return re.sub(r"\s+", " ", re.sub(r"[*`$]", "", text)).strip()


def title_and_lead(markdown: str, default: str) -> tuple[str, str]:
    """The first heading, and the paragraph after it."""
    found = re.search(r"^# (.+)\n+((?:[^#\n].*\n?)*)", markdown + "\n", re.MULTILINE)
    return (plain(found[1]), plain(found[2])) if found else (default, "")


def made(notebook: nbformat.NotebookNode) -> str:
    """With what the outputs were made."""
    about = notebook.metadata.get("collection", {})
    if not {"date", "torch", "device"} <= about.keys():
        return ""
    with_what = f"PyTorch {about['torch']}, device {about['device']}"
    return f"The outputs on this page were made on {about['date']}: {with_what}."


def index_source(readme: str) -> str:
    """The part of the README that the index page shows: its introduction, and its map of the notebooks."""
    introduction, *sections = re.split(r"^(?=## )", readme, flags=re.MULTILINE)
    notebooks = [section for section in sections if section.startswith("## The notebooks\n")]
    return "\n".join([introduction, *notebooks])


def export(paths: Sequence[Path], folder: Path, base: Path, readme: Path = ROOT / "README.md") -> list[str]:
    """Export the notebooks at ``paths`` and an index page to ``folder``, and return the pages' names.

    Args:
        paths: the notebooks, in order.
        folder: is made anew, and left as it was if a page cannot be made.
        base: where notebooks stand in the collection: their links are read from there.
        readme: the index page is made from it.

    Raises:
        PageError: a formula does not convert, or a link leads nowhere.
    """
    site = Site(paths, base.resolve())
    text = readme.read_text(encoding="utf-8")
    book, introduction = title_and_lead(text, readme.stem)
    notebooks = [nbformat.read(path, as_version=4) for path in paths]
    sources = ["\n".join(c.source for c in n.cells if c.cell_type == "markdown") for n in notebooks]
    titles = [title_and_lead(source, path.stem) for source, path in zip(sources, paths, strict=True)]
    steps = [Neighbour("index.html", book)]
    steps += [Neighbour(f"{path.stem}.html", title) for path, (title, _) in zip(paths, titles, strict=True)]

    index = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(index_source(text), id="readme")])
    page = Page("index.html", book, introduction, book, next=steps[1] if paths else None)
    pages = {page.file: make_page(index, page, site, readme.resolve().parent)}
    for i, (path, notebook, (title, lead)) in enumerate(zip(paths, notebooks, titles, strict=True), start=1):
        page = Page(
            steps[i].file,
            title,
            lead,
            book,
            made(notebook),
            site.keep_notebook(path, notebook),
            steps[i - 1] if i > 1 else None,
            steps[i + 1] if i + 1 < len(steps) else None,
        )
        pages[page.file] = make_page(notebook, page, site, site.base)
    write(pages, site, folder)
    return list(pages)


def write(pages: dict[str, str], site: Site, folder: Path) -> None:
    """Write the site to ``folder`` whole or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, html in pages.items():
        (partial / name).write_text(html, encoding="utf-8")
    shutil.copytree(
        TEMPLATE / "fonts", partial / "fonts", ignore=shutil.ignore_patterns("*.py", "__pycache__")
    )
    for address, content in site.files.items():
        (partial / address).parent.mkdir(parents=True, exist_ok=True)
        (partial / address).write_bytes(content)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
