"""Cut the pages' fonts from TeX Gyre Pagella: the characters that pages use, under names of their own.

    pip install fonttools brotli
    python helpers/book/template/fonts/cut.py FOLDER

FOLDER holds texgyrepagella-{regular,italic,bold}.otf and texgyrepagella-math.otf. See README.md here.
"""

import sys
from pathlib import Path

from fontTools import subset

TEXT = (
    "20-7E A0-FF 131 152-153 160-161 391-3C9 2010-2026 2030-2033 2039-203A 2044 20AC 2122 2190-2193 "
    "2212 2248 2260-2265 FB01-FB02"
)
MATH = (
    "20-7E A0-FF 131 237 2C6-2C7 2D8-2DD 300-30C 332-333 338 391-3F6 2010-2026 2032-2035 2044 "
    "2061-2063 20D0-20E1 2100-214F 2190-21D5 2200-22FF 2308-230B 23B4-23B5 23DC-23E1 27E6-27FF "
    "2A00-2A0C 2A7D-2A7E FE00 "
    # Of the mathematical alphabets: bold, italic, script, sans serif; Greek in bold and italic; digits.
    "1D400-1D467 1D49C-1D4CF 1D5A0-1D5D3 1D6A4-1D71B 1D7CC-1D7E1"
)
FONTS = {
    "text": ("texgyrepagella-regular.otf", "Pages Text", TEXT, ["kern", "liga", "locl", "lnum", "tnum"]),
    "italic": ("texgyrepagella-italic.otf", "Pages Text Italic", TEXT, ["kern", "liga", "locl"]),
    "bold": ("texgyrepagella-bold.otf", "Pages Text Bold", TEXT, ["kern", "liga", "locl", "lnum", "tnum"]),
    "math": ("texgyrepagella-math.otf", "Pages Math", MATH, ["ssty"]),
}


def cut(source: Path, target: Path, name: str, characters: str, features: list[str]) -> None:
    options = subset.Options(flavor="woff2", layout_features=features, hinting=False, notdef_outline=True)
    options.name_IDs = [0, 1, 2, 4, 6, 13]
    font = subset.load_font(source, options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=subset.parse_unicodes(characters))
    subsetter.subset(font)
    for record in font["name"].names:
        if record.nameID in (1, 4, 6):
            record.string = name.replace(" ", "") if record.nameID == 6 else name
    font["CFF "].cff.fontNames = [name.replace(" ", "")]
    subset.save_font(font, target, options)
    print(f"{target.name}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    for stem, (file, *how) in FONTS.items():
        cut(Path(sys.argv[1]) / file, Path(__file__).with_name(f"{stem}.woff2"), *how)
