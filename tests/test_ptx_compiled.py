"""Small CUDA C++ kernels, compiled to PTX by nvcc and executed by the PTX machine: what compilers write.

Each also without one of its barriers, which has to be reported.
"""

import shutil
import struct
import subprocess
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx import machine, program
from tests.ptx.errors import PtxError

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is missing")

SOURCE = r"""
#include <cstdint>
#include <cuda_fp16.h>
#ifdef WITHOUT_BARRIER
#define BARRIER()
#else
#define BARRIER() __syncthreads()
#endif

// One block sums a row: within warps by shuffles, between them through shared memory.
extern "C" __global__ void row_sums(const float* in, float* out, int columns) {
  __shared__ float parts[32];
  float sum = 0;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += in[(int64_t)blockIdx.x * columns + i];
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  BARRIER();
  if (threadIdx.x == 0) {
    float total = 0;
    for (int i = 0; i < blockDim.x / 32; ++i) total += parts[i];
    out[blockIdx.x] = total;
  }
}

// Counts in shared memory, added up by atomic changes.
extern "C" __global__ void histogram(const unsigned char* in, int n, unsigned* out) {
  extern __shared__ unsigned counts[];
  for (int i = threadIdx.x; i < 16; i += blockDim.x) counts[i] = 0;
  BARRIER();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) atomicAdd(&counts[in[i] & 15], 1u);
  BARRIER();
  if (threadIdx.x < 16) atomicAdd(&out[threadIdx.x], counts[threadIdx.x]);
}

// A tile is transposed through shared memory, rows padded.
extern "C" __global__ void transpose(const float* in, float* out, int rows, int columns) {
  __shared__ float tile[16][17];
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const int row = blockIdx.y * 16 + y, column = blockIdx.x * 16 + x;
  if (row < rows && column < columns) tile[y][x] = in[row * columns + column];
  BARRIER();
  const int to_row = blockIdx.x * 16 + y, to_column = blockIdx.y * 16 + x;
  if (to_row < columns && to_column < rows) out[to_row * rows + to_column] = tile[x][y];
}

// Threads past the end leave early; the others of their warp still vote.
extern "C" __global__ void compact(const int* in, int n, int* out, int* count) {
  const int i = threadIdx.x;
  if (i >= n) return;
  const bool keep = in[i] % 3 == 0;
  const unsigned kept = __ballot_sync(__activemask_for(n, i), keep);
  int start = 0;
  if (keep && __popc(kept & ((1u << i % 32) - 1)) == 0) start = atomicAdd(count, __popc(kept));
  start = __shfl_sync(__activemask_for(n, i), start, kept ? __ffs(kept) - 1 : 0);
  if (keep) out[start + __popc(kept & ((1u << i % 32) - 1))] = in[i];
}

extern "C" __global__ void integers(const int64_t* a, const int64_t* b, int64_t* out) {
  const int i = threadIdx.x;
  const int64_t x = a[i], y = b[i];
  int64_t* o = out + i * 12;
  o[0] = x / y; o[1] = x % y; o[2] = (int64_t)((uint64_t)x / (uint64_t)y); o[3] = __mul64hi(x, y);
  o[4] = (int64_t)__umul64hi(x, y); o[5] = (int)x / (int)(y | 1); o[6] = (int)__umulhi((unsigned)x, (unsigned)y);
  o[7] = __clz((int)x); o[8] = __brev((unsigned)x); o[9] = __ffsll(x); o[10] = (int8_t)x * (int16_t)y;
  o[11] = x >> (y & 63);
}

extern "C" __global__ void floats(const float* a, const float* b, float* out, int* whole) {
  const int i = threadIdx.x;
  const float x = a[i], y = b[i];
  float* o = out + i * 8;
  o[0] = fmaf(x, y, 1.0f); o[1] = fminf(x, y); o[2] = fmaxf(x, y); o[3] = rintf(x);
  o[4] = __half2float(__float2half_rn(x));
  o[5] = x / y; o[6] = sqrtf(fabsf(x)); o[7] = copysignf(y, x) < 0 ? truncf(y) : floorf(y);
  whole[2 * i] = (int)x; whole[2 * i + 1] = __float2int_rn(y);
}
""".replace("__activemask_for(n, i)", "(i / 32 == n / 32 ? (1u << n % 32) - 1 : 0xffffffffu)")


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    """PTX of the source, whole and without barriers."""
    folder = tmp_path_factory.mktemp("ptx")
    (folder / "kernels.cu").write_text(SOURCE)

    def compiled(*options):
        out = folder / "kernels.ptx"
        command = [
            "nvcc",
            "-std=c++17",
            "-arch=sm_80",
            "-ptx",
            *options,
            str(folder / "kernels.cu"),
            "-o",
            str(out),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return out.read_text()

    return {"whole": compiled(), "broken": compiled("-DWITHOUT_BARRIER")}


def launch(text, name, grid, threads, *arguments, shared=0):
    parsed = program.parse(text, name)
    blob, regions = bytearray(parsed.parameter_bytes), []
    for parameter, value in zip(parsed.parameters.values(), arguments, strict=True):
        if isinstance(value, np.ndarray):
            regions.append(machine.Region(value.ctypes.data, value.nbytes))
            value = value.ctypes.data
        struct.pack_into("<Q" if parameter.size == 8 else "<i", blob, parameter.offset, value)
    machine.launch(parsed, grid, threads, bytes(blob), regions, shared, races=True)


def test_row_sums(ptx):
    rows = np.random.default_rng(0).integers(-99, 99, (3, 500)).astype(np.float32)
    out = np.full(3, np.nan, np.float32)
    launch(ptx["whole"], "row_sums", (3,), 128, rows, out, 500)
    np.testing.assert_array_equal(out, rows.sum(1))
    with pytest.raises(PtxError, match="race in shared memory"):
        launch(ptx["broken"], "row_sums", (3,), 128, rows, out, 500)


def test_histogram(ptx):
    values = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    out = np.zeros(16, np.uint32)
    launch(ptx["whole"], "histogram", (4,), 256, values, 1000, out, shared=64)
    np.testing.assert_array_equal(out, np.bincount(values & 15, minlength=16))
    with pytest.raises(PtxError, match="race in shared memory"):
        launch(ptx["broken"], "histogram", (4,), 256, values, 1000, out, shared=64)
    with pytest.raises(PtxError, match="outside of the block's 60 bytes"):
        launch(ptx["whole"], "histogram", (4,), 256, values, 1000, out, shared=60)
    with pytest.raises(PtxError, match="outside of every tensor"):
        launch(ptx["whole"], "histogram", (4,), 256, values, 1001, out, shared=64)


def test_transpose(ptx):
    values = np.random.default_rng(0).standard_normal((37, 50)).astype(np.float32)
    out = np.full((50, 37), np.nan, np.float32)
    launch(ptx["whole"], "transpose", (4, 3), 256, values, out, 37, 50)
    np.testing.assert_array_equal(out, values.T)
    with pytest.raises(PtxError, match="race in shared memory"):
        launch(ptx["broken"], "transpose", (4, 3), 256, values, out, 37, 50)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 50, 64])
def test_threads_that_leave_early(ptx, n):
    values = np.random.default_rng(n).integers(0, 1000, 64).astype(np.int32)
    out, count = np.full(64, -1, np.int32), np.zeros(1, np.int32)
    launch(ptx["whole"], "compact", (1,), 64, values, n, out, count)
    kept = values[:n][values[:n] % 3 == 0]
    assert (
        count[0] == len(kept) and sorted(out[: len(kept)]) == sorted(kept) and (out[len(kept) :] == -1).all()
    )


def test_integers(ptx):
    rng = np.random.default_rng(0)
    a = rng.integers(-(2**63), 2**63 - 1, 64) >> rng.integers(0, 60, 64)
    b = rng.integers(-(2**63), 2**63 - 1, 64) >> rng.integers(0, 60, 64)
    b[b == 0] = 7
    out = np.zeros((64, 12), np.int64)
    launch(ptx["whole"], "integers", (1,), 64, a, b, out)

    def signed(value, bits):
        value %= 2**bits
        return value - 2**bits if value >> (bits - 1) else value

    def divided(x, y):
        return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)

    for x, y, row in zip(map(int, a), map(int, b), out.tolist()):
        q, u, v = divided(x, y), x % 2**64, y % 2**64
        word = x % 2**32
        small = divided(signed(x, 32), signed(y | 1, 32))
        expected = [q, x - q * y, signed(u // v, 64), x * y >> 64, signed(u * v >> 64, 64), small]
        expected += [
            signed(word * (y % 2**32) >> 32, 32),
            32 - word.bit_length(),
            int(f"{word:032b}"[::-1], 2),
        ]
        expected += [(x & -x).bit_length(), signed(x, 8) * signed(y, 16), x >> (y & 63)]
        assert row == expected, (x, y)


def test_floats(ptx):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((2, 64)) * 10.0 ** rng.integers(-3, 5, (2, 64))).astype(np.float32)
    out, whole = np.zeros((64, 8), np.float32), np.zeros((64, 2), np.int32)
    launch(ptx["whole"], "floats", (1,), 64, a, b, out, whole)
    exact = [float(Fraction(float(x)) * Fraction(float(y)) + 1) for x, y in zip(a, b)]
    np.testing.assert_allclose(out[:, 0], exact, rtol=6e-8)
    last = np.where(np.copysign(b, a) < 0, np.trunc(b), np.floor(b))
    expected = [
        np.minimum(a, b),
        np.maximum(a, b),
        np.rint(a),
        a.astype(np.float16),
        a / b,
        np.sqrt(np.abs(a)),
        last,
    ]
    np.testing.assert_array_equal(out[:, 1:], np.stack(expected, 1).astype(np.float32))
    np.testing.assert_array_equal(whole, np.stack([np.trunc(a), np.rint(b)], 1))
