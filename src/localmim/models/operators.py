"""Elementary operators in the form that suits the device, with equal results: MindSpore's fused ones on GPU and Ascend.

On a CPU, MindSpore's LayerNorm, the gradients of it and of softmax, and every reduction run on one thread, and kernels
that broadcast by themselves are slow and keep 16 bytes for each element of their output as long as the graph lives.
There these operators are made of what is fast: products, with a vector of ones for a sum and with one column and one
row for values that are constant along the other side, and `BiasAdd`, which adds one number to each row as well.
Transposing is three times as slow there as gathering whole rows, and keeps 8 bytes for each element, or up to 16.

docs/performance.md lists the forms by device.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

FLASH_CHIPS = ("ascend910b", "ascend910_93")  # Atlas A2 and A3


class Operator(nn.Cell):
    """An operator with a form for CPUs and one that MindSpore has fused kernels for.

    Attributes:
        fused: Which of them a graph is compiled from; at the start, what suits the present device.
    """

    def __init__(self):
        super().__init__()
        self.fused = ms.get_context("device_target") != "CPU"


def has_flash_attention() -> bool:
    """Whether MindSpore has flash attention on this device: on Ascend, from Atlas A2 on."""
    if ms.get_context("device_target") != "Ascend":
        return False
    from mindspore._c_expression import MSContext  # has no public name

    return MSContext.get_instance().get_ascend_soc_version() in FLASH_CHIPS


class AddBias(Operator):
    """x + b over rows."""

    def __init__(self):
        super().__init__()
        self.add = ops.BiasAdd()
        self.by_product = _AddBias()

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        """[n, D], [D] -> [n, D]."""
        return self.add(x, bias) if self.fused else self.by_product(x, bias)


class _AddBias(nn.Cell):
    """The gradient of the bias is a row of ones times that of x."""

    def __init__(self):
        super().__init__()
        self.add = ops.BiasAdd()
        self.matmul = ops.MatMul()

    def construct(self, x, bias):
        return self.add(x, bias)

    def bprop(self, x, bias, out, dout):
        ones = ops.ones((1, dout.shape[0]), dout.dtype)
        return dout, self.matmul(ones, dout).reshape(bias.shape)


class AddToRows(nn.Cell):
    """x + b, one number a row: a bias whose channels are the rows. Its gradient sums each row by a column of ones."""

    def __init__(self):
        super().__init__()
        self.add = ops.BiasAdd()
        self.matmul = ops.MatMul()

    def construct(self, x: Tensor, values: Tensor) -> Tensor:
        """[n, D], [n] -> [n, D]."""
        return self.add(x.reshape(1, *x.shape), values).reshape(x.shape)

    def bprop(self, x, values, out, dout):
        ones = ops.ones((dout.shape[1], 1), dout.dtype)
        return dout, self.matmul(dout, ones).reshape(values.shape)


class Normalise(Operator):
    """LayerNorm over rows, float32: mean 0 and variance 1, then times gamma plus beta."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)
        self.by_products = _Normalise(eps)

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """[n, D], [D], [D] -> [n, D]."""
        return self.norm(x, gamma, beta)[0] if self.fused else self.by_products(x, gamma, beta)[0]


class _Normalise(nn.Cell):
    """With r = 1 / sqrt(variance + eps): y = r (x - mean) gamma + beta."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.matmul = ops.MatMul()
        self.add = ops.BiasAdd()
        self.add_to_rows = AddToRows()

    def construct(self, x, gamma, beta):
        """(y [n, D], x - mean [n, D], r [n, 1]); the backward pass reads the last two."""
        D = x.shape[1]
        share = ops.ones((D, 1), ms.float32) * (1.0 / D)
        centred = self.add_to_rows(x, self.matmul(x, -share).reshape(-1))
        r = ops.rsqrt(self.matmul(centred * centred, share) + self.eps)
        y = self.add(centred * self.matmul(r, gamma.reshape(1, D)), beta)
        return y, centred, r

    def bprop(self, x, gamma, beta, out, dout):
        n, D = x.shape
        _, centred, r = out
        dy = dout[0]
        along = dy * centred
        dgamma = self.matmul(r.reshape(1, n), along).reshape(D)
        dbeta = self.matmul(ops.ones((1, n), ms.float32), dy).reshape(D)
        share = gamma.reshape(D, 1) * (-1.0 / D)
        shift, slope = self.matmul(dy, share) * r, self.matmul(along, share) * r * r * r  # [n, 1]
        dx = dy * self.matmul(r, gamma.reshape(1, D)) + centred * self.matmul(slope, ops.ones((1, D), ms.float32))
        return self.add_to_rows(dx, shift.reshape(-1)), dgamma, dbeta


class Softmax(Operator):
    """Softmax over the last axis."""

    def __init__(self):
        super().__init__()
        self.softmax = ops.Softmax(-1)
        self.by_products = _Softmax()

    def construct(self, x: Tensor) -> Tensor:
        """[..., N] -> [..., N]."""
        return self.softmax(x) if self.fused else self.by_products(x)


class _Softmax(nn.Cell):
    """dx = y (dy - sum of y dy over the row)."""

    def __init__(self):
        super().__init__()
        self.softmax = ops.Softmax(-1)
        self.matmul = ops.MatMul()
        self.add_to_rows = AddToRows()

    def construct(self, x):
        return self.softmax(x)

    def bprop(self, x, out, dout):
        N = x.shape[-1]
        y, dy = out.reshape(-1, N), dout.reshape(-1, N)
        sums = self.matmul(y * dy, -ops.ones((N, 1), x.dtype)).reshape(-1)
        return ((y * self.add_to_rows(dy, sums)).reshape(x.shape),)


# Phi(x) = sigmoid(x * P(x^2)): P fitted by minimax on the error of GELU over |x| < 6.2. The leading coefficient is
# positive, so the sigmoid saturates the right way for every larger |x|.
_PHI = (3.61876726e-09, -2.67295768e-07, 7.94625892e-06, -1.10556094e-04, -6.59089978e-05, 7.26678224e-02, 1.595768984)
_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


class Gelu(Operator):
    """Exact GELU, x * Phi(x), computed in float32.

    On a CPU without `erf`, which is slow there: Phi is sigmoid(x * P(x^2)) with a degree-6 P fitted to the exact
    function: within 6e-7 of it everywhere, where float32 erf itself is within 4.5e-7. Every file format has this form.
    """

    def __init__(self):
        super().__init__()
        self.by_sigmoid = _GeluAndPhi()

    def construct(self, x: Tensor) -> Tensor:
        """[...] -> [...], of x's dtype."""
        wide = x.astype(ms.float32)
        y = wide * (0.5 + 0.5 * ops.erf(wide * math.sqrt(0.5))) if self.fused else self.by_sigmoid(wide)[0]
        return y.astype(x.dtype)


class _GeluAndPhi(nn.Cell):
    """GELU and the normal distribution function it used, which the backward pass reads again."""

    def construct(self, x):
        z = x * x
        p = z * _PHI[0] + _PHI[1]
        p = p * z + _PHI[2]
        p = p * z + _PHI[3]
        p = p * z + _PHI[4]
        p = p * z + _PHI[5]
        p = p * z + _PHI[6]
        phi = ops.sigmoid(p * x)
        return x * phi, phi

    def bprop(self, x, out, dout):
        density = ops.exp(x * x * -0.5) * _INV_SQRT_2PI
        return (dout[0] * (out[1] + x * density),)


class SplitHeads(Operator):
    """Rows of queries, keys and values side by side become those of each head."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.gather = _GatherHeads()

    def construct(self, qkv: Tensor, skip: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, 3D] -> queries [B, nh, N - skip, hd], without the first `skip`; keys and values [B, nh, N, hd]."""
        nh, hd = self.num_heads, qkv.shape[2] // (3 * self.num_heads)
        B, N = qkv.shape[0], qkv.shape[1]
        if self.fused:
            q, k, v = ops.split(qkv, nh * hd, 2)
            q = (q[:, skip:] if skip else q).reshape(B, N - skip, nh, hd).transpose(0, 2, 1, 3)
            k, v = (x.reshape(B, N, nh, hd).transpose(0, 2, 1, 3) for x in (k, v))
            return q, k, v
        q, k, v = self.gather(qkv.reshape(-1, hd), *_rows_of_heads(B, N, nh, skip))
        return q.reshape(B, nh, N - skip, hd), k.reshape(B, nh, N, hd), v.reshape(B, nh, N, hd)


@ops.constexpr
def _rows_of_heads(B: int, N: int, nh: int, skip: int) -> tuple[Tensor, ...]:
    """Of rows [B*N*3*nh, hd], those of q, k and v, head by head; and where in these each row is, or after the last."""
    rows = np.arange(B * N * 3 * nh, dtype=np.int32).reshape(B, N, 3, nh).transpose(2, 0, 3, 1)  # [3, B, nh, N]
    taken = [np.ascontiguousarray(x).reshape(-1) for x in (rows[0, :, :, skip:], rows[1], rows[2])]
    order = np.concatenate(taken)
    back = np.full(rows.size, len(order), np.int32)
    back[order] = np.arange(len(order))
    return tuple(Tensor(x) for x in (*taken, back))


class _GatherHeads(nn.Cell):
    """Rows of a matrix by three lists that share none; the gradient is gathered as well, by `back`."""

    def __init__(self):
        super().__init__()
        self.gather = ops.Gather()

    def construct(self, rows, q, k, v, back):
        return self.gather(rows, q, 0), self.gather(rows, k, 0), self.gather(rows, v, 0)

    def bprop(self, rows, q, k, v, back, out, dout):
        parts = dout[0], dout[1], dout[2]
        if q.shape[0] < k.shape[0]:  # rows that nobody took
            parts += (ops.zeros((1, rows.shape[1]), dout[0].dtype),)
        zeros = ops.zeros_like(q), ops.zeros_like(k), ops.zeros_like(v), ops.zeros_like(back)
        return self.gather(ops.concat(parts, 0), back, 0), *zeros


class Transpose(Operator):
    """Axes in another order, the last one in its place."""

    def __init__(self):
        super().__init__()
        self.gather = _GatherAll()

    def construct(self, x: Tensor, order: tuple[int, ...]) -> Tensor:
        """x.transpose(order), where `order` ends with the last axis."""
        if self.fused:
            return x.transpose(order)
        shape = x.shape
        rows = self.gather(x.reshape(-1, shape[-1]), *_rows_in_order(shape[:-1], order[:-1]))
        return rows.reshape([shape[axis] for axis in order])


@ops.constexpr
def _rows_in_order(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Which row comes to each place when axes change their order, and the place of each row."""
    rows = np.arange(math.prod(shape), dtype=np.int32).reshape(shape).transpose(order).reshape(-1)
    return Tensor(rows), Tensor(np.argsort(rows).astype(np.int32))


class _GatherAll(nn.Cell):
    """All rows of a matrix in another order; the gradient is gathered as well, by `back`."""

    def __init__(self):
        super().__init__()
        self.gather = ops.Gather()

    def construct(self, rows, order, back):
        return self.gather(rows, order, 0)

    def bprop(self, rows, order, back, out, dout):
        return self.gather(dout, back, 0), ops.zeros_like(order), ops.zeros_like(back)
