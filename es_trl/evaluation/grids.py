"""Pictures of pictures: contact sheets with captions, for run folders, model cards and trackers."""

import bisect
import functools
import unicodedata
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ..pictures import rgb


INK, MUTED, PAPER, EDGE = (24, 24, 27), (107, 114, 128), (255, 255, 255), (229, 231, 235)
_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}


@functools.lru_cache(maxsize=32)
def font(size: int, bold: bool = False) -> ImageFont.ImageFont:
    """DejaVu Sans, which matplotlib ships and which knows most alphabets, at `size` pixels."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", size)


def contact_sheet(
    images: Sequence[Sequence[Image.Image]],
    row_captions: Sequence[str] | None = None,
    column_headers: Sequence[str] | None = None,
    title: str | None = None,
    note: str | None = None,
    cell: int = 192,
    upscale: str = "lanczos",
    bold: str = "columns",
) -> Image.Image:
    """
    Lays pictures out as a table on white.

    Args:
        images (`Sequence[Sequence[PIL.Image.Image]]`): Rows of pictures, all rows of one length.
        row_captions (`Sequence[str]`, *optional*): One per row, wrapped, left of the pictures.
        column_headers (`Sequence[str]`, *optional*): One per column, wrapped, above the pictures.
        title, note (`str`, *optional*): A line above and a line below the table.
        cell (`int`, *optional*, defaults to 192): Pixels of a picture's longer side on the sheet.
        upscale (`str`, *optional*, defaults to `"lanczos"`): How small pictures are enlarged; `"nearest"` keeps their
            pixels visible.
        bold (`str`, *optional*, defaults to `"columns"`): Whether the `"columns"` or the `"rows"` carry the labels in
            bold; prompts read better in regular weight.

    Raises:
        ValueError: No pictures, rows of unequal length, or captions that do not match.
    """
    images = [list(row) for row in images]
    columns = len(images[0]) if images else 0
    if not columns or any(len(row) != columns for row in images):
        raise ValueError(f"a contact sheet needs rows of one length; got {[len(row) for row in images]}.")
    labels = {"row_captions": (row_captions, len(images)), "column_headers": (column_headers, columns)}
    for field, (texts, count) in labels.items():
        if texts is not None and len(texts) != count:
            raise ValueError(f"{field} has {len(texts)} entries; give {count}.")
    if upscale not in _FILTERS:
        raise ValueError(f"upscale is {upscale!r}; give one of {', '.join(_FILTERS)}.")

    small, gap, margin = max(12, cell // 13), max(6, cell // 24), max(16, cell // 8)
    caption_font, header_font = font(small, bold=bold == "rows"), font(small, bold=bold == "columns")
    title_font, note_font = font(round(small * 1.35), bold=True), font(small)
    tiles = [[_fit(image, cell, _FILTERS[upscale]) for image in row] for row in images]
    width, height = max(t.width for row in tiles for t in row), max(t.height for row in tiles for t in row)

    captions = [wrap(text, caption_font, cell, max(1, height // (small + 5))) for text in row_captions or []]
    headers = [wrap(text, header_font, width, 4) for text in column_headers or []]
    longest = max((caption_font.getlength(line) for lines in captions for line in lines), default=0)
    left = margin + (round(longest) + 2 * gap if captions else 0)
    table_width = columns * width + (columns - 1) * gap
    title_lines = wrap(title, title_font, left - margin + table_width, 2) if title else []
    note_lines = wrap(note, note_font, left - margin + table_width, 3) if note else []
    top = margin + _block(title_lines, title_font) + (gap if title_lines else 0)
    top += max((_block(lines, header_font) for lines in headers), default=0) + (gap if headers else 0)
    bottom = top + len(tiles) * height + (len(tiles) - 1) * gap
    full_height = bottom + margin + (_block(note_lines, note_font) + gap if note_lines else 0)

    sheet = Image.new("RGB", (left + table_width + margin, full_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, title_lines, title_font, margin, margin, INK)
    for column, lines in enumerate(headers):
        x = left + column * (width + gap) + width / 2
        _write(draw, lines, header_font, x, top - gap - _block(lines, header_font), INK, "ma")
    for row, tiles_of_row in enumerate(tiles):
        y = top + row * (height + gap)
        if captions:
            lines = captions[row]
            _write(draw, lines, caption_font, margin, y + (height - _block(lines, caption_font)) / 2, INK)
        for column, tile in enumerate(tiles_of_row):
            x = left + column * (width + gap)
            sheet.paste(tile, (x + (width - tile.width) // 2, y + (height - tile.height) // 2))
            draw.rectangle((x, y, x + width - 1, y + height - 1), outline=EDGE)
    _write(draw, note_lines, note_font, margin, bottom + gap + margin // 2, MUTED)
    return sheet


def before_after(
    images: dict[str, Sequence[Image.Image]],
    prompts: Sequence[str],
    title: str | None = None,
    note: str | None = None,
    cell: int = 192,
    upscale: str = "lanczos",
) -> Image.Image:
    """
    The same prompts and noise under several models: one row per model, one column per prompt.

    Args:
        images (`dict[str, Sequence[PIL.Image.Image]]`): Pictures by row label, such as "base, 1 step", one per prompt.
        prompts (`Sequence[str]`): The prompts, above the columns.
        title, note, cell, upscale: As in [`contact_sheet`].
    """
    return contact_sheet(list(images.values()), list(images), prompts, title, note, cell, upscale, bold="rows")


def member_strip(
    members: Sequence[tuple[str, float, Sequence[Image.Image]]],
    prompts: Sequence[str] | None = None,
    title: str | None = None,
    cell: int = 128,
    upscale: str = "lanczos",
) -> Image.Image:
    """
    Pictures of a few members of a population on one step's prompts, which stand above the columns. Of each member:
    label ("best", "median", "worst"), reward, and its pictures, one per prompt. The rest is as in [`contact_sheet`].
    """
    captions = [f"{label}  {reward:.3f}" for label, reward, _ in members]
    pictures = [pictures for _, _, pictures in members]
    return contact_sheet(pictures, captions, prompts, title, None, cell, upscale, bold="rows")


def tiles(rows: list[list[Image.Image]], longest: int = 256) -> Image.Image:
    """Pictures edge to edge without any text, so that a page can cut them apart again."""
    width, height = rows[0][0].size
    scale = min(1.0, longest / max(width, height))
    width, height = round(width * scale), round(height * scale)
    page = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            page.paste(rgb(image).resize((width, height)), (x * width, y * height))
    return page


def wrap(text: str, face: ImageFont.ImageFont, width: float, lines: int) -> list[str]:
    """Breaks `text` into at most `lines` lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    text = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in text[:1000])
    broken, line = [], ""
    for word in text.split():
        if line and face.getlength(f"{line} {word}") > width:
            broken.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while face.getlength(line) > width and len(line) > 1:  # a word longer than a line
            cut = max(1, bisect.bisect_right(range(len(line)), width, key=lambda i: face.getlength(line[:i])) - 1)
            broken.append(line[:cut])
            line = line[cut:]
        if len(broken) > lines:
            break
    broken.append(line)
    if len(broken) > lines:
        last = broken[lines - 1]
        while last and face.getlength(f"{last}...") > width:
            last = last[:-1]
        broken = [*broken[: lines - 1], f"{last.rstrip()}..."]
    return broken


def _fit(image: Image.Image, cell: int, upscale: Image.Resampling) -> Image.Image:
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return rgb(image).resize(size, upscale if scale > 1 else Image.Resampling.LANCZOS)


def _line_height(face: ImageFont.ImageFont) -> int:
    return round(face.size * 1.3)


def _block(lines: Sequence[str], face: ImageFont.ImageFont) -> int:
    return len(lines) * _line_height(face)


def _write(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[str],
    face: ImageFont.ImageFont,
    x: float,
    y: float,
    colour: tuple[int, int, int],
    anchor: str = "la",
) -> None:
    for i, line in enumerate(lines):
        draw.text((x, y + i * _line_height(face)), line, font=face, fill=colour, anchor=anchor)
