"""Triton kernels: similarities are computed in tiles, used, and forgotten; no matrix of them is ever in memory.

Every decision is the exact one of cosine.py: products decide where they are surely far enough from the threshold, and
list the other pairs, which a second kernel decides in float64. Labels are united without locks: a parent is always a
lower vertex, and the root of a component its lowest one, in whatever order the tiles run.

The kernels run on CUDA, and on any machine under Triton's interpreter (TRITON_INTERPRET=1). A list of pairs holds
`first * 2**31 + second` in int64; it may be shorter than what was found, which its reader must check. Nothing is
appended to a list that is too short already, so that its length never overflows.
"""

import triton
import triton.language as tl

PAIR = tl.constexpr(2**31)
COLUMNS = tl.constexpr(2**21)
GRID = tl.constexpr(2.0**40)
AHEAD = tl.constexpr(8)


@triton.jit
def _roots(parents, vertices, active):
    """The root of each vertex's tree."""
    parent = tl.load(parents + vertices, mask=active, other=0, volatile=True)
    while tl.max((active & (parent != vertices)).to(tl.int32), axis=0) > 0:
        vertices = tl.where(active, parent, vertices)
        parent = tl.load(parents + vertices, mask=active, other=0, volatile=True)
    return vertices


@triton.jit
def _unite(parents, u, v, active):
    """Join the components of u and v (vectors of vertices) where active."""
    while tl.max(active.to(tl.int32), axis=0) > 0:
        u = _roots(parents, u, active)
        v = _roots(parents, v, active)
        active = active & (u != v)
        high = tl.maximum(u, v)
        low = tl.minimum(u, v)
        found = tl.atomic_min(parents + high, low, mask=active)
        active = active & (found != high)  # else another tile has hooked `high` onto `found` in the meantime
        u = tl.where(active, found, u)
        v = tl.where(active, low, v)


@triton.jit
def _cosines(
    x, x_inverse, x_rows, x_valid, y, y_inverse, y_rows, y_valid,
    dim: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Cosines (M, N) float32 of rows of x and y, -2 where one is 0, -4 where one is not valid."""
    half: tl.constexpr = (x.dtype.element_ty.primitive_bitwidth == 16) & (y.dtype.element_ty.primitive_bitwidth == 16)
    PRECISION: tl.constexpr = "tf32" if half else "tf32x3"  # TF32 holds both half precisions exactly
    sums = tl.zeros((M, N), tl.float32)
    x_start = x + x_rows.to(tl.int64)[:, None] * dim
    y_start = y + y_rows.to(tl.int64)[:, None] * dim
    for start in range(0, dim, K):
        entries = start + tl.arange(0, K)[None, :]
        left = tl.load(x_start + entries, mask=x_valid[:, None] & (entries < dim), other=0.0)
        right = tl.load(y_start + entries, mask=y_valid[:, None] & (entries < dim), other=0.0)
        sums = tl.dot(left.to(tl.float32), tl.trans(right.to(tl.float32)), sums, input_precision=PRECISION)
    x_scale = tl.load(x_inverse + x_rows, mask=x_valid, other=0.0)
    y_scale = tl.load(y_inverse + y_rows, mask=y_valid, other=0.0)
    cosines = sums * x_scale[:, None] * y_scale[None, :]
    cosines = tl.where((x_scale > 0)[:, None] & (y_scale > 0)[None, :], cosines, -2.0)
    return tl.where(x_valid[:, None] & y_valid[None, :], cosines, -4.0)


@triton.jit
def _exact(x, u, y, v, dim: tl.constexpr, K: tl.constexpr):
    """The exact cosine of row u of x and row v of y in units of 2**-40, as int64."""
    products = tl.zeros((K,), tl.float64)
    x_squares = tl.zeros((K,), tl.float64)
    y_squares = tl.zeros((K,), tl.float64)
    for start in range(0, dim, K):
        entries = start + tl.arange(0, K)
        left = tl.load(x + u.to(tl.int64) * dim + entries, mask=entries < dim, other=0.0).to(tl.float64)
        right = tl.load(y + v.to(tl.int64) * dim + entries, mask=entries < dim, other=0.0).to(tl.float64)
        products += left * right
        x_squares += left * left
        y_squares += right * right
    squares = tl.sum(x_squares, axis=0) * tl.sum(y_squares, axis=0)
    cosine = tl.where(squares > 0, tl.sum(products, axis=0) / tl.sqrt(tl.where(squares > 0, squares, 1.0)), -2.0)
    return tl.floor(cosine * GRID + 0.5).to(tl.int64)


@triton.jit
def _append(pairs, found, limit, chosen, first, second, M: tl.constexpr, N: tl.constexpr):
    """Append the chosen (M, N) pairs of first (M,) and second (N,) to a list; their places in it, flat."""
    flat = tl.reshape(chosen.to(tl.int32), (M * N,))
    places = tl.atomic_add(found, tl.sum(flat, axis=0)) + tl.cumsum(flat, axis=0) - 1
    codes = tl.reshape(first.to(tl.int64)[:, None] * PAIR + second.to(tl.int64)[None, :], (M * N,))
    tl.store(pairs + places, codes, mask=(flat > 0) & (places < limit))
    return places


@triton.jit
def join_kernel(
    x, inverse, sampled, labels, degrees, pairs, found, limit, size, valid_count, low, high,
    dim: tl.constexpr, SAMPLED: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Unite and count what cosines above `high` join, and list the pairs with cosines above `low` up to that.

    One program per pair of blocks of B vertices (of which those below the diagonal have nothing to do) and graph.

    Args:
        x: (vertices, dim); inverse: (vertices,) float32 inverse lengths, 0 for a zero vector.
        sampled: (vertices,) int8, read if SAMPLED: only edges with a sampled end join.
        labels: (vertices,) int32 parents, united here; degrees: (vertices,) int32, added to here.
        pairs: (limit,) int64 list; found: (1,) int32 its length, which may exceed the limit.
        size: vertices per graph; valid_count: (1,) int32, vertices from there on have no edge.
    """
    blocks = tl.cdiv(size, B)
    tile = tl.program_id(0) % (blocks * blocks)
    i = tile // blocks
    j = tile % blocks
    first = tl.program_id(0) // (blocks * blocks) * size
    end = tl.minimum(size, tl.load(valid_count) - first)
    if (i <= j) & (j * B < end):
        rows = i * B + tl.arange(0, B)
        columns = j * B + tl.arange(0, B)
        cosines = _cosines(
            x, inverse, first + rows, rows < end, x, inverse, first + columns, columns < end, dim, B, B, K
        )
        upper = rows[:, None] < columns[None, :]
        surely = upper & (cosines > high)
        unsure = upper & (cosines > low) & (cosines <= high)
        u = first + rows
        v = first + columns
        if (tl.sum(tl.sum(unsure.to(tl.int32), axis=1), axis=0) > 0) & (tl.load(found, volatile=True) <= limit):
            _append(pairs, found, limit, unsure, u, v, B, B)
        if tl.sum(tl.sum(surely.to(tl.int32), axis=1), axis=0) > 0:
            tl.atomic_add(degrees + u, tl.sum(surely.to(tl.int32), axis=1), mask=rows < end)
            tl.atomic_add(degrees + v, tl.sum(surely.to(tl.int32), axis=0), mask=columns < end)
            if SAMPLED:
                of_rows = tl.load(sampled + u, mask=rows < end, other=0) > 0
                of_columns = tl.load(sampled + v, mask=columns < end, other=0) > 0
                surely = surely & (of_rows[:, None] | of_columns[None, :])
            lowest_of_rows = u
            lowest_of_columns = v
            changed = 1
            while changed > 0:  # lowest vertex of each component of the tile
                beside = tl.min(tl.where(surely, lowest_of_columns[None, :], 2147483647), axis=1)
                new_of_rows = tl.minimum(lowest_of_rows, beside)
                above = tl.min(tl.where(surely, new_of_rows[:, None], 2147483647), axis=0)
                new_of_columns = tl.minimum(lowest_of_columns, above)
                changed = tl.sum((new_of_rows != lowest_of_rows).to(tl.int32), axis=0)
                changed += tl.sum((new_of_columns != lowest_of_columns).to(tl.int32), axis=0)
                lowest_of_rows = new_of_rows
                lowest_of_columns = new_of_columns
            _unite(labels, u, lowest_of_rows, u != lowest_of_rows)
            _unite(labels, v, lowest_of_columns, v != lowest_of_columns)


@triton.jit
def settle_kernel(
    x, sampled, labels, degrees, pairs, found, limit, threshold,
    dim: tl.constexpr, SAMPLED: tl.constexpr, PROGRAMS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Unite and count the listed pairs whose exact cosine, in units of 2**-40, is above `threshold` (int64)."""
    index = tl.program_id(0)
    end = tl.minimum(tl.load(found), limit)
    while index < end:
        pair = tl.load(pairs + index)
        index += PROGRAMS
        u = (pair // PAIR).to(tl.int32)
        v = (pair % PAIR).to(tl.int32)
        if _exact(x, u, x, v, dim, K) > threshold:
            tl.atomic_add(degrees + u, 1)
            tl.atomic_add(degrees + v, 1)
            joins = 1
            if SAMPLED:
                joins = tl.load(sampled + u).to(tl.int32) + tl.load(sampled + v).to(tl.int32)
            one = tl.zeros((1,), tl.int32)
            _unite(labels, u + one, v + one, (joins + one) > 0)


@triton.jit
def flatten_kernel(labels, count, B: tl.constexpr):
    """Replace every parent by its root."""
    vertices = tl.program_id(0) * B + tl.arange(0, B)
    roots = _roots(labels, vertices, vertices < count)
    tl.store(labels + vertices, roots, mask=vertices < count)


@triton.jit
def edges_kernel(
    x, inverse, sampled, weights, pairs, found, limit, size, first_block, low,
    dim: tl.constexpr, SAMPLED: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """List the pairs whose cosine is above `low`, and the cosines (limit,) float32.

    One program per block of B columns, block of B rows from `first_block` on, and graph.
    """
    i = first_block + tl.program_id(1)
    j = tl.program_id(0)
    first = tl.program_id(2) * size
    if i <= j:
        rows = i * B + tl.arange(0, B)
        columns = j * B + tl.arange(0, B)
        u = first + rows
        v = first + columns
        cosines = _cosines(x, inverse, u, rows < size, x, inverse, v, columns < size, dim, B, B, K)
        chosen = (rows[:, None] < columns[None, :]) & (cosines > low)
        if SAMPLED:
            of_rows = tl.load(sampled + u, mask=rows < size, other=0) > 0
            of_columns = tl.load(sampled + v, mask=columns < size, other=0) > 0
            chosen = chosen & (of_rows[:, None] | of_columns[None, :])
        if tl.sum(tl.sum(chosen.to(tl.int32), axis=1), axis=0) > 0:
            places = _append(pairs, found, limit, chosen, u, v, B, B)
            wanted = (tl.reshape(chosen.to(tl.int32), (B * B,)) > 0) & (places < limit)
            tl.store(weights + places, tl.reshape(cosines, (B * B,)), mask=wanted)


@triton.jit
def sums_kernel(x, order, starts, sizes, sums, segments, dim: tl.constexpr, MEANS: tl.constexpr, K: tl.constexpr):
    """Add the rows of x in each segment of `order` to its row of `sums`, one after the other, and average.

    One program per segment and block of K entries; segments from `segments` (1,) on are left alone.

    Args:
        order: (rows,) int64; starts, sizes: (n,) int64 of each segment in it.
        sums: (n, dim) float32; averaged over the added rows, and, unless MEANS, over what was there before.
    """
    segment = tl.program_id(0).to(tl.int64)
    if segment < tl.load(segments):
        entries = tl.program_id(1) * K + tl.arange(0, K)
        inside = entries < dim
        index = tl.load(starts + segment)
        size = tl.load(sizes + segment)
        end = index + size
        total = tl.load(sums + segment * dim + entries, mask=inside, other=0.0)
        while index < end:
            for ahead in tl.static_range(AHEAD):  # unrolled, so that loads do not wait for additions
                row = tl.load(order + tl.minimum(index + ahead, end - 1))
                value = tl.load(x + row * dim + entries, mask=inside, other=0.0).to(tl.float32)
                total = tl.where(index + ahead < end, total + value, total)
            index += AHEAD
        if MEANS:
            divisor = size.to(tl.float32)
        else:
            divisor = (size + 1).to(tl.float32)
        tl.store(sums + segment * dim + entries, tl.div_rn(total, tl.zeros((K,), tl.float32) + divisor), mask=inside)


@triton.jit
def nearest_kernel(
    x, inverse, rows, rows_count, kept, kept_inverse, kept_count, best, pairs, found, limit, near,
    dim: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """For each listed row of x the kept row of highest cosine, and the pairs within `near` of it if it has rivals.

    One program per block of M rows.

    Args:
        rows: (n,) int64, of which `rows_count` (1,) are looked at; best: (n,) int64; pairs: of places in `rows` and
            kept rows, (limit,) int64; found: (1,) int32 their number.
        kept: (k, dim), of which `kept_count` (1,) are compared with.
    """
    places = tl.program_id(0) * M + tl.arange(0, M)
    count = tl.load(rows_count)
    if tl.program_id(0) * M < count:
        valid = places < count
        u = tl.load(rows + places, mask=valid, other=0)
        columns = tl.load(kept_count).to(tl.int32)
        highest = tl.full((M,), -4.0, tl.float32)
        second = tl.full((M,), -4.0, tl.float32)
        at = tl.zeros((M,), tl.int32)
        start = 0
        while start < columns:
            v = start + tl.arange(0, N)
            cosines = _cosines(x, inverse, u, valid, kept, kept_inverse, v, v < columns, dim, M, N, K)
            top = tl.max(cosines, axis=1)
            where = tl.argmax(cosines, axis=1)
            others = tl.where(tl.arange(0, N)[None, :] == where[:, None], -4.0, cosines)
            second = tl.maximum(tl.minimum(highest, top), tl.maximum(second, tl.max(others, axis=1)))
            at = tl.where(top > highest, start + where.to(tl.int32), at)
            highest = tl.maximum(highest, top)
            start += N
        tl.store(best + places, at.to(tl.int64), mask=valid)
        contested = valid & (highest > -2.0) & (second >= highest - near)
        if tl.sum(contested.to(tl.int32), axis=0) > 0:
            start = 0
            while start < columns:
                v = start + tl.arange(0, N)
                cosines = _cosines(x, inverse, u, valid, kept, kept_inverse, v, v < columns, dim, M, N, K)
                chosen = contested[:, None] & (cosines >= (highest - near)[:, None])
                any_chosen = tl.sum(tl.sum(chosen.to(tl.int32), axis=1), axis=0) > 0
                if any_chosen & (tl.load(found, volatile=True) <= limit):
                    _append(pairs, found, limit, chosen, places, v, M, N)
                start += N


@triton.jit
def rivals_kernel(
    x, rows, kept, pairs, found, limit, keys, dim: tl.constexpr, PROGRAMS: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Raise keys (n,) int64 to the highest of `exact cosine * COLUMNS - kept row` among each row's listed pairs.

    The cosine is in units of 2**-40, so that the higher one wins, and of equal ones the first kept row.
    """
    index = tl.program_id(0)
    end = tl.minimum(tl.load(found), limit)
    while index < end:
        pair = tl.load(pairs + index)
        index += PROGRAMS
        place = pair // PAIR
        v = pair % PAIR
        cosine = _exact(x, tl.load(rows + place), kept, v, dim, K)
        tl.atomic_max(keys + place, cosine * COLUMNS - v)
