"""Contact sheets: every picture is there, in its place, and no text leaves its box."""

import pytest
from PIL import Image

from es_trl.evaluation.grids import before_after, contact_sheet, font, member_strip, wrap


COLOURS = [(220, 30, 30), (30, 160, 60), (30, 60, 200), (240, 180, 20), (120, 30, 160), (20, 170, 190)]


def tile(colour, size=(16, 16)):
    return Image.new("RGB", size, colour)


def colours_in_order(sheet):
    """The tile colours met when reading the sheet line by line."""
    met = []
    pixels = sheet.load()
    for y in range(0, sheet.height, 4):
        for x in range(0, sheet.width, 4):
            if pixels[x, y] in COLOURS and pixels[x, y] not in met:
                met.append(pixels[x, y])
    return met


def test_pictures_stand_in_reading_order():
    images = [[tile(colour) for colour in COLOURS[:3]], [tile(colour) for colour in COLOURS[3:]]]
    sheet = contact_sheet(images, ["first", "second"], ["a", "b", "c"], title="title", note="note", cell=64)
    assert colours_in_order(sheet) == COLOURS
    assert sheet.getpixel((0, 0)) == (255, 255, 255)


def test_before_after_has_a_row_per_model_and_a_column_per_prompt():
    sheet = before_after(
        {"base": [tile(c) for c in COLOURS[:2]], "adapter": [tile(c) for c in COLOURS[2:4]]}, ["x", "y"]
    )
    assert colours_in_order(sheet) == COLOURS[:4]
    assert sheet.width > sheet.height - 100


def test_members_are_labelled_and_kept_in_order():
    members = [
        ("best", 0.9, [tile(COLOURS[0])]),
        ("median", 0.5, [tile(COLOURS[1])]),
        ("worst", 0.1, [tile(COLOURS[2])]),
    ]
    assert colours_in_order(member_strip(members, ["a prompt"], title="step 3")) == COLOURS[:3]


def test_sheet_grows_with_its_text_and_nothing_is_cut():
    images = [[tile(COLOURS[0])]]
    plain, captioned = contact_sheet(images), contact_sheet(images, ["a caption"], ["a header of several words"])
    assert captioned.width > plain.width and captioned.height > plain.height


@pytest.mark.parametrize(
    "text",
    [
        "",
        "short",
        "word " * 400,
        "x" * 5000,
        "two\nlines\tand\0a null",
        "<img onerror=alert(1)> {{7*7}}",
        "\u202eright",
    ],
)
def test_wrapped_text_stays_in_its_box(text):
    lines = wrap(text, font(14), 150, 4)
    assert 1 <= len(lines) <= 4
    assert all(font(14).getlength(line) <= 150 for line in lines)
    assert not any(ord(letter) < 32 or letter == "\u202e" for line in lines for letter in line)


def test_text_that_does_not_fit_ends_in_an_ellipsis():
    assert wrap("word " * 50, font(14), 150, 2)[-1].endswith("...")
    assert wrap("a red cat", font(14), 150, 2) == ["a red cat"]


def test_upright_and_wide_pictures_keep_their_shape():
    sheet = contact_sheet([[tile(COLOURS[0], (10, 20)), tile(COLOURS[1], (20, 10))]], cell=100)
    width = [x for x in range(sheet.width) if sheet.getpixel((x, sheet.height // 2)) == COLOURS[0]]
    assert 46 <= len(width) <= 52


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"images": []}, "rows of one length"),
        ({"images": [[tile(COLOURS[0])], []]}, "rows of one length"),
        ({"images": [[tile(COLOURS[0])]], "row_captions": ["a", "b"]}, "row_captions has 2 entries; give 1"),
        ({"images": [[tile(COLOURS[0])]], "upscale": "cubic"}, "upscale is 'cubic'"),
    ],
)
def test_wrong_tables_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(**arguments)
