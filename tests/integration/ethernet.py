"""Frames as a guest with root could write them: Ethernet, ARP, IPv4, IPv6, TCP, UDP, ICMP."""

from __future__ import annotations

import ipaddress
import socket
import struct

GUEST_MAC = bytes.fromhex("020000000002")
BROADCAST = b"\xff" * 6

ARP, IPV4, VLAN, IPV6 = 0x0806, 0x0800, 0x8100, 0x86DD
ICMP, TCP, UDP = 1, 6, 17
SYN = 0x02


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ethernet(destination: bytes, ethertype: int, payload: bytes) -> bytes:
    return destination + GUEST_MAC + struct.pack("!H", ethertype) + payload


def arp_request(source: str, target: str) -> bytes:
    fields = struct.pack("!HHBBH", 1, IPV4, 6, 4, 1) + GUEST_MAC + socket.inet_aton(source)
    return ethernet(BROADCAST, ARP, fields + bytes(6) + socket.inet_aton(target))


def ip(source: str, destination: str, protocol: int, payload: bytes) -> bytes:
    """An IPv4 or IPv6 packet, as the addresses are."""
    ends = [ipaddress.ip_address(source).packed, ipaddress.ip_address(destination).packed]
    if len(ends[0]) == 16:
        return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64) + b"".join(ends) + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0)
    head += b"".join(ends)
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def _with_checksum(
    source: str, destination: str, protocol: int, segment: bytes, offset: int
) -> bytes:
    pseudo = ipaddress.ip_address(source).packed + ipaddress.ip_address(destination).packed
    # IPv6's pseudo-header is longer by zeros, which add nothing.
    pseudo += struct.pack("!HH", protocol, len(segment))
    total = struct.pack("!H", checksum(pseudo + segment))
    return segment[:offset] + total + segment[offset + 2 :]


def tcp_syn(source: str, destination: str, ports: tuple[int, int]) -> bytes:
    """The beginning of a connection; no more is needed for a server here to see one."""
    head = struct.pack("!HHIIBBHHH", *ports, 1000, 0, 5 << 4, SYN, 65535, 0, 0)
    return ip(source, destination, TCP, _with_checksum(source, destination, TCP, head, 16))


def udp(source: str, destination: str, ports: tuple[int, int], data: bytes) -> bytes:
    datagram = struct.pack("!HHHH", *ports, 8 + len(data), 0) + data
    return ip(source, destination, UDP, _with_checksum(source, destination, UDP, datagram, 6))


def echo_request(source: str, destination: str) -> bytes:
    message = struct.pack("!BBHHH", 8, 0, 0, 77, 1) + b"hello"
    message = message[:2] + struct.pack("!H", checksum(message)) + message[4:]
    return ip(source, destination, ICMP, message)
