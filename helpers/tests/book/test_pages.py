"""The exported pages: what is in them, and what a browser and axe-core say of them, offline."""

import base64
import re
import shutil
from types import SimpleNamespace

import nbformat
import pytest
from bs4 import BeautifulSoup
from fontTools.subset import parse_unicodes
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from helpers.book.pages import ROOT, TEMPLATE, PageError, export, finish, index_source, markdown2html
from helpers.book.parameters import find_notebooks

v4 = nbformat.v4
CHAPTERS = {path.stem: path for path in find_notebooks()}
NAMES = ["index", *CHAPTERS]
PNG = (  # 1 by 1 pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder with the pages of the committed notebooks."""
    folder = tmp_path_factory.mktemp("site") / "html"
    export(list(CHAPTERS.values()), folder)
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """Their HTML, by name."""
    return {name: read(site / f"{name}.html") for name in NAMES}


@pytest.fixture
def make(tmp_path):
    """A function that exports notebooks of these cells, and returns the page of the first one."""

    def make(*chapters, readme="# The book\n\nIts first paragraph.\n\n## The notebooks\n\nnone\n"):
        paths = []
        for number, cells in enumerate(chapters, start=1):
            paths.append(tmp_path / "notebooks" / f"{number:02}_chapter.ipynb")
            paths[-1].parent.mkdir(exist_ok=True)
            nbformat.write(v4.new_notebook(cells=cells), paths[-1])
        (tmp_path / "README.md").write_text(readme)
        names = export(paths, tmp_path / "html", tmp_path)
        assert names == ["index.html", *(f"{path.stem}.html" for path in paths)]
        return read(tmp_path / "html" / names[1])

    return make


def text(source, id="words"):
    return v4.new_markdown_cell(source, id=id)


def code(source="1", *outputs):
    return v4.new_code_cell(source, id="code", outputs=list(outputs))


def shown(kind, data, **metadata):
    return v4.new_output("display_data", {kind: data}, metadata={kind: metadata})


def read(path):
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


# What is in a page ---------------------------------------------------------------------------------------


def problems(page):
    """What is wrong with the HTML of a page, one line a finding."""
    found = []
    if page.html.get("lang") != "en" or not page.title.get_text(strip=True):
        found.append("no language or no title")
    levels = [int(tag.name[1]) for tag in page(re.compile("^h[1-6]$"))]
    if levels.count(1) != 1 or levels[0] != 1:
        found.append("there must be one h1, at the top")
    for before, level in zip(levels, levels[1:], strict=False):
        if level > before + 1:
            found.append(f"h{level} follows h{before}")
    ids = [tag["id"] for tag in page(id=True)]
    found += [f"id {name} stands twice" for name in sorted({i for i in ids if ids.count(i) > 1})]
    for image in page("img"):
        if len(image.get("alt", "")) < 20 or "No description" in image["alt"]:
            found.append(f"an image without alt text: {image.get('alt')!r}")
        if not image["src"].startswith("data:"):
            found.append(f"an image from elsewhere: {image['src'][:60]}")
    for table in page("table"):
        if not table("th"):
            found.append(f"a table without headers: {table.get_text(' ', strip=True)[:60]}")
    for fold in page("details"):
        if len(fold.get_text(strip=True)) <= len(fold.summary.get_text(strip=True)):
            found.append(f"nothing is folded into {fold.summary.get_text(strip=True)}")
    found += [f"there is a <{tag.name}>" for tag in page(["script", "iframe", "object", "embed"])]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_structure(pages, name):
    assert problems(pages[name]) == []


FAULTS = {
    "no language": ('lang="en"', ""),
    "one h1": ("<h1>a</h1>", ""),
    "h4 follows h2": ("<h3>", "<h4>"),
    "id x stands twice": ("<h3>", '<h3 id="x">'),
    "without alt text": ('alt="a picture of something"', ""),
    "from elsewhere": ("data:image", "https://example.org/image"),
    "without headers": ("th>", "td>"),
    "nothing is folded into s": ("f</details>", "</details>f"),
    "there is a <script>": ("</body>", "<script></script></body>"),
}
GOOD = (
    '<html lang="en"><title>t</title><body><h1>a</h1><h2 id="x">b</h2><h3>c</h3>'
    '<img src="data:image/png;base64," alt="a picture of something"><table><th>d</th></table>'
    "<details><summary>s</summary>f</details></body></html>"
)


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_fault_in_the_structure_is_found(fault):
    html = GOOD.replace(*FAULTS[fault]) if fault else GOOD
    assert (html != GOOD) == bool(fault)
    found = problems(BeautifulSoup(html, "html.parser"))
    assert [fault in line for line in found] == ([True] if fault else [])


@pytest.mark.parametrize("name", NAMES)
def test_links_and_anchors_lead_somewhere(site, pages, name):
    ids = {f"{stem}.html": {tag["id"] for tag in page(id=True)} for stem, page in pages.items()}
    links = [link["href"] for link in pages[name]("a", href=True)]
    assert len(links) > 5
    for href in links:
        if re.match(r"\w+:", href):
            assert href.startswith("https://"), href
            continue
        file, _, fragment = href.partition("#")
        file = file or f"{name}.html"
        assert (site / file).is_file(), href
        assert file.endswith(".ipynb") == (file == f"files/{name}.ipynb"), href
        assert not fragment or fragment in ids[file], href


def test_sizes(site):
    pages = {path.name: path.stat().st_size for path in site.glob("*.html")}
    assert len(pages) == len(NAMES)
    assert max(pages.values()) < 600_000, pages
    whole = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    assert whole < 8_000_000


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_formula_is_there(pages, name):
    """As many MathML formulas as TeX formulas in the notebook, and none of them empty."""
    count = 0

    class Counter(IPythonRenderer):
        def inline_math(self, body):
            nonlocal count
            count += 1
            return ""

        block_math = inline_math

    for cell in nbformat.read(CHAPTERS[name], as_version=4).cells:
        if cell.cell_type == "markdown":
            MarkdownWithMath(renderer=Counter(escape=False)).render(cell.source)
    formulas = pages[name].main("math")
    assert len(formulas) == count
    assert all(formula.get_text(strip=True) for formula in formulas)


def test_formulas_have_only_signs_of_the_font(pages):
    """The browser would take another sign from wherever it finds one, or draw a box."""
    readme = (TEMPLATE / "fonts" / "README.md").read_text(encoding="utf-8")
    ranges = re.findall(r"^MATH=(?:\$MATH,)?(\S+)", readme, re.MULTILINE)
    there = {*map(chr, parse_unicodes(",".join(ranges)))}
    signs = {sign for page in pages.values() for formula in page.main("math") for sign in formula.get_text()}
    assert len(signs) > 50 and "字" not in signs
    assert signs - there == set()


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_frame(site, pages, name):
    """Title, contents, steps, provenance, notebook."""
    page, notebook = pages[name], nbformat.read(CHAPTERS[name], as_version=4)
    assert page.title.get_text().startswith(page.h1.get_text().removesuffix("¶") + " · Convolution and")
    listed = [a["href"].removeprefix("#") for a in page.select("nav.toc a")]
    assert listed == [h["id"] for h in page.main(["h2", "h3"])] and len(listed) > 5
    assert "¶" not in page.find("nav", "toc").get_text()
    i = NAMES.index(name)
    for rel, j in (("prev", i - 1), ("next", i + 1)):
        links = {a["href"] for a in page("a", rel=rel)}
        assert links == ({f"{NAMES[j]}.html"} if 1 <= j < len(NAMES) else set())
    assert len(page.select("nav.steps a[href='index.html']")) == 2
    made, footer = notebook.metadata["collection"], page.footer.get_text()
    assert all(made[key] in footer for key in ("date", "torch", "device"))
    copy = site / page.footer.find("a", href=re.compile("ipynb$"))["href"]
    assert copy.read_bytes() == CHAPTERS[name].read_bytes()


def test_index_is_made_from_the_readme(pages):
    page, readme = pages["index"], (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.title.get_text() == page.h1.get_text().removesuffix("¶") == readme.splitlines()[0][2:]
    assert [h.get_text().removesuffix("¶") for h in page.main("h2")] == ["The notebooks"]
    assert [a["href"] for a in page.select("table a")] == [f"{name}.html" for name in CHAPTERS]
    [picture] = page.main("img")
    assert picture["alt"] in readme
    assert "one" not in index_source("# A\n\nb\n\n## One\n\none\n\n## The notebooks\n\ntwo\n\n## Three\n\n.")


def test_outputs_of_every_kind(make):
    page = make(
        [
            text("# One\n\n## Same\n\n$x$\n\n| a | b |\n| --- | --- |\n| c | $d$ |"),
            code(
                "print('<b>')",
                v4.new_output("stream", name="stdout", text="<b> \x1b[31mred\x1b[0m\n"),
                shown("text/html", "<table><tr><th>h</th></tr></table>"),
                shown("image/png", PNG, alt="a dot", width=300),
                shown("text/latex", r"$$\frac{a}{b}$$"),
                shown("text/markdown", "*slanted* $y$"),
                v4.new_output("execute_result", {"text/plain": "42"}, execution_count=1),
            ),
        ]
    )
    assert [a["href"] for a in page.select("nav.toc a")] == ["#Same"]
    assert "<b> red" in page.get_text()
    [image] = page.main("img")
    assert (image["alt"], image["width"], image.parent["class"]) == ("a dot", "300", ["figure"])
    assert len(page.main("math")) == 4 and page.main("mfrac") and page.main("em")
    assert [table.parent["class"] for table in page.main("table")] == [["table"]] * 2
    assert "42" in page.main.get_text()
    assert "made on" not in page.get_text()  # nothing is known of these outputs


def test_an_image_beside_the_text_comes_into_the_page(make, tmp_path):
    (tmp_path / "dot.png").write_bytes(base64.b64decode(PNG))
    page = make([text("# One\n\n![a dot](../dot.png)\n\n<details><summary>s</summary>\n\nf\n\n</details>")])
    assert [image["src"] for image in page.main("img")] == [f"data:image/png;base64,{PNG}"]
    assert page.main.details.get_text(strip=True) == "sf"


def test_an_image_attached_to_a_cell_comes_into_the_page(make):
    words = text("# One\n\n![a dot](attachment:dot.png)")
    words.attachments = {"dot.png": {"image/png": PNG}}
    assert [image["src"] for image in make([words]).main("img")] == [f"data:image/png;base64,{PNG}"]


def test_a_prime_is_no_superscript(make):
    page = make([text(r"# One $a' \text{it's}$")])
    assert page.main.find("mo", string="′").parent.name != "msup" and "it’s" in page.main.get_text()


@pytest.mark.parametrize("count", [1, 12])
def test_any_number_of_chapters(make, tmp_path, count):
    page = make(*[[text(f"# {i}. Title of {i}\n\nlead")] for i in range(1, count + 1)])
    assert [a.get_text() for a in page("a", rel="next")] == ["2. Title of 2 →"] * (2 if count > 1 else 0)
    assert not page.find("nav", "toc")("li")  # it has no sections
    last = read(tmp_path / "html" / f"{count:02}_chapter.html")
    assert not last("a", rel="next") and "lead" in last.main.get_text()


@pytest.mark.parametrize("tex", [r"$\nosuchcommand{x}$", r"$$\begin{aligned} a$$", "$a & b$"])
def test_a_formula_that_does_not_convert_stops_the_export(make, tex):
    with pytest.raises(PageError) as caught:
        make([text("# One\n\nfine")], [text("# Two"), text(f"Here: {tex}", id="culprit")])
    message = str(caught.value)
    assert message.startswith("02_chapter.ipynb, cell culprit: a formula does not convert: ")
    assert "\x1b" not in message


def test_links(make, tmp_path):
    (tmp_path / "data.txt").write_text("1")
    words = "[](02_chapter.ipynb#Part) [](https://x.org/y.ipynb) [](../data.txt) [](#One) [](../README.md)"
    page = make([text(f"# One\n\n{words}")], [text("# Two\n\n## Part")])
    hrefs = [a["href"] for a in page.main.p("a")]
    assert hrefs == [
        "02_chapter.html#Part", "https://x.org/y.ipynb", "files/data.txt", "#One", "index.html"
    ]  # fmt: skip
    assert (tmp_path / "html" / "files" / "data.txt").read_text() == "1"
    (tmp_path / "two words.txt").write_text("2")
    page = make([text("# One\n\n[a file](../two%20words.txt)")])
    assert page.main.p.a["href"] == "files/two%20words.txt"
    assert (tmp_path / "html" / "files" / "two words.txt").read_text() == "2"
    with pytest.raises(FileNotFoundError, match="gone.md"):
        make([text("# One\n\n[a](../gone.md)")])


# What a browser says -------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def in_browser(test):
    """Mark a test that has a browser's verdict."""
    skip = pytest.mark.skipif(BROWSER is None, reason="there is no chromium, whose verdict this test is")
    return pytest.mark.browser(skip(test))


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


def visit(browser, path):
    """Open the page at ``path`` on a narrow screen, every fold open, and note what it asks for and says."""
    page = browser.new_page(viewport={"width": 360, "height": 800}, color_scheme="light")
    requests, messages = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("requestfailed", lambda request: messages.append(f"failed: {request.url}"))
    page.on("console", lambda m: messages.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(path.as_uri())
    page.evaluate("document.fonts.ready")
    page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    return SimpleNamespace(page=page, path=path, requests=requests, messages=messages)


def requests_outside(opened):
    """What it asked for beside itself and its fonts, and what it did not get."""
    inside = (opened.path.as_uri(), (opened.path.parent / "fonts").as_uri(), "data:")
    return [url for url in opened.requests if not url.startswith(inside)] + opened.messages


def empty_formulas(opened):
    return opened.page.evaluate("""() => [...document.querySelectorAll('math')].filter(math => {
        const box = math.getBoundingClientRect();
        return box.width < 2 || box.height < 2;
    }).map(math => math.outerHTML)""")


def foreign_fonts(opened):
    """Fonts in which formulas are set, beside the one that comes with the page."""
    session = opened.page.context.new_cdp_session(opened.page)
    session.send("DOM.enable")
    session.send("CSS.enable")
    root = session.send("DOM.getDocument", {"depth": 0})["root"]["nodeId"]
    nodes = session.send("DOM.querySelectorAll", {"nodeId": root, "selector": "math"})["nodeIds"]
    fonts = {
        (font["familyName"], font["isCustomFont"])
        for node in nodes
        for font in session.send("CSS.getPlatformFontsForNode", {"nodeId": node})["fonts"]
    }
    return sorted(fonts - {("Pages Math", True)})


def raw_tex(opened):
    """TeX in the text that a reader sees, outside code."""
    return opened.page.evaluate(r"""() => {
        const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        const tex = /\$[^$]+\$|\\[a-zA-Z]{2}|\\[()[\]]/;
        for (let node; (node = walk.nextNode()); )
            if (!node.parentElement.closest('pre, code') && tex.test(node.data)) found.push(node.data.trim());
        return found;
    }""")


def too_wide(opened):
    """How many pixels wider than the screen the page is."""
    return opened.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def violations(opened, scheme):
    """What axe-core finds; in the dark the contrast alone can be different.

    Of each class of tokens in code one will do: they are most of a page, and take most of the time.
    """
    from axe_playwright_python.sync_playwright import Axe

    opened.page.evaluate("""() => {
        const opened = new Set();
        for (const token of document.querySelectorAll('pre span[class]')) {
            if (opened.has(token.className)) token.replaceWith(token.textContent);
            opened.add(token.className);
        }
        document.body.normalize();
    }""")
    only = {"runOnly": ["color-contrast"]} if scheme == "dark" else {}
    opened.page.emulate_media(color_scheme=scheme)
    result = Axe().run(opened.page, options={"resultTypes": ["violations"], **only})
    return [
        f"{found['id']} ({found['impact']}): {node['html'][:200]}"
        for found in result.response["violations"]
        for node in found["nodes"]
    ]


def cut_off_in_print(opened):
    """What is wider than the paper."""
    opened.page.emulate_media(media="print")
    opened.page.set_viewport_size({"width": 672, "height": 900})  # what A4 leaves between the margins
    return opened.page.evaluate("""() => [...document.querySelectorAll('main *')]
        .filter(tag => tag.getBoundingClientRect().right > 673).map(tag => tag.outerHTML.slice(0, 120))""")


CHECKS = {
    "requests and messages": requests_outside,
    "formulas without a box": empty_formulas,
    "formulas in another font": foreign_fonts,
    "visible TeX": raw_tex,
    "wider than a phone": lambda opened: [width] if (width := too_wide(opened)) else [],
    "axe, light": lambda opened: violations(opened, "light"),
    "axe, dark": lambda opened: violations(opened, "dark"),
    "cut off in print": cut_off_in_print,
}


@in_browser
@pytest.mark.parametrize("name", NAMES)
def test_a_browser_finds_nothing(site, browser, name):
    opened = visit(browser, site / f"{name}.html")
    assert {check: found for check in CHECKS if (found := CHECKS[check](opened))} == {}
    assert any("fonts/text.woff2" in url for url in opened.requests)
    opened.page.close()


@in_browser
def test_light_and_dark_are_the_readers_choice(site, browser):
    page = browser.new_page(color_scheme="dark")
    page.goto((site / "index.html").as_uri())
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(paper)
    page.emulate_media(color_scheme="dark", media="print")
    assert len({dark, light}) == 2 and page.evaluate(paper) == light
    card = page.evaluate("getComputedStyle(document.querySelector('.figure')).backgroundColor")
    assert card == "rgb(255, 255, 255)"
    page.close()


@in_browser
def test_faults_are_found(make, tmp_path, browser):
    """Every check of this section says something about a page that has all faults."""
    make([text("# One\n\n$x$ and `$in code$`"), code("x = 1  # why")])
    path = tmp_path / "html" / "01_chapter.html"
    opened = visit(browser, path)
    assert [name for name, check in CHECKS.items() if check(opened)] == []
    opened.page.close()

    page = path.read_text()
    page = re.sub("<meta http-equiv[^>]*>", "", page)  # which would stop the first of them
    faults = (
        '<img src="https://example.invalid/x.png" alt="an image"><math></math>'
        '<math style="font-family: monospace"><mi>a</mi></math>'
        r"<p>$\alpha$</p><div style='width: 700px'>wide</div>"
        "<style>.c1 { color: #777 !important }</style>"
    )
    path.write_text(page.replace("</main>", faults + "</main>"))
    opened = visit(browser, path)
    assert [name for name, check in CHECKS.items() if check(opened)] == list(CHECKS)
    opened.page.close()


@in_browser
def test_a_page_cannot_ask_for_more(make, tmp_path, browser):
    """Whatever an output holds: the page's own policy stops it."""
    image = '<img src="https://example.invalid/x.png" alt="a picture from elsewhere" onerror="alert(1)">'
    make([text("# One"), code("1", shown("text/html", image))])
    opened = visit(browser, tmp_path / "html" / "01_chapter.html")
    assert not [
        url for url in opened.requests if "example.invalid" in url and "failed: " + url not in opened.messages
    ]
    assert any("Content Security Policy" in message for message in opened.messages)
    opened.page.close()


@pytest.mark.parametrize(
    "source, together",
    [("Of $x$, and $y$ (or $z$).", ["x,", "z)."]), ("**$x$**: $y$'s, $y$ 's", ["x:", "y's"])],
)
def test_a_sign_behind_a_formula_does_not_begin_a_line(source, together):
    context = {"cell": {"id": "a"}, "resources": {"metadata": {"name": "page"}}}
    shown = BeautifulSoup(markdown2html(context, source), "html.parser")
    assert [span.text for span in shown.select(".together")] == together


@pytest.mark.parametrize(
    "source, shown",
    [
        ("5 % of 3 MiB, 5 on <code>5 % 2</code>", "5\u00a0% of 3\u00a0MiB, 5 on 5 % 2"),
        ("PyTorch's<!-- 5's --> \"input\", not <code>f'\"x\"'</code>", "PyTorch’s “input”, not f'\"x\"'"),
    ],
)
def test_typography(source, shown):
    soup = BeautifulSoup(f"<nav class='toc'><ol></ol></nav><main>{source}</main>", "html.parser")
    finish(soup)
    assert soup.main.text == shown  # comments apart
