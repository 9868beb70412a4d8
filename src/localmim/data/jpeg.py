"""Which JPEG files MindData's decoder can be trusted with.

MindData 2.10 ends the process (segmentation fault, division by zero) on JPEG files whose header segments are damaged
and never returns from some that end inside them; damage to the coded pixels it survives. So the headers are checked
here first, which costs some tens of microseconds. Section numbers are those of ITU-T T.81, the JPEG standard.
"""

from __future__ import annotations

import numpy as np

SOF0, SOF1, DHT, SOI, EOI, SOS, DQT, DRI, COM = 0xC0, 0xC1, 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xFE
APP = range(0xE0, 0xF0)


def is_plain_jpeg(raw: np.ndarray) -> bool:
    """Whether a file is a JPEG of the usual kind with sound headers: 8 bit, grey or three components, one scan.

    False does not mean damaged: a progressive or CMYK file, or one with something behind its end, is merely not plain.

    Args:
        raw: 1-D uint8, the file.
    """
    data = raw.tobytes().rstrip(b"\0")
    if data[:2] != bytes([0xFF, SOI]) or data[-2:] != bytes([0xFF, EOI]):
        return False
    at = 2
    components: dict[int, int] = {}  # id: quantisation table
    tables: set[tuple[int, int]] = set()  # (marker and class, number) that are defined
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        body = data[at + 4 : at + 2 + length]
        if length < 2 or len(body) != length - 2:
            return False
        at += 2 + length
        if marker == DHT:
            found = _huffman_tables(body)
        elif marker == DQT:
            found = _quantisation_tables(body)
        elif marker in (SOF0, SOF1):
            found = components = {} if components else _frame(body)
        elif marker == SOS:
            return _scan_is_plain(body, components, tables) and _only_pixels(raw[at : len(data) - 2])
        else:
            found = marker in APP or marker == COM or (marker == DRI and len(body) == 2)
        if not found:
            return False
        if marker in (DHT, DQT):
            tables |= found
    return False


def _huffman_tables(body: bytes) -> set[tuple[int, int]]:
    """The tables that a DHT segment defines (B.2.4.2), {(class, number)}; empty when it is damaged."""
    found, at = set(), 0
    while at < len(body):
        kind, number = body[at] >> 4, body[at] & 15
        counts = body[at + 1 : at + 17]  # codes of 1, 2, ... 16 bits
        symbols = body[at + 17 : at + 17 + sum(counts)]
        if kind > 1 or number > 3 or len(counts) < 16 or not 0 < sum(counts) <= 256 or len(symbols) < sum(counts):
            return set()
        if kind == 0 and max(symbols) > 15:  # a DC code tells how many bits follow
            return set()
        code = 0
        for bits, count in enumerate(counts, 1):  # codes must fit their bits (C.2)
            code += count
            if code > 1 << bits:
                return set()
            code <<= 1
        found.add((kind, number))
        at += 17 + len(symbols)
    return found


def _quantisation_tables(body: bytes) -> set[tuple[int, int]]:
    """The tables that a DQT segment defines (B.2.4.1), {(DQT, number)}; empty when it is damaged."""
    found, at = set(), 0
    while at < len(body):
        wide, number = body[at] >> 4, body[at] & 15
        at += 1 + 64 * (1 + wide)
        if wide > 1 or number > 3 or at > len(body):
            return set()
        found.add((DQT, number))
    return found


def _frame(body: bytes) -> dict[int, int]:
    """Component ids and their quantisation tables from a SOF segment (B.2.2); empty when it is unusual or damaged."""
    if len(body) < 6 or body[0] != 8 or body[5] not in (1, 3) or len(body) != 6 + 3 * body[5]:
        return {}
    height, width = body[1] << 8 | body[2], body[3] << 8 | body[4]
    sampling = [(byte >> 4, byte & 15) for byte in body[7::3]]
    if not height or not width or not all(1 <= h <= 4 and 1 <= v <= 4 for h, v in sampling):
        return {}
    if sum(h * v for h, v in sampling) > 10 and body[5] > 1:  # blocks in a unit (B.2.3)
        return {}
    components = dict(zip(body[6::3], body[8::3]))
    return components if len(components) == body[5] else {}


def _scan_is_plain(body: bytes, components: dict[int, int], tables: set[tuple[int, int]]) -> bool:
    """Whether a SOS segment (B.2.3) codes all components at once with tables that are defined."""
    count = len(components)
    if not count or len(body) != 4 + 2 * count or body[0] != count or body[-3:] != bytes([0, 63, 0]):
        return False
    if list(body[1 : 1 + 2 * count : 2]) != list(components):
        return False
    used = {
        (kind, chosen >> 4 if kind == 0 else chosen & 15) for chosen in body[2 : 2 + 2 * count : 2] for kind in (0, 1)
    }
    return used | {(DQT, number) for number in components.values()} <= tables


def _only_pixels(coded: np.ndarray) -> bool:
    """Whether no marker but restarts (RST0 to RST7) stands among the coded pixels."""
    if not coded.size or coded[-1] == 0xFF:
        return False
    follows = coded[np.flatnonzero(coded == 0xFF) + 1]
    return bool(((follows == 0) | ((follows >= 0xD0) & (follows <= 0xD7))).all())
