"""Layer norm and RMS norm, forward and backward, with the residual add fused both ways.

    s = x + residual                           (rounded to x's dtype, and returned)
    h = (s - mean(s)) / sqrt(var(s) + eps)     layer norm; s / sqrt(mean(s^2) + eps) for RMS norm
    y = h * weight + bias

    g  = dy * weight
    ds = rstd * (g - mean(g) - h * mean(g * h)) + ds_in      (RMS norm: without mean(g))
    dweight = sum of dy * h over the rows,   dbias = sum of dy

All arithmetic is float32. The forward pass saves mean and rstd = 1 / sqrt(var + eps), 8 bytes a row, and
the variance is that of the deviations from the mean: rows with a large mean lose nothing.

Cost, M rows of C elements of b bytes: forward reads x (and residual) and writes y (and s), 2 M C b (or
4 M C b); backward reads dy and s and writes ds, 3 M C b. At 32768 x 768 in float16 that is 101 and 151 MB.
Nothing here comes near a limit but memory's.

Up to 2048 columns (768 backward) a row is one warp's: in pieces of 16 bytes a lane, whose sums meet in a few
exchanges between lanes and no barrier. 32768 rows of 768 are then a quarter of the instructions that an H100 has time
for while it moves the bytes; spread over 4 warps, of which 768 columns leave one idle, they were three quarters.

The rows of the backward pass are dealt to a fixed number of programs per multiprocessor, as many as find room
together. Each loads its next rows before it works on these, keeps its share of dweight and dbias in registers and
writes one float32 row; a second, small kernel adds those rows up in their order. No atomics: the same input gives the
same bits.

DEPENDENT (see `gpukernels.launches`): weight and bias are loaded before the wait, and the next kernel may start
behind it.

Ba et al., arXiv 1607.06450; Zhang and Sennrich, arXiv 1910.07467.
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)
import torch
import triton
import triton.language as tl

from gpukernels.kernels.device import cdiv, dependent_launch, gpu, rows
from gpukernels.kernels.partials import add_partials
from gpukernels.kernels.tiles import norm_backward_tile, norm_forward_tile


@triton.jit
def _load_piece(ptr, at, row_mask, N, WHOLE: tl.constexpr):
    """Columns `at` of a block of rows, whose pointers `ptr` (BLOCK_M, 1) are; 0 behind the last row and column."""
    if WHOLE:
        piece = tl.load(ptr + at[None, :], row_mask[:, None], other=0.0)
    else:
        piece = tl.load(ptr + at[None, :], row_mask[:, None] & (at < N)[None, :], other=0.0)
    return piece


@triton.jit
def _store_piece(ptr, piece, at, row_mask, N, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(ptr + at[None, :], piece, row_mask[:, None])
    else:
        tl.store(ptr + at[None, :], piece, row_mask[:, None] & (at < N)[None, :])


@triton.jit
def _load_parameter(ptr, at, N, BLOCK_M: tl.constexpr, WHOLE: tl.constexpr):
    """Columns `at` of a weight or bias, a copy for each row: every lane has what it needs where it needs it."""
    at = tl.zeros((BLOCK_M, 1), tl.int32) + at[None, :]
    return tl.load(ptr + at) if WHOLE else tl.load(ptr + at, at < N, other=0.0)


@triton.jit
def norm_rows(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    first, M, N, stride_xm, stride_residual_m, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr, CENTER: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows from `first` on, in registers; without rstd_ptr no statistics are stored.

    A row is PIECES pieces of BLOCK_N columns, of which WHOLE are whole.
    """
    row = first + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    row_mask = row < M
    row = row.to(tl.int64)

    weights = ()
    biases = ()
    for piece in tl.static_range(PIECES):
        at = piece * BLOCK_N + col
        weights = weights + (_load_parameter(weight_ptr, at, N, BLOCK_M, piece < WHOLE),)
        if bias_ptr is not None:
            biases = biases + (_load_parameter(bias_ptr, at, N, BLOCK_M, piece < WHOLE),)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    pieces = ()
    for piece in tl.static_range(PIECES):
        at = piece * BLOCK_N + col
        s = _load_piece(x_ptr + row[:, None] * stride_xm, at, row_mask, N, piece < WHOLE)
        if residual_ptr is not None:
            residual = _load_piece(residual_ptr + row[:, None] * stride_residual_m, at, row_mask, N, piece < WHOLE)
            # Rounded before it is used: the backward pass reads what is stored here.
            s = (s.to(tl.float32) + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
            _store_piece(total_ptr + row[:, None] * N, s, at, row_mask, N, piece < WHOLE)
        pieces = pieces + (s.to(tl.float32),)

    if CENTER:
        total = pieces[0]
        for piece in tl.static_range(1, PIECES):
            total += pieces[piece]
        mean = tl.sum(total, 1) / N
        deviations = ()
        for piece in tl.static_range(PIECES):
            deviation = pieces[piece] - mean[:, None]
            if piece >= WHOLE:
                deviation = tl.where((piece * BLOCK_N + col < N)[None, :], deviation, 0.0)
            deviations = deviations + (deviation,)
        pieces = deviations
    squares = pieces[0] * pieces[0]
    for piece in tl.static_range(1, PIECES):
        squares += pieces[piece] * pieces[piece]
    rstd = 1 / tl.sqrt_rn(tl.sum(squares, 1) / N + eps)

    for piece in tl.static_range(PIECES):
        y = pieces[piece] * rstd[:, None] * weights[piece].to(tl.float32)
        if bias_ptr is not None:
            y += biases[piece].to(tl.float32)
        y = y.to(y_ptr.dtype.element_ty)
        _store_piece(y_ptr + row[:, None] * N, y, piece * BLOCK_N + col, row_mask, N, piece < WHOLE)
    if rstd_ptr is not None:
        if CENTER:
            tl.store(mean_ptr + row, mean, row_mask)
        tl.store(rstd_ptr + row, rstd, row_mask)


@triton.jit
def _norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    M, N, stride_xm, stride_residual_m, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr, CENTER: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows."""
    norm_rows(
        x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
        tl.program_id(0) * BLOCK_M, M, N, stride_xm, stride_residual_m, eps,
        BLOCK_M, BLOCK_N, PIECES, WHOLE, CENTER, DEPENDENT,
    )  # fmt: skip


@triton.jit
def _norm_forward_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    N, stride_xm, stride_residual_m, eps,
    BLOCK_N: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """One row, in pieces: once for the statistics, once more (from the L2 cache) for the result."""
    row = tl.program_id(0).to(tl.int64)
    mean, squares = 0.0, 0.0  # of the elements so far: their mean, and the sum of squared deviations from it
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        mask = col < N
        s = tl.load(x_ptr + row * stride_xm + col, mask, other=0.0)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + row * stride_residual_m + col, mask, other=0.0)
            s = (s.to(tl.float32) + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row * N + col, s, mask)
        s = s.to(tl.float32)
        if CENTER:
            # Two groups' statistics make those of both: Chan, Golub and LeVeque (1983).
            count = tl.minimum(N - start, BLOCK_N).to(tl.float32)
            piece_mean = tl.sum(s, 0) / count
            deviation = tl.where(mask, s - piece_mean, 0.0)
            step = piece_mean - mean
            squares += tl.sum(deviation * deviation, 0) + step * step * (count * start / (start + count))
            mean += step * (count / (start + count))
        else:
            squares += tl.sum(s * s, 0)
    rstd = 1 / tl.sqrt_rn(squares / N + eps)
    if CENTER:
        tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)

    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        mask = col < N
        s = tl.load(x_ptr + row * stride_xm + col, mask, other=0.0)
        if residual_ptr is not None:  # added again: what was stored above may not be visible yet
            residual = tl.load(residual_ptr + row * stride_residual_m + col, mask, other=0.0)
            s = (s.to(tl.float32) + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        y = (s.to(tl.float32) - mean) * rstd * tl.load(weight_ptr + col, mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + col, mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * N + col, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _norm_backward_means_kernel(
    dy_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, means_ptr,
    M, N, stride_dym, stride_sm,
    BLOCK_N: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """mean(g h) and mean(g) of one row that does not fit the registers: means (2, M), float32."""
    row = tl.program_id(0).to(tl.int64)
    mean = tl.load(mean_ptr + row) if CENTER else 0.0
    rstd = tl.load(rstd_ptr + row)
    all_gh, all_g = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        mask = col < N
        dy = tl.load(dy_ptr + row * stride_dym + col, mask, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + row * stride_sm + col, mask, other=0.0).to(tl.float32)
        g = dy * tl.load(weight_ptr + col, mask, other=0.0).to(tl.float32)
        all_gh += g * ((s - mean) * rstd)  # where the mask is off, g is 0
        all_g += g
    tl.store(means_ptr + row, tl.sum(all_gh, 0) / N)
    tl.store(means_ptr + M + row, tl.sum(all_g, 0) / N)


@triton.jit
def _load_rows(
    dy_ptr, s_ptr, mean_ptr, rstd_ptr, start, col, M, N, stride_dym, stride_sm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows from `start` on: pieces of dy and of s, mean, rstd; 0 behind the last row and column."""
    row = start + tl.arange(0, BLOCK_M)
    row_mask = row < M
    row = row.to(tl.int64)
    dys = ()
    rows = ()
    for piece in tl.static_range(PIECES):
        at = piece * BLOCK_N + col
        dys = dys + (_load_piece(dy_ptr + row[:, None] * stride_dym, at, row_mask, N, piece < WHOLE),)
        rows = rows + (_load_piece(s_ptr + row[:, None] * stride_sm, at, row_mask, N, piece < WHOLE),)
    rstd = tl.load(rstd_ptr + row, row_mask, other=0.0)
    mean = tl.load(mean_ptr + row, row_mask, other=0.0) if CENTER else rstd
    return dys, rows, mean, rstd


@triton.jit
def _norm_backward_kernel(
    dy_ptr, dtotal_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, means_ptr, ds_ptr, partial_ptr,
    M, N, stride_dym, stride_dtotal_m, stride_sm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr, CENTER: tl.constexpr,
    NEEDS_DX: tl.constexpr, NEEDS_DWEIGHT: tl.constexpr, NEEDS_DBIAS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Pieces of BLOCK_N columns of BLOCK_M rows at a time; program p of P takes the blocks of rows p, p + P, ...

    The pieces, of which WHOLE are whole, make whole rows, unless the rows' means come in `means`. AHEAD: the next rows
    are loaded while these are at work.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    step = programs.to(tl.int64) * BLOCK_M
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    weights = ()
    dweights = ()
    dbiases = ()
    for piece in tl.static_range(PIECES):
        weights = weights + (_load_parameter(weight_ptr, piece * BLOCK_N + col, N, BLOCK_M, piece < WHOLE),)
        dweights = dweights + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
        dbiases = dbiases + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    first = program * BLOCK_M
    if AHEAD:
        dys, rows, mean, rstd = _load_rows(
            dy_ptr, s_ptr, mean_ptr, rstd_ptr, first, col, M, N, stride_dym, stride_sm,
            BLOCK_M, BLOCK_N, PIECES, WHOLE, CENTER,
        )  # fmt: skip
    for start in tl.range(first, M, step, disable_licm=True):
        next_dys, next_rows, next_mean, next_rstd = _load_rows(
            dy_ptr, s_ptr, mean_ptr, rstd_ptr, start + step if AHEAD else start, col, M, N, stride_dym, stride_sm,
            BLOCK_M, BLOCK_N, PIECES, WHOLE, CENTER,
        )  # fmt: skip
        if not AHEAD:
            dys, rows, mean, rstd = next_dys, next_rows, next_mean, next_rstd
        row = start + tl.arange(0, BLOCK_M)
        row_mask = row < M
        row = row.to(tl.int64)
        # Where the mask is off, dy is 0, and so is all that is added up below.
        hs = ()
        for piece in tl.static_range(PIECES):
            h = rows[piece].to(tl.float32)
            if CENTER:
                h -= mean[:, None]
            hs = hs + (h * rstd[:, None],)
        if NEEDS_DX:
            if means_ptr is None:
                sum_gh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                sum_g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for piece in tl.static_range(PIECES):
                    g = dys[piece].to(tl.float32) * weights[piece].to(tl.float32)
                    sum_gh += g * hs[piece]
                    sum_g += g
                mean_gh, mean_g = tl.sum(sum_gh, 1) / N, tl.sum(sum_g, 1) / N
            else:
                mean_gh = tl.load(means_ptr + row, row_mask, other=0.0)
                mean_g = tl.load(means_ptr + M + row, row_mask, other=0.0)
            for piece in tl.static_range(PIECES):
                at = piece * BLOCK_N + col
                ds = dys[piece].to(tl.float32) * weights[piece].to(tl.float32) - hs[piece] * mean_gh[:, None]
                if CENTER:
                    ds -= mean_g[:, None]
                ds *= rstd[:, None]
                if dtotal_ptr is not None:
                    dtotal = dtotal_ptr + row[:, None] * stride_dtotal_m
                    ds += _load_piece(dtotal, at, row_mask, N, piece < WHOLE).to(tl.float32)
                ds = ds.to(ds_ptr.dtype.element_ty)
                _store_piece(ds_ptr + row[:, None] * N, ds, at, row_mask, N, piece < WHOLE)
        new_dweights = ()
        new_dbiases = ()
        for piece in tl.static_range(PIECES):
            dy = dys[piece].to(tl.float32)
            new_dweights = new_dweights + (dweights[piece] + dy * hs[piece] if NEEDS_DWEIGHT else dweights[piece],)
            new_dbiases = new_dbiases + (dbiases[piece] + dy if NEEDS_DBIAS else dbiases[piece],)
        dweights, dbiases = new_dweights, new_dbiases
        if AHEAD:
            dys, rows, mean, rstd = next_dys, next_rows, next_mean, next_rstd
    for piece in tl.static_range(PIECES):
        at = piece * BLOCK_N + col
        partial = partial_ptr + program.to(tl.int64) * N + at
        if NEEDS_DWEIGHT:
            tl.store(partial, tl.sum(dweights[piece], 0), at < N)
            partial += programs.to(tl.int64) * N
        if NEEDS_DBIAS:
            tl.store(partial, tl.sum(dbiases[piece], 0), at < N)


def norm_forward(x, weight, bias, residual, eps, *, center):
    """y, s, mean, rstd. Without residual s is empty (it is x); without `center` (RMS norm) mean is."""
    shape, x = x.shape, rows(x)
    M, N = x.shape
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    total = torch.empty(shape if residual is not None else 0, dtype=x.dtype, device=x.device)
    mean = torch.empty(M if center else 0, dtype=torch.float32, device=x.device)
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    residual = None if residual is None else rows(residual)
    given = (weight, bias)
    early = (weight.contiguous(), None if bias is None else bias.contiguous())
    arrays = (x, residual, *early, y, total, mean, rstd)
    strides = (x.stride(0), 0 if residual is None else residual.stride(0))
    tile = norm_forward_tile(N, x.element_size())
    pieces = cdiv(N, tile.BLOCK_N)
    if tile.whole:
        _norm_forward_kernel[(cdiv(M, tile.BLOCK_M),)](
            *arrays, M, N, *strides, eps,
            BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, PIECES=max(1, pieces), WHOLE=N // tile.BLOCK_N, CENTER=center,
            num_warps=tile.num_warps, **dependent_launch(given, early),
        )  # fmt: skip
    else:
        _norm_forward_wide_kernel[(M,)](
            *arrays, N, *strides, eps, BLOCK_N=tile.BLOCK_N, CENTER=center, num_warps=tile.num_warps
        )
    return y, total, mean, rstd


def norm_backward(dy, dtotal, s, weight, mean, rstd, *, center, needs_dx, needs_dweight, needs_dbias):
    """ds of s's dtype, dweight and dbias of weight's; what is not needed comes back empty.

    dtotal, the gradient of the returned sum, is added to ds; None: there is none.
    """
    shape, dy, s = s.shape, rows(dy), rows(s)
    M, N = s.shape
    dtotal = None if dtotal is None else rows(dtotal)
    ds = torch.empty(shape if needs_dx else 0, dtype=s.dtype, device=s.device)
    dweight = torch.empty(N if needs_dweight else 0, dtype=weight.dtype, device=s.device)
    dbias = torch.empty(N if needs_dbias else 0, dtype=weight.dtype, device=s.device)

    tile = norm_backward_tile(N, s.element_size())
    programs = min(cdiv(M, tile.BLOCK_M), gpu().multiprocessors * tile.per_multiprocessor)
    sums = needs_dweight + needs_dbias
    partial = torch.empty((sums, programs, N), dtype=torch.float32, device=s.device)
    weight, means = weight.contiguous(), None
    if not tile.whole and needs_dx:
        means = torch.empty((2, M), dtype=torch.float32, device=s.device)
        _norm_backward_means_kernel[(M,)](
            dy, s, weight, mean, rstd, means, M, N, dy.stride(0), s.stride(0),
            BLOCK_N=tile.BLOCK_N, CENTER=center, num_warps=tile.num_warps,
        )  # fmt: skip
    pieces = cdiv(N, tile.BLOCK_N)
    _norm_backward_kernel[(programs, 1 if tile.whole else pieces)](
        dy, dtotal, s, weight, mean, rstd, means, ds, partial,
        M, N, dy.stride(0), 0 if dtotal is None else dtotal.stride(0), s.stride(0),
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, PIECES=pieces if tile.whole else 1,
        WHOLE=N // tile.BLOCK_N if tile.whole else int(N % tile.BLOCK_N == 0), CENTER=center,
        NEEDS_DX=needs_dx, NEEDS_DWEIGHT=needs_dweight, NEEDS_DBIAS=needs_dbias,
        AHEAD=tile.whole and tile.num_warps < 16, num_warps=tile.num_warps,
    )  # fmt: skip
    if sums:
        add_partials(partial, *(out for out, needed in ((dweight, needs_dweight), (dbias, needs_dbias)) if needed))
    return ds, dweight, dbias
