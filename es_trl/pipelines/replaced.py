"""What stands in for an object's own attributes for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Inside, `owner` (an object, a module, or a dict) has these attributes instead of its own or its class's."""
    attributes = owner if isinstance(owner, dict) else vars(owner)
    own = {name: attributes[name] for name in values if name in attributes}
    attributes.update(values)
    try:
        yield
    finally:
        for name in values:
            attributes.pop(name, None)
        attributes.update(own)
