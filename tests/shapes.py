"""Records against the shapes of their fields."""

import typing

import jaxtyping
from beartype import door


def check(*records):
    """Raises unless all arrays are as the fields say; an axis is one length in all the records."""
    with jaxtyping.jaxtyped("context"):
        for record in records:
            for field, hint in typing.get_type_hints(type(record)).items():
                door.die_if_unbearable(getattr(record, field), hint)
