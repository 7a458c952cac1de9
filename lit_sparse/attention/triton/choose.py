"""Selection, second half: the lists, from masses. Nothing is sorted and nothing is atomic."""

import triton
import triton.language as tl

NONE = tl.constexpr(-1)
"""Key of what is no candidate: below the bits of every mass."""


@triton.jit(do_not_specialize=["slots"])
def fill_kernel(COLUMNS, ENTRY, TILES, slots, TILE_FIELDS: tl.constexpr, CHUNK: tl.constexpr):
    """What lengths alone decide: sink, local and diagonal blocks; -1 elsewhere.

    Grid (tiles, Hkv).
    """
    FIELD = TILES + tl.program_id(0).to(tl.int64) * TILE_FIELDS
    offset = tl.load(FIELD + 5)
    full = tl.load(FIELD + 6).to(tl.int32)
    size = tl.load(FIELD + 7).to(tl.int32)
    complete = tl.load(FIELD + 10).to(tl.int32)
    sink = tl.load(FIELD + 11).to(tl.int32)
    base = tl.load(FIELD + 12).to(tl.int32)
    late = tl.load(FIELD + 13).to(tl.int32)
    first_local = tl.load(FIELD + 14).to(tl.int32)
    at = tl.program_id(1).to(tl.int64) * slots + offset
    for begin in range(0, size, CHUNK):
        slot = begin + tl.arange(0, CHUNK)
        column = tl.where(slot < sink, slot, -1)
        local = (slot >= sink + base) & (slot < full)
        column = tl.where(local, first_local + slot - sink - base, column)
        column = tl.where(slot >= full + late, complete + slot - full - late, column)
        tl.store(COLUMNS + at + slot, column, mask=slot < size)
        tl.store(ENTRY + at + slot, tl.zeros_like(column), mask=slot < size)


@triton.jit
def _ranked(SUMS, ASKED, column, low, high, recent, CHUNKS: tl.constexpr, width):
    """Keys [N] that order as the masses of candidates do: float bits, as masses are not negative.

    The mass of a block is what the tile before needed (`recent`: there is one) and the first row
    asks for.
    """
    candidate = (column >= low) & (column < high)
    mass = tl.zeros_like(column).to(tl.float32)
    # A loop, not unrolled: loads of all chunks at a time would not fit the registers.
    for chunk in range(CHUNKS):
        at = SUMS - CHUNKS * width + chunk * width + column
        mass += tl.load(at, mask=candidate & recent, other=0.0)
    mass += tl.load(ASKED + column, mask=candidate, other=0.0)
    return tl.where(candidate, mass.to(tl.int32, bitcast=True), NONE)


@triton.jit(do_not_specialize=["strip_first", "strip", "width", "asked", "skip", "slots"])
def choose_kernel(
    SUMS,
    ASKED,
    COLUMNS,
    ENTRY,
    TILES,
    strip_first,
    strip,
    width,
    asked,
    skip,
    slots,
    TILE_FIELDS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
    LATE: tl.constexpr,
):
    """Base and late slots of the sparse tiles of a strip, but its first `skip`. Grid (strip, Hkv).

    SUMS, ASKED: from `masses_kernel`. The base threshold is the exact k-th largest mass, found bit
    by bit; ties go to the lower block. Late slots take the best block outside the base of the row
    that fills them, and stay empty (-1) where an earlier slot has it or the row does not exist.
    SPAN blocks are looked at a time, SPANS times (1: they stay in registers). LATE: a power of two,
    at least the late slots of any tile.
    """
    local = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    tile = strip_first + local
    FIELD = TILES + tile.to(tl.int64) * TILE_FIELDS
    if (local < skip) | (tl.load(FIELD + 15) % 2 == 0):
        return
    existing = tl.load(FIELD + 2).to(tl.int32)
    offset = tl.load(FIELD + 5)
    full = tl.load(FIELD + 6).to(tl.int32)
    first_tile = tl.load(FIELD + 9)
    low = tl.load(FIELD + 11).to(tl.int32)
    base = tl.load(FIELD + 12).to(tl.int32)
    late = tl.load(FIELD + 13).to(tl.int32)
    high = tl.load(FIELD + 14).to(tl.int32)
    recent = tile > first_tile
    SUMS += (head * strip + local) * CHUNKS * width
    ASKED += (head * strip + local) * asked * width
    COLUMNS += head * slots + offset
    ENTRY += head * slots + offset
    span = tl.arange(0, SPAN)

    # The largest threshold that at least `base` keys reach.
    threshold = 0
    if SPANS == 1:
        keys = _ranked(SUMS, ASKED, span, low, high, recent, CHUNKS, width)
    for bit in range(31):
        trial = threshold | (1 << (30 - bit))
        if SPANS == 1:
            reach = tl.sum((keys >= trial).to(tl.int32), 0)
        else:
            reach = 0
            for begin in range(0, SPANS * SPAN, SPAN):
                keys = _ranked(SUMS, ASKED, begin + span, low, high, recent, CHUNKS, width)
                reach += tl.sum((keys >= trial).to(tl.int32), 0)
        threshold = tl.where(reach >= base, trial, threshold)

    above = 0
    for begin in range(0, SPANS * SPAN, SPAN):
        if SPANS > 1:
            keys = _ranked(SUMS, ASKED, begin + span, low, high, recent, CHUNKS, width)
        above += tl.sum((keys > threshold).to(tl.int32), 0)
    # Ascending columns by prefix sums; of the keys at the threshold the first ones fill up.
    ties = base - above
    taken = 0
    tied = 0
    last_tie = -1
    for begin in range(0, SPANS * SPAN, SPAN):
        column = begin + span
        if SPANS > 1:
            keys = _ranked(SUMS, ASKED, column, low, high, recent, CHUNKS, width)
        equal = (keys == threshold).to(tl.int32)
        tie = (equal == 1) & (tied + tl.cumsum(equal, 0) <= ties)
        take = ((keys > threshold) | tie).to(tl.int32)
        place = low + taken + tl.cumsum(take, 0) - 1
        tl.store(COLUMNS + place, column, mask=take == 1)
        taken += tl.sum(take, 0)
        tied += tl.sum(equal, 0)
        last_tie = tl.maximum(last_tie, tl.max(tl.where(tie, column, -1), 0))

    slot = tl.arange(0, LATE)
    picks = tl.full([LATE], -1, tl.int32)
    entries = tl.full([LATE], TILE, tl.int32)
    before = -1
    least = 0
    after = -1
    for j in range(late):
        row = (2 * j + 1) * TILE // (2 * late)
        index = tl.where(late > TILE, row, j)
        again = row == before
        best = -1
        pick = 0
        for begin in range(0, SPANS * SPAN, SPAN):
            column = begin + span
            if SPANS > 1:
                keys = _ranked(SUMS, ASKED, column, low, high, recent, CHUNKS, width)
            open = (keys >= 0) & (keys <= threshold) & ((keys < threshold) | (column > last_tie))
            mass = tl.load(ASKED + (1 + index) * width + column, mask=open, other=0.0)
            wish = tl.where(open, mass.to(tl.int32, bitcast=True), NONE)
            # A row that fills several slots goes down its own ranking.
            worse = (wish < least) | ((wish == least) & (column > after))
            wish = tl.where(again & (worse == 0), NONE, wish)
            found = tl.max(wish, 0)
            where = tl.min(tl.where(wish == found, column, SPANS * SPAN), 0)
            pick = tl.where(found > best, where, pick)
            best = tl.maximum(best, found)
        before = row
        least = best
        after = pick
        taken_before = tl.sum((picks == pick).to(tl.int32), 0) > 0
        empty = taken_before | (row >= existing) | (best < 0)
        picks = tl.where((slot == j) & (empty == 0), pick, picks)
        entries = tl.where((slot == j) & (empty == 0), row, entries)
    tl.store(COLUMNS + full + slot, picks, mask=slot < late)
    tl.store(ENTRY + full + slot, entries, mask=slot < late)
