"""Best-fit-decreasing packing written plainly, one piece at a time, to compare with; and documents for it."""

from hypothesis import strategies as st


def pack_plainly(lengths, seq_len, group=10**9):
    """The sequences of [(start, length, document continues)], by scanning all sequences for every piece."""
    packed, position = [], 0
    for first in range(0, len(lengths), group):
        pieces = []
        for length in lengths[first : first + group]:
            for start in range(0, length, seq_len):
                pieces.append((position + start, min(seq_len, length - start), start + seq_len < length))
            position += length
        sequences, rooms = [], []
        for piece in sorted(pieces, key=lambda each: -each[1]):  # stable: equal lengths in the order of the documents
            fitting = [number for number, room in enumerate(rooms) if room >= piece[1]]
            if fitting:
                best = min(fitting, key=lambda number: rooms[number])  # of equal ones the first
            else:
                best = len(rooms)
                rooms.append(seq_len)
                sequences.append([])
            sequences[best].append(piece)
            rooms[best] -= piece[1]
        packed += [sorted(sequence) for sequence in sequences]
    return packed


@st.composite
def documents(draw, most=60):
    """(lengths, seq_len): empty documents, of one token, of exactly seq_len and its multiples, and longer ones."""
    seq_len = draw(st.integers(1, 24))
    edges = st.sampled_from([0, 1, seq_len - 1, seq_len, seq_len + 1, 2 * seq_len, 3 * seq_len + 1])
    return draw(st.lists(edges | st.integers(0, 3 * seq_len), max_size=most)), seq_len
