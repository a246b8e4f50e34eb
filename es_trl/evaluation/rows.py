"""The rows of a table: which weights draw, with how many steps, at which LoRA scale, and how many tries they have."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationRow:
    """
    One model of the table.

    Args:
        name (`str`): Its name, unique in the table.
        adapter (`bool`, *optional*, defaults to `True`): Whether the adapter is on; off is the frozen base.
        num_inference_steps (`int`, *optional*): Sampling steps; `None` is the adapter's setting.
        adapter_scale (`float`, *optional*, defaults to 1.0): Factor on the adapter's update of the weights.
        label (`str`, *optional*): Which adapter, where several are loaded; `None` is the only one.
        best_of (`int`, *optional*, defaults to 1): N images are drawn for each one that counts, and the one with the
            highest trained reward is taken.
    """

    name: str
    adapter: bool = True
    num_inference_steps: int | None = None
    adapter_scale: float = 1.0
    label: str | None = None
    best_of: int = 1

    def __post_init__(self) -> None:
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise ValueError(f"row {self.name!r} has num_inference_steps {self.num_inference_steps}; give 1 or more.")
        if self.best_of < 1:
            raise ValueError(f"row {self.name!r} has best_of {self.best_of}; give 1 or more.")

    @property
    def kind(self) -> str:
        """`"base"`, `"adapter"`, `"scale"` (an adapter at another LoRA scale) or `"best_of"`."""
        if self.best_of > 1:
            return "best_of"
        if not self.adapter:
            return "base"
        return "adapter" if self.adapter_scale == 1.0 else "scale"

    @property
    def draw(self) -> "Draw":
        """Which images the row is made of; rows may share them."""
        label, scale = (self.label or "adapter", self.adapter_scale) if self.adapter else ("base", 1.0)
        return Draw(label, self.num_inference_steps, scale)


@dataclass(frozen=True)
class Draw:
    """
    Images of one kind: weights (`"base"`, or the adapter's label), sampling steps and LoRA scale. Drawn and scored
    once, however many rows use them.
    """

    weights: str
    num_inference_steps: int | None
    scale: float = 1.0

    @property
    def folder(self) -> str:
        """A file name of letters, digits, `.`, `_` and `-`: labels are checked, numbers are formatted."""
        return f"{self.weights}-{self.num_inference_steps}" + (f"-x{self.scale:g}" if self.scale != 1.0 else "")


def default_rows(num_inference_steps: int | None) -> list[EvaluationRow]:
    """
    The three rows of the gap closure: the base, the adapter, and the base with twice the steps; of a model without
    steps (`None`) there are the base and the adapter only.
    """
    if num_inference_steps is None:
        return build_rows([None], [1])
    return build_rows([None], [num_inference_steps, 2 * num_inference_steps], twice=False)


def build_rows(
    labels: Sequence[str | None],
    steps: Sequence[int],
    best_of: Sequence[int] = (),
    scales: Sequence[float] = (),
    twice: bool = True,
) -> list[EvaluationRow]:
    """
    The rows of an evaluation, in the order of the table.

    Args:
        labels (`Sequence[str]`): One per adapter (`None` is "adapter"); empty for the base alone.
        steps (`Sequence[int]`): Numbers of sampling steps, the first being what the adapters were trained for.
        best_of (`Sequence[int]`, *optional*): Numbers of tries of the base with the first number of steps.
        scales (`Sequence[float]`, *optional*): LoRA scales of the first adapter, with the first number of steps.
        twice (`bool`, *optional*, defaults to `True`): Whether adapters are drawn with every number of steps, or only
            with the first.
    """
    first, *more = steps
    names = [label or "adapter" for label in labels]

    def adapters(count: int) -> list[EvaluationRow]:
        named = zip(names, labels, strict=True)
        return [EvaluationRow(f"{name}@{count}", True, count, label=label) for name, label in named]

    rows = [EvaluationRow(f"base@{first}", False, first), *adapters(first)]
    for count in more:
        rows += [EvaluationRow(f"base@{count}", False, count), *(adapters(count) if twice else ())]
    rows += [EvaluationRow(f"base@{first} best of {n}", False, first, best_of=n) for n in best_of if n > 1]
    for scale in scales if labels else ():
        if scale != 1.0:
            rows.append(EvaluationRow(f"{names[0]}@{first} x{scale:g}", True, first, scale, labels[0]))
    return rows
