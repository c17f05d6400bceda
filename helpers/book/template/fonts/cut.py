"""Cut the pages' fonts from TeX Gyre Pagella: the characters that pages use, under names of their own.

    pip install fonttools brotli
    python helpers/book/template/fonts/cut.py FOLDER

FOLDER holds texgyrepagella-{regular,italic,bold}.otf and texgyrepagella-math.otf. See README.md here.
"""

import sys
from pathlib import Path

from fontTools import subset

TEXT = [
    *[(0x20, 0x7E), (0xA0, 0xFF), (0x131, 0x131), (0x152, 0x153), (0x160, 0x161), (0x391, 0x3C9)],
    *[(0x2010, 0x2026), (0x2030, 0x2033), (0x2039, 0x203A), (0x2044, 0x2044), (0x20AC, 0x20AC)],
    *[(0x2122, 0x2122), (0x2190, 0x2193), (0x2212, 0x2212), (0x2248, 0x2248), (0x2260, 0x2265)],
    (0xFB01, 0xFB02),
]
MATH = [
    *[(0x20, 0x7E), (0xA0, 0xFF), (0x131, 0x131), (0x237, 0x237), (0x2C6, 0x2C7), (0x2D8, 0x2DD)],
    *[(0x300, 0x30C), (0x332, 0x333), (0x338, 0x338), (0x391, 0x3F6), (0x2010, 0x2026), (0x2032, 0x2035)],
    *[(0x2044, 0x2044), (0x2061, 0x2063), (0x20D0, 0x20E1), (0x2100, 0x214F), (0x2190, 0x21D5)],
    *[(0x2200, 0x22FF), (0x2308, 0x230B), (0x23B4, 0x23B5), (0x23DC, 0x23E1), (0x27E6, 0x27FF)],
    *[(0x2A00, 0x2A0C), (0x2A7D, 0x2A7E), (0xFE00, 0xFE00)],
    # Of the mathematical alphabets: bold, italic, script, sans serif; Greek in bold and italic; digits.
    *[(0x1D400, 0x1D467), (0x1D49C, 0x1D4CF), (0x1D5A0, 0x1D5D3), (0x1D6A4, 0x1D71B), (0x1D7CC, 0x1D7E1)],
]
FONTS = {
    "text": ("texgyrepagella-regular.otf", "Pages Text", TEXT, ["kern", "liga", "locl", "lnum", "tnum"]),
    "italic": ("texgyrepagella-italic.otf", "Pages Text Italic", TEXT, ["kern", "liga", "locl"]),
    "bold": ("texgyrepagella-bold.otf", "Pages Text Bold", TEXT, ["kern", "liga", "locl", "lnum", "tnum"]),
    "math": ("texgyrepagella-math.otf", "Pages Math", MATH, ["ssty"]),
}


def cut(source: Path, target: Path, name: str, ranges: list[tuple[int, int]], features: list[str]) -> None:
    options = subset.Options(flavor="woff2", layout_features=features, hinting=False, notdef_outline=True)
    options.name_IDs = [0, 1, 2, 4, 6, 13]
    font = subset.load_font(source, options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=[code for first, last in ranges for code in range(first, last + 1)])
    subsetter.subset(font)
    for record in font["name"].names:
        if record.nameID in (1, 4, 6):
            record.string = name.replace(" ", "") if record.nameID == 6 else name
    font["CFF "].cff.fontNames = [name.replace(" ", "")]
    subset.save_font(font, target, options)
    print(f"{target.name}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    for stem, (file, name, ranges, features) in FONTS.items():
        cut(Path(sys.argv[1]) / file, Path(__file__).with_name(f"{stem}.woff2"), name, ranges, features)
