"""What a machine may reach, as people write it: networks and names.

``10.0.0.0/8`` or an address is a network of IPv4, the only kind that guests have. ``example.org``
is that name alone, ``*.example.org`` every name below it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Address, collapse_addresses

from banger.base.errors import BadRequest
from banger.base.model import Egress, Reach

#: How many networks and names one machine may be let reach.
ALLOWED_MAX = 256
_NAME_CHARACTERS_MAX = 253
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?:\*\.)?{_LABEL}(?:\.{_LABEL})*")
_NUMBERS = re.compile(r"[0-9./]+")


def check_reach(reach: Reach) -> Reach:
    """`reach` in normal form. Raises BadRequest for what it cannot be."""
    allow = tuple(dict.fromkeys(_entry(each) for each in reach.allow))
    if len(allow) > ALLOWED_MAX:
        raise BadRequest(f"{len(allow)} networks and names are too many to allow ({ALLOWED_MAX})")
    if reach.egress is Egress.ALLOWLIST and not allow:
        raise BadRequest(
            "an allowlist with nothing on it",
            hint="say what it may reach, like --allow 10.0.0.0/8 or --allow example.org",
        )
    if reach.egress is not Egress.ALLOWLIST and allow:
        raise BadRequest(f"what is allowed says nothing where egress is {reach.egress}")
    return Reach(egress=reach.egress, allow=allow, isolated=reach.isolated)


def networks(reach: Reach) -> tuple[str, ...]:
    """The networks of a checked `reach`: none within another, in order."""
    found = (IPv4Network(each) for each in reach.allow if _is_network(each))
    return tuple(str(each) for each in collapse_addresses(found))


def names(reach: Reach) -> tuple[str, ...]:
    """The names and patterns of a checked `reach`."""
    return tuple(each for each in reach.allow if not _is_network(each))


def name_matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name, with or without a dot at its end, is one of these or below one."""
    plain = name.rstrip(".").lower()
    return any(
        plain.endswith(each[1:]) if each.startswith("*.") else plain == each for each in patterns
    )


def _is_network(entry: str) -> bool:
    return _NUMBERS.fullmatch(entry) is not None


def _entry(text: str) -> str:
    entry = text.strip().rstrip(".").lower()
    if _is_network(entry):
        try:
            return str(IPv4Network(entry))
        except ValueError as error:
            raise BadRequest(f'"{text}" is not a network: {error}') from None
    if _is_ipv6(entry):
        raise BadRequest(f'"{text}" is of IPv6, which guests do not have')
    if "//" in entry:
        raise BadRequest(f'"{text}" is a URL', hint="give the name in it alone")
    if len(entry) > _NAME_CHARACTERS_MAX or _NAME.fullmatch(entry) is None:
        raise BadRequest(
            f'"{text}" is neither a network nor a name',
            hint="like 10.0.0.0/8, 192.0.2.7, example.org or *.example.org",
        )
    return entry


def _is_ipv6(entry: str) -> bool:
    try:
        IPv6Address(entry.partition("/")[0].strip("[]"))
    except ValueError:
        return False
    return True
