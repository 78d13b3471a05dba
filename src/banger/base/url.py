"""URLs that the user and catalogs name: which of them are used, and how they are shown."""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from banger.base.errors import BadRequest, BangerError, PermissionDenied


def split_url(url: str) -> SplitResult:
    """The parts of `url`, whose host and port can be read. BadRequest for what is no URL."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # is parsed when it is asked for
    except ValueError as error:
        raise BadRequest(f'"{shown(url)}" is not a URL: {error}') from None
    if not url.isprintable() or " " in url:
        raise BadRequest(f'"{shown(url)}" is not a URL: it has spaces or control characters')
    return parts


def shown(url: str) -> str:
    """`url` for messages: without what may be secret in it (user, password, query)."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "…"
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def check_web_url(url: str) -> SplitResult:
    """The parts of a ``http`` or ``https`` URL with a host; BadRequest for another."""
    parts = split_url(url)
    if parts.scheme not in ("http", "https"):
        raise BadRequest(f'"{shown(url)}" is not a URL of http or https')
    if not parts.hostname:
        raise BadRequest(f'"{shown(url)}" names no host')
    return parts


def check_redirect(source: str, target: str) -> None:
    """Raise unless a client at `source` may follow a server to `target`.

    Only to the web, and never from https to http: who listens there could send anything.
    """
    try:
        scheme = check_web_url(target).scheme
    except BangerError as error:
        raise PermissionDenied(f"{shown(source)} leads elsewhere: {error.message}") from None
    if urlsplit(source).scheme == "https" and scheme != "https":
        raise PermissionDenied(f"{shown(source)} leads from https to http: {shown(target)}")


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this machine's own loopback: no proxy is asked for it."""
    host = split_url(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_authentic(url: str) -> None:
    """Raise unless what comes from this web address is what its owner sends.

    That is so by https, and by http from this machine's own loopback addresses.
    """
    if check_web_url(url).scheme == "http" and not is_loopback(url):
        raise PermissionDenied(
            f"refusing the catalog {shown(url)}: by http, anybody on the way to it could put other"
            " checksums into it",
            hint="use https, a file, or http on a loopback address",
        )


def check_catalog_location(text: str) -> str:
    """`text`, if a catalog may lie there: a path that is absolute or begins with ``~/``, or a URL
    of https, file, or http on a loopback address. Empty: there is none."""
    if not text or text.startswith(("/", "~/")):
        return text
    if "://" not in text:
        raise BadRequest(
            f'"{text}" is neither a URL nor an absolute path',
            hint="write it like https://example.org/catalog.toml, /srv/catalog.toml or ~/x.json",
        )
    if split_url(text).scheme == "file":
        file_path(text)
    else:
        check_authentic(text)
    return text


def file_path(url: str) -> str:
    """The absolute path that a ``file://`` URL names. BadRequest for one on another host."""
    parts = split_url(url)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or "\0" in path:
        raise BadRequest(f'"{shown(url)}" is not a file of this machine')
    return path
