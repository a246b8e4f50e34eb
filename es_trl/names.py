"""A name that is not known: the nearest one that is, and constructors that say it."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any


# What other libraries and papers call it.
ALSO_KNOWN_AS = {
    "population_size": "num_generations popsize pop_size num_members",
    "sigma": "std noise_std",
    "learning_rate": "lr",
    "max_steps": "steps num_steps",
    "prompts_per_step": "batch_size",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "reward_funcs": "reward_model rewards reward",
    "train_dataset": "prompts dataset",
    "args": "config",
    "model": "pipe pipeline",
    "model_name_or_path": "model",
    "output_dir": "output",
}
NOT_NEEDED = ("processing_class", "tokenizer", "ref_model", "data_collator")  # the pipeline brings it


def hint(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'population_size'?`, or what else helps; empty when nothing is near."""
    known = list(known)
    if name in NOT_NEEDED:
        return "Leave it out: the pipeline brings what it needs."
    near = [ours for ours, theirs in ALSO_KNOWN_AS.items() if name in theirs.split() and ours in known]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.55)
    return f"Did you mean {near[0]!r}?" if near else ""


def checked(function: Any = None, *, like: Callable[..., Any] | None = None) -> Any:
    """
    A constructor that refuses a keyword it does not have with the nearest one that it has.

    Args:
        function (`Callable` or `type`): `__init__`, or a class whose `__init__` it is.
        like (`Callable`, *optional*): The `__init__` whose parameters `function` passes on as `*args, **kwargs`; its
            signature is then that of `function` too.
    """
    if function is None:
        return functools.partial(checked, like=like)
    if inspect.isclass(function):
        function.__init__ = checked(function.__init__)  # type: ignore[method-assign]
        return function
    signature = inspect.signature(like or function)

    @functools.wraps(function)
    def init(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in signature.parameters:
                near = hint(name, list(signature.parameters)[1:])
                raise TypeError(f"{type(self).__name__} has no argument {name!r}. {near}".rstrip())
        return function(self, *args, **kwargs)

    init.__signature__ = signature  # type: ignore[attr-defined]
    return init
