"""Names for VMs that were given none: adjective-noun."""

from __future__ import annotations

import secrets
from collections.abc import Container

_ADJECTIVES = tuple(
    """
    able agile amber azure bold brave brisk calm clear clever cosmic crisp daring deft eager
    early fair fast fleet fresh gentle glad golden grand green happy hardy honest humble
    jolly keen kind lively loyal lucky mellow merry mighty neat nimble noble patient plain
    polite proud quick quiet rapid ready robust rosy sharp shiny silent silver simple sleek
    smart snug solid steady still stout sunny swift tidy true vivid warm wise witty young
    zesty
    """.split()  # noqa: SIM905 - words read better than a list of strings
)
_NOUNS = tuple(
    """
    acorn anchor aspen badger beacon birch bison brook canyon cedar cliff comet coral crane
    creek delta dune eagle ember falcon fern fjord forest fox garnet glade grove harbor hawk
    heron hill island jade juniper lagoon lake lark laurel lotus lynx maple marsh meadow
    mesa moon oak ocean orchid otter owl peak pebble pine plover pond quail quartz raven
    reef ridge river robin sage seal shore sparrow spruce star stone summit thistle tiger
    tulip valley walnut willow wren
    """.split()  # noqa: SIM905 - words read better than a list of strings
)


def generate_name(taken: Container[str]) -> str:
    """A free name; after a few unlucky draws one with four hex digits at its end."""
    for _ in range(20):
        name = f"{secrets.choice(_ADJECTIVES)}-{secrets.choice(_NOUNS)}"
        if name not in taken:
            return name
    return f"{name}-{secrets.token_hex(2)}"
