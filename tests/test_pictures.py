"""One picture, one look: every reward, judge, saved file and page sees the same colours."""

import io

import numpy as np
import pytest
from PIL import Image

from es_trl.evaluation.grids import contact_sheet
from es_trl.evaluation.judge import ClipJudge
from es_trl.pictures import on_white, private_copy, rgb
from es_trl.pipelines.denoising import fit
from es_trl.rewards import ClipScorer, RewardSet
from es_trl.rewards.human import Ballot, Comparison
from es_trl.rewards.remote import png_base64


def transparent(mode):
    """Red that cannot be seen: on white it is white."""
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    if mode == "P":
        picture = Image.new("P", (32, 32), 1)
        picture.putpalette([0, 0, 0, 255, 0, 0])
        picture.info["transparency"] = 1
        return picture
    if mode == "P from a file":
        file = io.BytesIO()
        clear.quantize().save(file, "PNG")
        return Image.open(io.BytesIO(file.getvalue()))
    if mode == "RGB with a transparent colour":
        file = io.BytesIO()
        Image.new("RGB", (32, 32), "red").save(file, "PNG", transparency=(255, 0, 0))
        return Image.open(io.BytesIO(file.getvalue()))
    if mode == "PA":  # Pillow 11.0 loses the transparency when it converts to it
        picture = Image.new("PA", (32, 32), (0, 0))
        picture.putpalette([255, 0, 0])
        return picture
    return clear.convert("LA").convert("La") if mode == "La" else clear.convert(mode)


MODES = ["RGBA", "LA", "La", "RGBa", "PA", "P", "P from a file", "RGB with a transparent colour"]
WHITE = Image.new("RGB", (32, 32), "white")


def bright(images):
    return [float(np.asarray(image.convert("RGB")).mean()) for image in images]


@pytest.mark.parametrize("mode", MODES)
def test_what_is_transparent_is_white_for_everybody(mode):
    clear = transparent(mode)
    assert rgb(clear).tobytes() == WHITE.tobytes() and on_white(WHITE) is WHITE
    rewards = RewardSet(["tiny-pickscore", "jpeg_incompressibility", bright])
    np.testing.assert_array_equal(rewards(["a red square"], [clear]), rewards(["a red square"], [WHITE]))
    judge = ClipJudge(ClipScorer("tiny-clip-heldout"))
    np.testing.assert_array_equal(judge.image_features([clear]), judge.image_features([WHITE]))
    assert contact_sheet([[clear]], cell=32).tobytes() == contact_sheet([[WHITE]], cell=32).tobytes()
    assert fit(clear, 16, 16).tobytes() == fit(WHITE, 16, 16).tobytes()
    assert png_base64(clear) == png_base64(WHITE)
    shown = []
    for picture in (clear, WHITE):
        ballot = Ballot()
        ballot.open([Comparison("p", (picture, picture), False)])
        shown.append(ballot.picture(ballot.round, 0, "left"))
    assert shown[0] == shown[1]


def test_half_transparent_red_is_pink():
    assert rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 128))).getpixel((0, 0)) == (255, 127, 127)
    assert rgb(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_a_private_copy_shares_nothing_that_can_change():
    value = {"a": [Image.new("RGB", (2, 2)), {"b": [np.zeros(2)]}], "c": ("x", [1])}
    copied = private_copy(value)
    copied["a"][0].putpixel((0, 0), (9, 9, 9))
    copied["a"][1]["b"][0][0] = 9
    copied["c"][1].append(2)
    assert value["a"][0].getpixel((0, 0)) == (0, 0, 0) and value["a"][1]["b"][0][0] == 0 and value["c"] == ("x", [1])
