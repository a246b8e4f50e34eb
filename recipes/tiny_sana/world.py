"""The world of the small model: a grammar of prompts, a numpy renderer, a held-out rule and hard negatives.

Everything is a pure function of a seed. A scene is one of

    single   "a red cat"                       count   "three green cakes"
    and      "a frog and a pink dog"           left    "a frog left of a pink dog"    above  "a frog above a pink dog"

each optionally followed by "on a blue background" (no such words: the background is white). An object without a colour
word keeps its natural colours. The drawing style (Noto, Fluent flat, Fluent modern) is never named in the prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import numpy as np
from PIL import Image


ART = Path(__file__).parent / "art"
SIZE = 64
STYLES = ("noto", "flat", "modern")
OBJECTS = tuple(
    "airplane apple balloon banana bell bicycle boat burger bus butterfly cactus cake car carrot cat cherry cloud "
    "crown dog fire fish fox frog ghost gift guitar hat heart house key lemon moon mushroom octopus panda penguin "
    "pig pizza rocket shirt snail star strawberry tree tulip turtle umbrella whale".split()
)
# Colour word: (shadow, middle, light), RGB in 0-255. A tint maps the luminance of the art through these three points.
COLORS = {
    "blue": ((12, 36, 110), (40, 100, 230), (150, 195, 255)),
    "gray": ((40, 42, 46), (128, 130, 134), (205, 207, 210)),
    "green": ((8, 64, 24), (44, 160, 64), (150, 225, 150)),
    "orange": ((120, 48, 0), (245, 135, 20), (255, 205, 130)),
    "pink": ((140, 30, 90), (250, 120, 185), (255, 200, 228)),
    "purple": ((48, 12, 92), (125, 50, 190), (200, 155, 240)),
    "red": ((90, 4, 12), (220, 38, 45), (255, 150, 145)),
    "yellow": ((130, 90, 0), (250, 212, 30), (255, 242, 160)),
}
BACKGROUNDS = {
    "black": (20, 20, 22), "blue": (150, 200, 255), "gray": (192, 192, 196), "green": (160, 226, 165),
    "pink": (255, 200, 222), "purple": (206, 184, 236), "white": (255, 255, 255), "yellow": (255, 236, 140),
}  # fmt: skip
NUMBERS = {"two": 2, "three": 3, "four": 4}
IRREGULAR = {"butterfly": "butterflies", "cherry": "cherries", "strawberry": "strawberries", "fish": "fish"}
PLURALS = {name: IRREGULAR.get(name, name + ("es" if name.endswith(("s", "x")) else "s")) for name in OBJECTS}
SINGULARS = {plural: name for name, plural in PLURALS.items()}
PAIR_LAYOUTS = ("and", "left", "above")
JOIN = {"and": "and", "left": "left of", "above": "above"}


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a prompt says: `layout`, one or two (object, colour or None), how many, the named background or None."""

    layout: str
    things: tuple[tuple[str, str | None], ...]
    count: int = 1
    background: str | None = None

    @property
    def prompt(self) -> str:
        if self.layout == "count":
            (name, color), number = self.things[0], {v: k for k, v in NUMBERS.items()}[self.count]
            text = " ".join(word for word in (number, color, PLURALS[name]) if word)
        else:
            text = f" {JOIN.get(self.layout, '')} ".join(_with_article(color, name) for name, color in self.things)
        return text + (f" on a {self.background} background" if self.background else "")


def _with_article(color: str | None, name: str) -> str:
    text = f"{color} {name}" if color else name
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def vocabulary() -> list[str]:
    """Every word of the grammar, sorted; special tokens not included."""
    words = set(OBJECTS) | set(PLURALS.values()) | set(COLORS) | set(BACKGROUNDS) | set(NUMBERS)
    return sorted(words | {"a", "an", "one", "and", "left", "of", "above", "on", "background"})


def parse(prompt: str) -> Scene:
    """The scene of a prompt of this grammar; ValueError for anything else."""
    match = re.fullmatch(r"(.+?)(?: on a (\w+) background)?", prompt)
    body, background = match.groups()
    for layout in ("left", "above", "and"):
        parts = body.split(f" {JOIN[layout]} ")
        if len(parts) == 2:
            scene = Scene(layout, tuple(_parse_thing(part.split()[1:]) for part in parts), 1, background)
            break
    else:
        number, *words = body.split()
        count = NUMBERS.get(number, 1)
        thing = _parse_thing(words if count == 1 else [*words[:-1], SINGULARS.get(words[-1], "")])
        scene = Scene("single" if count == 1 else "count", (thing,), count, background)
    if scene.prompt != prompt:
        raise ValueError(f"{prompt!r} is not a prompt of this grammar; the nearest is {scene.prompt!r}.")
    return scene


def _parse_thing(words: list[str]) -> tuple[str, str | None]:
    *color, name = words
    if name not in OBJECTS or len(color) > 1 or (color and color[0] not in COLORS):
        raise ValueError(f"{' '.join(words)!r} is not an object of this grammar.")
    return name, color[0] if color else None


# ---------------------------------------------------------------------------------------------------------------------
# Held-out rule
# ---------------------------------------------------------------------------------------------------------------------


def held_out_color(name: str, color: str | None) -> bool:
    """One colour of every object is never shown in training: 48 of 384 pairs, six of every colour."""
    index = OBJECTS.index(name)
    return color is not None and list(COLORS).index(color) == (3 * index + index // 8) % 8


def held_out_pair(first: str, second: str) -> bool:
    """About a sixth of the object pairs never meet in training (192 of 1128)."""
    return (OBJECTS.index(first) + OBJECTS.index(second)) % 6 == 1 and first != second


def held_out(scene: Scene) -> bool:
    """True when the scene holds a combination that no training picture or training caption holds."""
    if any(held_out_color(*thing) for thing in scene.things):
        return True
    return len(scene.things) == 2 and held_out_pair(scene.things[0][0], scene.things[1][0])


# ---------------------------------------------------------------------------------------------------------------------
# Scenes
# ---------------------------------------------------------------------------------------------------------------------


def sample_scene(rng: np.random.Generator, unseen: bool = False) -> Scene:
    """A random scene from the training combinations, or (`unseen`) one with a held-out combination in it."""
    kind = rng.choice(("single", "pair", "count"), p=(0.4, 0.4, 0.2))
    while True:
        layout = str(rng.choice(PAIR_LAYOUTS)) if kind == "pair" else str(kind)
        names = rng.choice(len(OBJECTS), 2 if kind == "pair" else 1, replace=False)
        background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.5 else None
        colors = [c for c in COLORS if c != (background or "white")]
        things = tuple((OBJECTS[i], str(rng.choice(colors)) if rng.random() < 0.7 else None) for i in names)
        scene = Scene(layout, things, int(rng.integers(2, 5)) if kind == "count" else 1, background)
        if held_out(scene) == unseen:
            return scene


def hard_negatives(scene: Scene, rng: np.random.Generator, n: int, allow_held_out: bool = True) -> list[str]:
    """Up to n distinct prompts that differ from the scene in one respect and are false of its pictures.

    The kinds (swap of colours or objects, changed colour, object, background, count, relation) take turns, so that few
    negatives still cover many kinds. With `allow_held_out=False` captions with held-out combinations are left out.
    """
    kinds = [kind for kind in (_swaps(scene), _recolored(scene), _replaced(scene, rng), _rebackgrounded(scene),
                               _recounted(scene), _rerelated(scene)) if kind]  # fmt: skip
    order = [[kind[i] for i in rng.permutation(len(kind))] for kind in (kinds[i] for i in rng.permutation(len(kinds)))]
    found: list[str] = []
    while len(found) < n and any(order):
        for kind in order:
            if kind and len(found) < n:
                other = kind.pop()
                if other.prompt not in found and (allow_held_out or not held_out(other)):
                    found.append(other.prompt)
    return found


def _swaps(scene: Scene) -> list[Scene]:
    if len(scene.things) == 1:
        return []
    (a, ca), (b, cb) = scene.things
    swapped = [dataclasses.replace(scene, things=((a, cb), (b, ca)))] if ca != cb else []
    if scene.layout != "and":
        swapped.append(dataclasses.replace(scene, things=((b, cb), (a, ca))))
    return swapped


def _with_thing(scene: Scene, index: int, thing: tuple[str, str | None]) -> Scene:
    return dataclasses.replace(scene, things=scene.things[:index] + (thing,) + scene.things[index + 1 :])


def _recolored(scene: Scene) -> list[Scene]:
    return [
        _with_thing(scene, i, (name, other))
        for i, (name, color) in enumerate(scene.things)
        for other in COLORS
        if color is not None and other not in (color, scene.background)
    ]


def _replaced(scene: Scene, rng: np.random.Generator) -> list[Scene]:
    present = {name for name, _ in scene.things}
    others = [name for name in OBJECTS if name not in present]
    return [
        _with_thing(scene, i, (str(other), color))
        for i, (_, color) in enumerate(scene.things)
        for other in rng.choice(others, 6, replace=False)
    ]


def _rebackgrounded(scene: Scene) -> list[Scene]:
    colors = {color for _, color in scene.things}
    shown = scene.background or "white"
    return [
        dataclasses.replace(scene, background=other) for other in BACKGROUNDS if other != shown and other not in colors
    ]


def _recounted(scene: Scene) -> list[Scene]:
    if len(scene.things) == 2:
        return []
    counts = [count for count in (1, 2, 3, 4) if count != scene.count]
    return [dataclasses.replace(scene, layout="single" if count == 1 else "count", count=count) for count in counts]


def _rerelated(scene: Scene) -> list[Scene]:
    if scene.layout not in ("left", "above"):
        return []
    return [dataclasses.replace(scene, layout="above" if scene.layout == "left" else "left")]


# ---------------------------------------------------------------------------------------------------------------------
# Renderer
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def _art(style: str, name: str) -> Image.Image:
    return Image.open(ART / style / f"{name}.png").convert("RGBA")


@functools.cache
def _sprite(style: str, name: str, color: str | None, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Premultiplied colours (h, w, 3) in 0-255 and one minus alpha (h, w, 1), longer side `side`, both float32."""
    art = _art(style, name)
    scale = side / max(art.size)
    art = art.resize([max(1, round(edge * scale)) for edge in art.size], Image.Resampling.LANCZOS)
    pixels = np.asarray(art, dtype=np.float32)
    rgb, alpha = pixels[..., :3], pixels[..., 3:] / 255
    if color is not None:
        light = rgb @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        seen = light[alpha[..., 0] > 0.5]
        low, high = np.percentile(seen, 2), np.percentile(seen, 98)
        # Stretch mildly: flat one-tone art sits near the middle colour, shaded art spans shadow to light.
        middle, spread = np.median(seen), max(high - low, 90.0)
        level = np.clip(0.5 + (light - middle) / spread * 0.8, 0, 1)
        rgb = np.stack(
            [np.interp(level, (0, 0.5, 1), points) for points in zip(*COLORS[color], strict=True)], -1
        ).astype(np.float32)
    return rgb * alpha, 1 - alpha


def _places(layout: str, count: int, rng: np.random.Generator) -> tuple[list[tuple[int, int]], int]:
    """Centres (y, x) of the objects before jitter, and the length of their longer side, in a picture of 64 pixels."""
    if layout == "single":
        return [(32, 32)], int(rng.choice((44, 50)))
    if count == 3:
        shapes = ([(18, 32), (46, 16), (46, 48)], [(18, 16), (18, 48), (46, 32)])
        return shapes[rng.integers(2)], int(rng.choice((22, 25)))
    if count == 4:
        return [(17, 17), (17, 47), (47, 17), (47, 47)], int(rng.choice((22, 25)))
    side = int(rng.choice((25, 28)))
    beside, stacked = [(32, 16), (32, 48)], [(16, 32), (48, 32)]
    if layout == "above":
        return stacked, side
    if layout == "left":
        return beside, side
    places = beside if rng.random() < 0.75 else stacked
    return places[:: 1 if rng.random() < 0.5 else -1], side


def render(scene: Scene, rng: np.random.Generator, side: int = SIZE) -> np.ndarray:
    """One picture of the scene, uint8 (side, side, 3); another multiple of 64 is the same picture, so much larger."""
    scale = side // SIZE
    canvas = np.empty((side, side, 3), dtype=np.float32)
    canvas[:] = BACKGROUNDS[scene.background or "white"]
    places, longest = _places(scene.layout, scene.count, rng)
    jitter = {"single": 4, "count": 1}.get(scene.layout, 2)
    things = scene.things * scene.count if scene.layout == "count" else scene.things
    style = STYLES[rng.integers(3)]
    for (name, color), (y, x) in zip(things, places, strict=True):
        rgb, keep = _sprite(style, name, color, longest * scale)
        h, w = keep.shape[:2]
        dy, dx = rng.integers(-jitter, jitter + 1, 2)
        top = min(max(int(y + dy) * scale - h // 2, 0), side - h)
        left = min(max(int(x + dx) * scale - w // 2, 0), side - w)
        patch = canvas[top : top + h, left : left + w]
        patch *= keep
        patch += rgb
    return (canvas + 0.5).clip(0, 255).astype(np.uint8)


def render_prompts(prompts: list[str], seed: int, side: int = SIZE) -> np.ndarray:
    """One real picture of every prompt, uint8 (n, side, side, 3); picture i depends on the seed, i and the prompt."""
    rngs = (np.random.default_rng([seed, i]) for i in range(len(prompts)))
    return np.stack([render(parse(prompt), rng, side) for prompt, rng in zip(prompts, rngs, strict=True)])


def sample_batch(
    seed: int, index: int, n: int, unseen: bool = False, side: int = SIZE
) -> tuple[np.ndarray, list[Scene]]:
    """Batch number `index` of the endless data set `seed`: pictures uint8 (n, side, side, 3) and their scenes."""
    rng = np.random.default_rng([seed, index, int(unseen)])
    scenes = [sample_scene(rng, unseen) for _ in range(n)]
    return np.stack([render(scene, rng, side) for scene in scenes]), scenes
