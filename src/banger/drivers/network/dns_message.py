"""DNS messages (RFC 1035, 6891): queries read strictly and within bounds, answers put together.

dnslib reads and writes the records. What comes in may be anything: how much of a message it looks
at is bounded here first, for names that point at names cost it time, and whatever it makes of the
rest, a message that cannot be read ends here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from dnslib import EDNS0, QTYPE, RR, DNSHeader, DNSQuestion, DNSRecord

#: Of a query; those of resolvers are below 512.
QUERY_MAX_BYTES = 4096
#: Without EDNS, and what we take by UDP at most: no fragments (the flag day of 2020).
_PLAIN_BYTES = 512
UDP_MAX_BYTES = 1232
TCP_MAX_BYTES = 65_535
_HEADER = struct.Struct(">HHHHHH")
_QR, _RD = 0x8000, 0x0100
_OPCODES = 0x7800
#: OPT, and a signature nobody here checks.
_ADDITIONAL_MAX = 2
_CLASS_IN, _CLASS_ANY = 1, 255
_NAME_MAX_BYTES = 255
_LABEL_MAX_BYTES = 63

Labels = tuple[bytes, ...]


class Rcode(IntEnum):
    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5


@dataclass(frozen=True)
class Query:
    """One question, as it came."""

    raw: bytes
    id: int
    recursion_desired: bool
    #: As it was asked, which an answer repeats.
    question: Any
    #: The name, in lower case.
    labels: Labels
    qtype: int
    edns: bool
    edns_version: int
    #: How long the answer may be.
    limit: int


def read_query(data: bytes, *, tcp: bool) -> Query | bytes:
    """The query in `data`, or what is answered instead: nothing (empty), or a bare error."""
    if len(data) < _HEADER.size or len(data) > QUERY_MAX_BYTES:
        return b""
    query_id, flags, questions, answers, authority, additional = _HEADER.unpack_from(data)
    if flags & _QR:
        return b""  # an answer; to answer it could go on for ever
    if flags & _OPCODES:
        return bare(data, Rcode.NOTIMP)
    if questions != 1 or answers or authority or additional > _ADDITIONAL_MAX:
        return bare(data, Rcode.FORMERR)
    record = parse(data)
    if record is None:
        return bare(data, Rcode.FORMERR)
    question = record.questions[0]
    labels = labels_of(question.qname)
    if labels is None:
        return bare(data, Rcode.FORMERR)
    if question.qclass not in (_CLASS_IN, _CLASS_ANY):
        return bare(data, Rcode.REFUSED)
    option = next((each for each in record.ar if each.rtype == QTYPE.OPT), None)
    room = _PLAIN_BYTES if option is None else max(option.edns_len, _PLAIN_BYTES)
    return Query(
        raw=data,
        id=query_id,
        recursion_desired=bool(flags & _RD),
        question=question,
        labels=labels,
        qtype=question.qtype,
        edns=option is not None,
        edns_version=0 if option is None else option.edns_ver,
        limit=TCP_MAX_BYTES if tcp else min(room, UDP_MAX_BYTES),
    )


def parse(data: bytes) -> Any | None:
    """The message as dnslib has it; None when it cannot be read."""
    try:
        return DNSRecord.parse(data)
    except Exception:
        # A parser's boundary: beside its own errors, hostile bytes make dnslib (0.9.26) raise
        # ValueError, struct.error, RecursionError and more.
        return None


def labels_of(name: Any) -> Labels | None:
    """A name's labels in lower case; None for one that is longer than names may be."""
    labels = tuple(bytes(label).lower() for label in name.label)
    if sum(len(label) + 1 for label in labels) >= _NAME_MAX_BYTES:
        return None
    if any(len(label) > _LABEL_MAX_BYTES for label in labels):
        return None
    return labels


def bare(data: bytes, rcode: Rcode) -> bytes:
    """An error that repeats nothing of a query but its id, its opcode and what it wants."""
    query_id, flags = struct.unpack_from(">HH", data)
    return _HEADER.pack(query_id, _QR | flags & (_OPCODES | _RD) | rcode, 0, 0, 0, 0)


def reply(
    query: Query,
    rcode: Rcode,
    answers: Iterable[RR] = (),
    authority: Iterable[RR] = (),
    *,
    authoritative: bool = False,
    recursion: bool = False,
    cut: bool = False,
) -> bytes:
    """The answer to `query`; the question alone and TC where it would be too long, or is `cut`."""
    header = DNSHeader(
        id=query.id,
        bitmap=_QR | (_RD if query.recursion_desired else 0) | rcode,
        aa=int(authoritative),
        ra=int(recursion),
    )
    question = DNSQuestion(query.question.qname, query.question.qtype, query.question.qclass)
    options = [EDNS0(udp_len=UDP_MAX_BYTES)] if query.edns else []
    made = DNSRecord(header, q=question, rr=list(answers), auth=list(authority), ar=options)
    packed = bytes(made.pack())
    if len(packed) <= query.limit and not cut:
        return packed
    header.tc = 1
    return bytes(DNSRecord(header, q=question, ar=options).pack())


def bad_version(query: Query) -> bytes:
    """RFC 6891, 6.1.3: a later EDNS is answered with BADVERS, and with ours."""
    header = DNSHeader(id=query.id, bitmap=_QR | (_RD if query.recursion_desired else 0))
    options = EDNS0(udp_len=UDP_MAX_BYTES, ext_rcode=1)
    return bytes(DNSRecord(header, ar=[options]).pack())
