"""Raw packets for tests: a slow wire, a capture, and a check that a capture holds TLS and nothing else.

Small programs, which ``tests/hosts.py`` starts inside a network namespace; they end with their stdin:

    python packets.py wire FIRST SECOND DELAY_S BITS_PER_S LOSS   carry frames between two interfaces, slowly
    python packets.py capture PATH [INTERFACE ...]                write what passes to a pcap file
    python packets.py plain INTERFACE                             send finished frames of a real card's size

They need neither tc nor tcpdump, and no kernel module for slow links.
"""

import contextlib
import ctypes
import fcntl
import random
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

ALL_PROTOCOLS = 0x0003
SOL_PACKET, IGNORE_OUTGOING, STATISTICS = 263, 23, 6  # of packet(7), which the socket module does not name
FORCE_BUFFER = 33
ETHTOOL = 0x8946
NO_OFFLOADS = (0x17, 0x1F, 0x24)  # of ethtool: set checksums on sending, TCP and generic segmentation
LARGEST_FRAME = 1 << 17
LONGEST_QUEUE_S = 0.2  # what a slow wire holds back; more is dropped, as in a router
PCAP_HEADER = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, LARGEST_FRAME, 1)


def make_plain(interface: str) -> None:
    """Let the kernel finish the frames that it sends to a virtual interface, as for a simple card."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for command in NO_OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(value))
            fcntl.ioctl(any_socket, ETHTOOL, request + bytes(16))


def open_raw(interface: str | None) -> socket.socket:
    """Return a packet socket of one interface, without what this host sends; None for all, both ways."""
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
    with contextlib.suppress(PermissionError):
        raw.setsockopt(socket.SOL_SOCKET, FORCE_BUFFER, 1 << 26)
    if interface is not None:
        raw.setsockopt(SOL_PACKET, IGNORE_OUTGOING, 1)
        raw.bind((interface, ALL_PROTOCOLS))
    raw.setblocking(False)
    return raw


def received(raw: socket.socket, at_most: int = 256) -> Iterator[tuple[bytes, str]]:
    """Yield the frames that wait at a socket, each with its interface."""
    for _ in range(at_most):
        try:
            frame, address = raw.recvfrom(LARGEST_FRAME)
        except OSError:  # nothing waits, or the interface is down
            return
        yield frame, address[0]


def run_wire(interfaces: tuple[str, str], delay_s: float, bits_per_s: float, loss: float) -> NoReturn:
    """Carry frames between two interfaces, each way with this delay, rate and loss."""
    sides = [open_raw(name) for name in interfaces]
    queues: list[deque[tuple[float, bytes]]] = [deque(), deque()]
    free_at = [0.0, 0.0]
    chance = random.Random(1)
    print("ready", flush=True)
    while True:
        due = min((queue[0][0] for queue in queues if queue), default=None)
        timeout = None if due is None else max(0.0, due - time.monotonic())
        readable, _, _ = select.select([sys.stdin, *sides], [], [], timeout)
        if sys.stdin in readable:
            sys.exit(0)
        for index, side in enumerate(sides):
            for frame, _ in received(side) if side in readable else ():
                start = max(time.monotonic(), free_at[index])
                if chance.random() >= loss and start - time.monotonic() < LONGEST_QUEUE_S:
                    free_at[index] = start + len(frame) * 8 / bits_per_s
                    queues[index].append((free_at[index] + delay_s, frame))
        for index, queue in enumerate(queues):
            while queue and queue[0][0] <= time.monotonic():
                with contextlib.suppress(OSError):
                    sides[1 - index].send(queue.popleft()[1])


def run_capture(path: Path, interfaces: list[str]) -> NoReturn:
    """Write all frames of some interfaces to a pcap file; exits with 3 if the kernel dropped any."""
    raw = open_raw(None)
    with path.open("wb") as out:
        out.write(PCAP_HEADER)
        print("ready", flush=True)
        ended = False
        while not ended:
            readable, _, _ = select.select([sys.stdin, raw], [], [])
            ended = sys.stdin in readable
            for frame, interface in received(raw, 1 << 20 if ended else 256):
                if interface in interfaces:
                    now = time.time()
                    out.write(struct.pack("<IIII", int(now), int(now % 1 * 1e6), len(frame), len(frame)))
                    out.write(frame)
    _, dropped = struct.unpack("II", raw.getsockopt(SOL_PACKET, STATISTICS, 8))
    sys.exit(3 if dropped else 0)


def frames(pcap: Path) -> Iterator[bytes]:
    """Yield the Ethernet frames of a pcap file as ``run_capture`` writes it."""
    content = pcap.read_bytes()
    assert content[: len(PCAP_HEADER)] == PCAP_HEADER, "not a capture of ours"
    start = len(PCAP_HEADER)
    while start < len(content):
        length = int.from_bytes(content[start + 8 : start + 12], "little")
        start += 16 + length
        yield content[start - length : start]


@dataclass
class Direction:
    """What one end of a TCP connection sent: its segments by place in the stream."""

    name: str
    first: int  # the sequence number of the first byte
    segments: list[tuple[int, bytes]] = field(default_factory=list)
    acknowledged: int = 0  # by the other end, as a place in the stream

    def place(self, sequence: int) -> int:
        """Return the place of a sequence number in the stream; negative for one before its start."""
        return (sequence - self.first + (1 << 31)) % (1 << 32) - (1 << 31)

    def joined(self) -> tuple[bytes, str]:
        """Return the bytes in order up to the first gap, and a complaint if the other end had more."""
        content = bytearray()
        for start, payload in sorted(self.segments, key=lambda segment: segment[0]):
            if start > len(content):
                break
            content += payload[len(content) - start :]
        lost = self.acknowledged > len(content) + 1  # its end counts as one byte
        return bytes(content), f"{self.name}: the capture has a gap at byte {len(content)}" if lost else ""


def directions(pcap: Path) -> tuple[list[Direction], list[str]]:
    """Sort a capture into the directions of its TCP connections.

    Returns:
        The directions, and a line for each packet that is of no known connection, or not TCP. ARP and IGMP,
        which kernels send by themselves on a link, are passed over.
    """
    found: list[Direction] = []
    latest: dict[tuple[bytes, bytes, bytes, bytes], Direction] = {}
    strange = []
    for frame in frames(pcap):
        kind, packet = frame[12:14], frame[14:]
        if kind == b"\x08\x06" or (kind == b"\x08\x00" and packet[9] == 2):
            continue
        if kind != b"\x08\x00" or packet[9] != 6:
            strange.append(f"not TCP over IPv4: {frame[12:14].hex()} {packet[9]} {packet[12:20].hex()}")
            continue
        segment = packet[(packet[0] & 15) * 4 : int.from_bytes(packet[2:4], "big")]
        source, target = packet[12:16], packet[16:20]
        key = (source, segment[:2], target, segment[2:4])
        sequence, acknowledged = struct.unpack(">II", segment[4:12])
        payload = segment[(segment[12] >> 4) * 4 :]
        name = " > ".join(
            f"{socket.inet_ntoa(address)}:{int.from_bytes(port, 'big')}"
            for address, port in ((source, segment[:2]), (target, segment[2:4]))
        )
        direction = latest.get(key)
        if segment[13] & 2 and (direction is None or direction.first != (sequence + 1) % (1 << 32)):
            direction = latest[key] = Direction(name, (sequence + 1) % (1 << 32))
            found.append(direction)
        if payload and direction is None:
            strange.append(f"{name}: began before the capture")
        elif payload and direction is not None:
            direction.segments.append((direction.place(sequence), payload))
        other = latest.get((target, segment[2:4], source, segment[:2]))
        if segment[13] & 16 and other is not None:
            other.acknowledged = max(other.acknowledged, other.place(acknowledged))
    return found, strange


def payload(pcap: Path) -> bytes:
    """Return every byte that a TCP connection of a capture carried, for a search."""
    return b"\n".join(direction.joined()[0] for direction in directions(pcap)[0])


def tls_only(pcap: Path) -> list[str]:
    """List what in a capture is not TLS: every TCP byte must belong to a record, the first to a handshake."""
    found, violations = directions(pcap)
    for direction in found:
        content, gap = direction.joined()
        violations += [gap] if gap else []
        start = 0
        while start < len(content):
            header = content[start : start + 5]
            is_record = header[0] in ((20, 21, 22, 23) if start else (21, 22)) and header[1:2] in (
                b"",
                b"\x03",
            )
            is_record = is_record and header[2:3] in (b"", b"\x01", b"\x03")  # 3.1 in old greetings only
            length = int.from_bytes(header[3:5], "big")
            if not is_record or length > (1 << 14) + 2048:
                violations.append(f"{direction.name}: no TLS record at byte {start}: {header.hex(' ')}")
                break
            start += 5 + length
    return violations


def main(arguments: list[str]) -> NoReturn:
    """Run one of the programs."""
    if arguments[0] == "plain":
        make_plain(arguments[1])
        print("ready", flush=True)
        sys.exit(0)
    if arguments[0] == "wire":
        first, second, delay_s, bits_per_s, loss = arguments[1:]
        run_wire((first, second), float(delay_s), float(bits_per_s), float(loss))
    run_capture(Path(arguments[1]), arguments[2:])


if __name__ == "__main__":
    main(sys.argv[1:])
