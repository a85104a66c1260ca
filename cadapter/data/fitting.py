"""Documents that stay whole: which of them share a sequence.

Best fit, longest first: each document goes where the least room is left that takes it, else into a new sequence.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cadapter.data.packing import Layout, Pieces, Placement

_DOCUMENTS_AT_ONCE = 1 << 16


def each_in_one(pieces: Pieces, layout: Layout) -> Placement:
    """Place each of ``pieces`` within one sequence; what is left of a sequence is for padding.

    A document that begins with the sequence prefix loses it where a sequence begins with the document, as in
    :func:`~cadapter.data.packing.in_a_row`; without it, none is longer than a sequence has room for.
    """
    starts, lengths = pieces.starts.copy(), pieces.stops - pieces.starts
    at = np.zeros(len(pieces), np.int64)
    with_room: list[list[int]] = [[] for _ in range(layout.capacity + 1)]  # sequences, by how much room they have
    rooms = 0  # bit r: there are sequences with room r
    sequences = 0
    longest_first = np.argsort(-lengths, kind="stable")
    for low in range(0, len(pieces), _DOCUMENTS_AT_ONCE):
        for index in longest_first[low : low + _DOCUMENTS_AT_ONCE].tolist():
            length = int(lengths[index])
            enough = rooms >> length
            if enough:
                room = length + (enough & -enough).bit_length() - 1
                sequence = with_room[room].pop()
                if not with_room[room]:
                    rooms ^= 1 << room
            else:
                room, sequence = layout.capacity, sequences
                sequences += 1
                if pieces.repeats[index]:
                    starts[index] += len(layout.prefix)
                    length -= len(layout.prefix)
            at[index] = (sequence + 1) * layout.capacity - room
            with_room[room - length].append(sequence)
            rooms |= 1 << (room - length)
    order = np.argsort(at, kind="stable")
    placed, at = replace(pieces, starts=starts).select(order), at[order]
    return Placement(placed, at, at + placed.stops - placed.starts)
