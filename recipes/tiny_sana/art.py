"""Extract the art of the small model's world from two npm packages: 48 objects in 3 styles, at most 112 pixels wide.

The pictures are vendored in `art/`, so nobody needs to run this to render the data set. To run it again:

    npm pack emoji-datasource-google@16.0.0 && npm pack fluentui-emoji@1.3.0   # unpack each into a folder
    python recipes/tiny_sana/art.py --noto noto/package --fluent fluent/package
"""

import argparse
import io
import json
from pathlib import Path

from PIL import Image


SIDE = 112
STYLES = ("noto", "flat", "modern")

# our word: (short name in emoji.json, file name in fluentui-emoji); None means the same word.
SOURCES: dict[str, tuple[str | None, str | None]] = {
    "airplane": (None, None), "apple": (None, "red-apple"), "balloon": (None, None), "banana": (None, None),
    "bell": (None, None), "bicycle": ("bike", None), "boat": ("boat", "sailboat"), "burger": ("hamburger",) * 2,
    "bus": (None, None), "butterfly": (None, None), "cactus": (None, None), "cake": ("birthday", "birthday-cake"),
    "car": ("car", "automobile"), "carrot": (None, None), "cat": (None, "cat-face"), "cherry": ("cherries",) * 2,
    "cloud": (None, None), "crown": (None, None), "dog": (None, "dog-face"), "fire": (None, None),
    "fish": ("tropical_fish", "tropical-fish"), "fox": ("fox_face", None), "frog": (None, None), "ghost": (None, None),
    "gift": (None, "wrapped-gift"), "guitar": (None, None), "hat": ("tophat", "top-hat"), "heart": (None, "red-heart"),
    "house": (None, None), "key": (None, None), "lemon": (None, None), "moon": ("crescent_moon", "crescent-moon"),
    "mushroom": (None, None), "octopus": (None, None), "panda": ("panda_face", None), "penguin": (None, None),
    "pig": (None, "pig-face"), "pizza": (None, None), "rocket": (None, None), "shirt": (None, "t-shirt"),
    "snail": (None, None), "star": (None, None), "strawberry": (None, None),
    "tree": ("deciduous_tree", "deciduous-tree"), "tulip": (None, None), "turtle": (None, None),
    "umbrella": (None, None), "whale": (None, "spouting-whale"),
}  # fmt: skip


def trim(image: Image.Image) -> Image.Image:
    """Crop an RGBA picture to what is visible (alpha above 8 of 255)."""
    box = image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    return image.crop(box)


def rasterise(svg: str, side: int) -> Image.Image:
    """Draw an SVG so that its longer side has `side` pixels, as RGBA."""
    import resvg_py

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side)))).convert("RGBA")


def extract(noto: Path, fluent: Path, out: Path) -> None:
    """Write `out/<style>/<object>.png` for every object and style."""
    files = {
        name: entry["image"]
        for entry in json.loads((noto / "emoji.json").read_text())
        for name in entry["short_names"]
    }
    for word, (noto_name, fluent_name) in SOURCES.items():
        pictures = {"noto": Image.open(noto / "img/google/64" / files[noto_name or word]).convert("RGBA")}
        for style in ("flat", "modern"):
            pictures[style] = rasterise((fluent / "icons" / style / f"{fluent_name or word}.svg").read_text(), 128)
        for style, picture in pictures.items():
            picture = trim(picture)
            picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            path = out / style / f"{word}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noto", type=Path, required=True, help="unpacked emoji-datasource-google 16.0.0")
    parser.add_argument("--fluent", type=Path, required=True, help="unpacked fluentui-emoji 1.3.0")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "art", help="where the PNGs go")
    args = parser.parse_args()
    extract(args.noto, args.fluent, args.out)


if __name__ == "__main__":
    main()
