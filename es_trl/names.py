"""A name that is not known: the nearest one that is, and constructors that say it."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any


# What other libraries and papers call it.
ALSO_KNOWN_AS = {
    "num_generations": "population_size",
    "popsize": "population_size",
    "pop_size": "population_size",
    "num_members": "population_size",
    "std": "sigma",
    "noise_std": "sigma",
    "lr": "learning_rate",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "batch_size": "prompts_per_step",
    "rank": "lora_rank",
    "alpha": "lora_alpha",
    "reward_model": "reward_funcs",
    "rewards": "reward_funcs",
    "reward": "reward_funcs",
    "prompts": "train_dataset",
    "dataset": "train_dataset",
    "config": "args",
    "pipe": "model",
    "pipeline": "model",
    "model": "model_name_or_path",
    "output": "output_dir",
    "processing_class": None,
    "tokenizer": None,
    "ref_model": None,
    "data_collator": None,
}
NOT_NEEDED = "leave it out: the pipeline brings what it needs"


def hint(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'population_size'?`, or what else helps; empty when nothing is near."""
    known = list(known)
    other = ALSO_KNOWN_AS.get(name, "")
    if other is None:
        return f"{NOT_NEEDED[0].upper()}{NOT_NEEDED[1:]}."
    near = [other] if other and other in known else difflib.get_close_matches(name, known, n=1, cutoff=0.55)
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
