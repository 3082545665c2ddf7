"""What the PTX machine does where the threads of a warp or a warpgroup act together, and in asynchronous copies."""

import itertools

import numpy as np
import pytest

from tests.ptx import small

rng = np.random.default_rng(1)
WARP = 32


def store(register: str, array: int = 0, kind: str = "u32") -> str:
    return small.at("%d9", array, 8 if kind.endswith("64") else 4) + f"st.global.{kind} [%d9], {register};\n"


# Exchange


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode):
    """The ISA's pseudocode, for offsets beyond a warp, clamps and segments."""
    values = rng.integers(0, 2**32, WARP, dtype=np.uint64).astype(np.uint32)
    for width, by in itertools.product((32, 16, 8, 2), (0, 1, 3, 7, 16, 31, 32, 35)):
        clamp = (0 if mode == "up" else 31) | (32 - width) << 8
        out, inside = np.zeros(WARP, np.uint32), np.zeros(WARP, np.uint32)
        body = small.at("%d1", 0, 4) + f"ld.global.u32 %r1, [%d1];\nmov.u32 %r5, {by};\n"
        body += f"shfl.sync.{mode}.b32 %r2|%p1, %r1, %r5, {clamp}, 0xffffffff;\nselp.u32 %r3, 1, 0, %p1;\n"
        small.run(body + store("%r2", 1) + store("%r3", 2), values, out, inside)
        for lane in range(WARP):
            b, c, mask = by & 31, clamp & 31, clamp >> 8 & 31
            most, least = lane & mask | c & ~mask & 31, lane & mask
            j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | b & ~mask & 31}[mode]
            ok = j >= most if mode == "up" else j <= most
            assert (out[lane], inside[lane]) == (values[j if ok else lane], ok), (mode, width, by, lane)


def test_shuffle_from_lanes_that_differ():
    values, source = rng.permutation(WARP).astype(np.uint32), rng.integers(0, WARP, WARP).astype(np.uint32)
    out = np.zeros(WARP, np.uint32)
    body = (
        small.at("%d1", 0, 4)
        + "ld.global.u32 %r1, [%d1];\n"
        + small.at("%d2", 1, 4)
        + "ld.global.u32 %r2, [%d2];\n"
    )
    small.run(body + "shfl.sync.idx.b32 %r3, %r1, %r2, 31, -1;\n" + store("%r3", 2), values, source, out)
    np.testing.assert_array_equal(out, values[source])


def test_votes_and_reductions():
    values = rng.integers(0, 5, 64).astype(np.uint32)
    signed = rng.integers(-9, 9, 64).astype(np.int32)
    outs = [np.zeros(64, np.uint32) for _ in range(9)]
    body = (
        small.at("%d1", 0, 4)
        + "ld.global.u32 %r1, [%d1];\n"
        + small.at("%d2", 1, 4)
        + "ld.global.u32 %r2, [%d2];\n"
    )
    body += (
        "setp.gt.u32 %p1, %r1, 2;\nvote.sync.ballot.b32 %r10, %p1, -1;\nvote.sync.any.pred %p2, !%p1, -1;\n"
    )
    body += "selp.u32 %r11, 1, 0, %p2;\nvote.sync.all.pred %p3, %p1, -1;\nselp.u32 %r12, 1, 0, %p3;\n"
    body += "match.any.sync.b32 %r13, %r1, 0xffffffff;\nredux.sync.add.s32 %r14, %r2, -1;\n"
    body += "redux.sync.min.s32 %r15, %r2, -1;\nredux.sync.max.u32 %r16, %r2, -1;\n"
    body += "redux.sync.xor.b32 %r17, %r2, -1;\n"
    body += "elect.sync %r18|%p4, -1;\nselp.u32 %r18, 100, %r18, %p4;\n"
    small.run(
        body + "".join(store(f"%r{10 + i}", 2 + i) for i in range(9)), values, signed, *outs, threads=64
    )
    for warp in range(2):
        part = slice(32 * warp, 32 * warp + 32)
        v, s = values[part], signed[part]
        bits = lambda holds: sum(int(h) << i for i, h in enumerate(holds))
        expected = [bits(v > 2), bool((v <= 2).any()), bool((v > 2).all()), None, int(s.sum()), int(s.min())]
        expected += [int(s.view(np.uint32).max()), int(np.bitwise_xor.reduce(s))]
        for out, value in zip(outs, expected):
            if value is not None:
                assert (out[part] == value % 2**32).all()
        assert outs[3][part].tolist() == [bits(v == x) for x in v]
        assert outs[8][part].tolist() == [100] + [0] * 31


def test_groups_of_a_warp_that_name_their_own_masks():
    """Both halves reach one instruction, each with its mask: their votes stay apart, and their shuffles too."""
    out = np.zeros((4, WARP), np.uint32)
    body = "setp.lt.u32 %p1, %l, 12;\nselp.b32 %r1, 0xfff, 0xfffff000, %p1;\nsetp.lt.u32 %p2, %l, 40;\n"
    body += "vote.sync.ballot.b32 %r2, %p2, %r1;\nredux.sync.add.u32 %r3, %l, %r1;\nmov.u32 %r9, 3;\n"
    body += "match.any.sync.b32 %r4, %r9, %r1;\nmov.u32 %r5, 1;\nshfl.sync.bfly.b32 %r5, %l, %r5, 31, %r1;\n"
    for i in range(4):
        body += (
            f"mad.lo.u32 %r20, {i}, 32, %l;\n"
            + small.at("%d9", 0, 4, "%r20")
            + f"st.global.u32 [%d9], %r{2 + i};\n"
        )
    small.run(body, out)
    low = np.arange(WARP) < 12
    np.testing.assert_array_equal(out[0], np.where(low, 0xFFF, 0xFFFFF000))
    np.testing.assert_array_equal(out[1], np.where(low, sum(range(12)), sum(range(12, 32))))
    np.testing.assert_array_equal(out[2], out[0])
    np.testing.assert_array_equal(out[3], np.arange(WARP) ^ 1)


def test_lanes_that_arrive_late_are_waited_for():
    """One half reaches the shuffle through a branch, the other later; both read one another."""
    out = np.zeros(WARP, np.uint32)
    body = "mul.lo.u32 %r1, %l, 3;\nsetp.lt.u32 %p1, %l, 16;\nmov.u32 %r2, 0;\n@%p1 bra MEET;\nLOOP:\n"
    body += "add.u32 %r2, %r2, 1;\n"
    body += "setp.lt.u32 %p2, %r2, %l;\n@%p2 bra LOOP;\nbra.uni MEET;\nMEET:\nmov.u32 %r4, 16;\n"
    small.run(body + "shfl.sync.bfly.b32 %r3, %r1, %r4, 31, -1;\n" + store("%r3"), out)
    np.testing.assert_array_equal(out, (np.arange(WARP) ^ 16) * 3)


def test_lanes_in_the_same_instruction_of_a_loop_at_different_times():
    """Lane i makes i % 4 + 1 rounds; each group of four shuffles within itself while the others are elsewhere."""
    out = np.zeros(WARP, np.uint32)
    body = "shr.u32 %r1, %l, 3;\nmov.u32 %r2, 0;\nshl.b32 %r3, %r1, 3;\nmov.u32 %r4, 255;\n"
    body += "shl.b32 %r4, %r4, %r3;\n"
    body += "mov.u32 %r6, %l;\nLOOP:\nmov.u32 %r5, 1;\nshfl.sync.bfly.b32 %r5, %r6, %r5, 31, %r4;\n"
    body += "add.u32 %r6, %r5, 1;\n"
    body += "add.u32 %r2, %r2, 1;\nsetp.le.u32 %p1, %r2, %r1;\n@%p1 bra LOOP;\n"
    small.run(body + store("%r6"), out)
    value = np.arange(WARP)
    for rounds in range(4):
        going = np.arange(WARP) // 8 >= rounds
        value = np.where(going, value[np.arange(WARP) ^ 1] + 1, value)
    np.testing.assert_array_equal(out, value)


def test_ended_lanes_are_not_waited_for():
    out = np.zeros(WARP, np.uint32)
    body = "setp.ge.u32 %p1, %l, 20;\nsetp.lt.u32 %p2, %l, 10;\n@%p2 bra VOTE;\n@%p1 ret;\nVOTE:\n"
    small.run(body + "vote.sync.ballot.b32 %r1, 1, -1;\n".replace(" 1,", " %p2,") + store("%r1"), out)
    assert out.tolist() == [0x3FF] * 20 + [0] * 12


def test_lanes_that_end_later_are_not_waited_for():
    """They jump to the kernel's end while the others wait, as a compiler writes an early return."""
    out = np.zeros(WARP, np.uint32)
    body = (
        "setp.lt.u32 %p1, %l, 10;\n@!%p1 bra END;\nvote.sync.ballot.b32 %r1, %p1, -1;\n"
        + store("%r1")
        + "END:\n"
    )
    small.run(body, out)
    assert out.tolist() == [0x3FF] * 10 + [0] * 22


# Matrices of 8 x 8 in shared memory


def _matrix_kernel(count, trans, load):
    suffix = f"x{count}{'.trans' if trans else ''}.shared.b16"
    registers = "{" + ", ".join(f"%r{10 + i}" for i in range(count)) + "}"
    body = "mov.u32 %r1, dynamic;\nmad.lo.u32 %r2, %l, 16, %r1;\n"
    if load:  # rows of 16 bytes, one behind the other
        body += small.at("%d1", 0, 16) + "ld.global.v4.u32 {%r3, %r4, %r5, %r6}, [%d1];\n"
        body += "st.shared.v4.u32 [%r2], {%r3, %r4, %r5, %r6};\nbar.warp.sync -1;\n"
        body += f"ldmatrix.sync.aligned.m8n8.{suffix} {registers}, [%r2];\n"
        for i in range(count):
            body += f"mad.lo.u32 %r20, {i}, 32, %l;\n" + small.at("%d2", 1, 4, "%r20")
            body += f"st.global.u32 [%d2], %r{10 + i};\n"
    else:
        for i in range(count):
            body += f"mad.lo.u32 %r20, {i}, 32, %l;\n" + small.at("%d2", 0, 4, "%r20")
            body += f"ld.global.u32 %r{10 + i}, [%d2];\n"
        body += f"stmatrix.sync.aligned.m8n8.{suffix} [%r2], {registers};\nbar.warp.sync -1;\n"
        body += (
            f"setp.ge.u32 %p1, %l, {8 * count};\n@%p1 ret;\nld.shared.v4.u32 {{%r3, %r4, %r5, %r6}}, [%r2];\n"
        )
        body += small.at("%d1", 1, 16) + "st.global.v4.u32 [%d1], {%r3, %r4, %r5, %r6};\n"
    return body


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_through_shared_memory(count, trans):
    rows = rng.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)  # lane i names row i % 8 of matrix i / 8
    out = np.zeros((count, WARP, 2), np.uint16)
    small.run(_matrix_kernel(count, trans, load=True), rows, out, shared=512)
    for i, lane in itertools.product(range(count), range(WARP)):
        row, column = lane // 4, lane % 4 * 2
        for part in range(2):
            place = (column + part, row) if trans else (row, column + part)
            assert out[i, lane, part] == rows[i][place]
    back = np.zeros((count, 8, 8), np.uint16)
    small.run(_matrix_kernel(count, trans, load=False), out, back, shared=512)
    np.testing.assert_array_equal(back, rows[:count])


# Products


def values_of(kind, shape):
    """Small numbers that the type holds exactly, and their bits."""
    x = rng.integers(-16, 17, shape) / np.float32(8)
    if kind == "f16":
        return x, x.astype(np.float16).view(np.uint16)
    bits = x.astype(np.float32).view(np.uint32)
    return x, (bits >> 16).astype(np.uint16) if kind == "bf16" else bits


@pytest.mark.parametrize(
    "shape, kind",
    [("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "f16"), ("m16n8k8", "bf16"), ("m16n8k8", "tf32")]
    + [("m16n8k4", "tf32")],
)
def test_mma(shape, kind):
    """Fragments as the ISA draws them: of a rows g and g + 8, of b column g, with g = lane / 4 and t = lane % 4."""
    k = int(shape[6:])
    (a, a_bits), (b, b_bits) = values_of(kind, (16, k)), values_of(kind, (k, 8))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    per = 1 if kind == "tf32" else 2
    g, t = np.arange(WARP) // 4, np.arange(WARP) % 4

    def pack(parts):  # the lower half first
        return parts[0].astype(np.uint32) | (parts[1].astype(np.uint32) << 16 if per == 2 else 0)

    a_registers, b_registers = [], []
    for block in range(0, k, 4 * per):
        for upper in (0, 8):
            a_registers.append(pack([a_bits[g + upper, block + per * t + i] for i in range(per)]))
        b_registers.append(pack([b_bits[block + per * t + i, g] for i in range(per)]))
    c_registers = [c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1]]
    inputs = np.stack(a_registers + b_registers + [x.view(np.uint32) for x in c_registers])
    count, out = len(inputs), np.zeros((4, WARP), np.float32)
    body, names = "", []
    for i in range(count):
        names.append(f"%r{10 + i}" if i < count - 4 else f"%f{i}")
        body += f"mad.lo.u32 %r1, {i}, 32, %l;\n" + small.at("%d1", 0, 4, "%r1")
        body += f"ld.global.{'u32' if i < count - 4 else 'f32'} {names[-1]}, [%d1];\n"
    split = [len(a_registers), len(a_registers) + len(b_registers)]
    group = lambda part: "{" + ", ".join(part) + "}"
    body += f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{%f1, %f2, %f3, %f4}}, "
    body += ", ".join(map(group, (names[: split[0]], names[split[0] : split[1]], names[split[1] :]))) + ";\n"
    for i in range(4):
        body += (
            f"mad.lo.u32 %r1, {i}, 32, %l;\n"
            + small.at("%d1", 1, 4, "%r1")
            + f"st.global.f32 [%d1], %f{1 + i};\n"
        )
    small.run(body, inputs, out)
    exact = a.astype(np.float64) @ b + c
    got = np.zeros((16, 8), np.float32)
    got[g, 2 * t], got[g, 2 * t + 1], got[g + 8, 2 * t], got[g + 8, 2 * t + 1] = out
    # Cut off, towards zero: never beyond the exact value and less than an ulp below it.
    assert (np.abs(got) <= np.abs(exact)).all() and (np.abs(got - exact) < np.spacing(np.abs(got))).all()


def canonical_offsets(rows, k, size, major, swizzle, leading, stride):
    """Bytes of elements, by CUTLASS's canonical layouts (mma_traits_sm90_gmma.hpp), in nested coordinates.

    K-major: Swizzle o ((8, m), (T, 2)) : ((W T, SBO), (1, LBO or T)); MN-major: Swizzle o ((T, W, m), (8, k)) :
    ((1, T, LBO), (W T, SBO)), without a swizzle ((T, 1, m), (8, k)) : ((1, T, SBO), (T, LBO)).
    """
    per, wide = 16 // size, {0: 1, 32: 2, 64: 4, 128: 8}[swizzle]
    out = np.zeros((rows, k), np.int64)
    for i, j in itertools.product(range(rows), range(k)):
        if major == "k":
            inner, outer = i % 8, i // 8
            out[i, j] = (
                inner * wide * 16 + outer * stride + j % per * size + j // per * (16 if swizzle else leading)
            )
        elif swizzle == 0:
            out[i, j] = i % per * size + i // per * stride + j % 8 * 16 + j // 8 * leading
        else:
            first, second, third = i % per, i // per % wide, i // per // wide
            out[i, j] = first * size + second * 16 + third * leading + j % 8 * wide * 16 + j // 8 * stride
    bits = {0: 0, 32: 1, 64: 2, 128: 3}[swizzle]  # Swizzle<bits, 4, 3>
    return out ^ (out >> 3 & ((1 << bits) - 1) << 4)


@pytest.mark.parametrize(
    "kind, a_major, b_major, swizzle",
    [*itertools.product(["f16"], ["k", "mn", "registers"], ["k", "mn"], [0, 32, 64, 128])]
    + [("bf16", "k", "mn", 128), ("bf16", "registers", "k", 64)]
    + [("tf32", "k", "k", 0), ("tf32", "k", "k", 128), ("tf32", "registers", "k", 32)],
)
def test_wgmma(kind, a_major, b_major, swizzle):
    n, k, size = 24, 8 if kind == "tf32" else 16, 4 if kind == "tf32" else 2
    if b_major == "mn":
        n = 128  # whole atoms of every swizzle
    (a, a_bits), (b, b_bits) = values_of(kind, (64, k)), values_of(kind, (n, k))
    c = rng.integers(-64, 64, (64, n)).astype(np.float32)
    code = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]

    def lay_out(bits, major, start):
        """Bytes of shared memory from ``start``, aligned to 1024, and the descriptor."""
        atom = max(swizzle, 16) * 8
        rows = len(bits)
        if major == "k":
            leading, stride = (128 * (rows // 8) if swizzle == 0 else 16), (128 if swizzle == 0 else atom)
        elif swizzle == 0:
            leading, stride = 128, 128 * (k // 8)
        else:
            leading, stride = atom * (k // 8), atom
        at = canonical_offsets(rows, k, size, major, swizzle, leading, stride)
        image = np.zeros(at.max() + size, np.uint8)
        for part in range(size):
            image[at + part] = bits >> 8 * part & 255
        return image, start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | code << 62

    parts, descriptors, start = [], [], 0
    for bits, major in ((a_bits, a_major), (b_bits, b_major)):
        if major == "registers":
            descriptors.append(0)
            continue
        image, descriptor = lay_out(bits, major, start)
        parts.append(np.pad(image, (0, -len(image) % 1024)))
        descriptors.append(descriptor)
        start += len(parts[-1])
    memory = np.concatenate(parts)
    g, t, w = np.arange(128) % 32 // 4, np.arange(128) % 4, np.arange(128) // 32
    per = 1 if kind == "tf32" else 2
    fragments = []
    for block in range(0, k, 4 * per):
        for upper in (0, 8):
            each = [
                a_bits[16 * w + g + upper, block + per * t + i].astype(np.uint32) << 16 * i
                for i in range(per)
            ]
            fragments.append(sum(each).astype(np.uint32))
    fragments = np.stack(fragments)
    place = lambda i: (16 * w + g + i // 2 % 2 * 8, i // 4 * 8 + 2 * t + i % 2)
    before = np.stack([c[place(i)] for i in range(n // 2)])
    out = np.zeros_like(before)
    body = "mov.u32 %r1, dynamic;\nmov.u32 %r2, %t;\nLOOP:\n"
    body += f"setp.ge.u32 %p1, %r2, {len(memory) // 16};\n@%p1 bra DONE;\n"
    body += (
        small.at("%d1", 0, 16, "%r2")
        + "ld.global.v4.u32 {%r3, %r4, %r5, %r6}, [%d1];\nmad.lo.u32 %r7, %r2, 16, %r1;\n"
    )
    body += "st.shared.v4.u32 [%r7], {%r3, %r4, %r5, %r6};\nadd.u32 %r2, %r2, 128;\nbra.uni LOOP;\nDONE:\n"
    body += "fence.proxy.async.shared::cta;\nbar.sync 0;\n"
    for i in range(4):
        body += (
            f"mad.lo.u32 %r8, {i}, 128, %t;\n"
            + small.at("%d1", 1, 4, "%r8")
            + f"ld.global.u32 %r{20 + i}, [%d1];\n"
        )
    for i in range(n // 2):
        body += (
            f"mad.lo.u32 %r8, {i}, 128, %t;\n"
            + small.at("%d1", 2, 4, "%r8")
            + f"ld.global.f32 %f{i}, [%d1];\n"
        )
    body += f"mov.b64 %d10, {descriptors[0]};\nmov.b64 %d11, {descriptors[1]};\nsetp.eq.u32 %p2, %r1, %r1;\n"
    first = "{%r20, %r21, %r22, %r23}" if a_major == "registers" else "%d10"
    flags = "" if kind == "tf32" else f", {int(b_major == 'mn')}"
    if flags and a_major != "registers":
        flags = f", {int(a_major == 'mn')}" + flags
    product = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind} "
    product += "{" + ", ".join(f"%f{i}" for i in range(n // 2)) + f"}}, {first}, %d11, %p2, 1, 1{flags};\n"
    body += "wgmma.fence.sync.aligned;\n" + 2 * product  # twice, the second on top of the first
    body += "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
    for i in range(n // 2):
        body += (
            f"mad.lo.u32 %r8, {i}, 128, %t;\n"
            + small.at("%d1", 3, 4, "%r8")
            + f"st.global.f32 [%d1], %f{i};\n"
        )
    small.run(body, memory, fragments, before, out, threads=128, shared=len(memory))
    got = np.zeros((64, n), np.float32)
    for i in range(n // 2):
        got[place(i)] = out[i]
    np.testing.assert_array_equal(got, c + 2 * (a.astype(np.float64) @ b.T))  # all of it exact in float32


def test_wgmma_without_what_was_there():
    """The predicate scale-d false: the accumulators' old values, here NaN, do not count."""
    out = np.zeros((4, 128), np.float32)
    body = (
        "mov.u32 %r1, dynamic;\nmad.lo.u32 %r2, %t, 16, %r1;\nmov.u32 %r3, 0x3c003c00;\n"  # ones of float16
    )
    body += "st.shared.v4.u32 [%r2], {%r3, %r3, %r3, %r3};\nfence.proxy.async;\nbar.sync 0;\n"
    body += "setp.ne.u32 %p1, %r1, %r1;\n"
    body += f"mov.b64 %d1, {128 >> 4 << 16 | 256 >> 4 << 32};\nwgmma.fence.sync.aligned;\n"
    body += (
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2, %f3, %f4}, %d1, %d1, %p1, 1, 1, 0, 0;\n"
    )
    body += "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
    for i in range(4):
        body += (
            f"mad.lo.u32 %r8, {i}, 128, %t;\n"
            + small.at("%d2", 0, 4, "%r8")
            + f"st.global.f32 [%d2], %f{1 + i};\n"
        )
    small.run(body, out, threads=128, shared=2048)
    assert (out == 16).all()


# Asynchronous copies


@pytest.mark.parametrize("size, how", [(4, "ca"), (8, "ca"), (16, "ca"), (16, "cg")])
def test_copies_fill_up_with_zeros(size, how):
    source = rng.integers(1, 256, WARP * 16).astype(np.uint8)
    out = np.full(WARP * 16, 7, np.uint8)
    count = size // 4
    registers = ["{%r10, %r11, %r12, %r13}", "{%r10, %r11}", "%r10"][(4 // count).bit_length() - 1]
    vector = f".v{count}" if count > 1 else ""
    body = f"mov.u32 %r1, dynamic;\nmad.lo.u32 %r2, %l, {size}, %r1;\n" + small.at("%d1", 0, size)
    body += f"rem.u32 %r3, %l, {size + 1};\ncp.async.{how}.shared.global [%r2], [%d1], {size}, %r3;\n"
    body += f"cp.async.commit_group;\ncp.async.wait_group 0;\nld.shared{vector}.u32 {registers}, [%r2];\n"
    body += small.at("%d2", 1, size) + f"st.global{vector}.u32 [%d2], {registers};"
    small.run(body, source, out, shared=512)
    for lane in range(WARP):
        part = slice(lane * size, lane * size + size)
        filled = lane % (size + 1)
        assert out[part].tolist() == source[part][:filled].tolist() + [0] * (size - filled)


def test_groups_of_copies_land_in_order():
    """Three groups; after waiting for all but one the last is still under way, its place NaN."""
    source, out = rng.standard_normal((3, WARP)).astype(np.float32), np.zeros((3, WARP), np.float32)
    body = "mov.u32 %r1, dynamic;\nmad.lo.u32 %r2, %l, 4, %r1;\n" + small.at("%d1", 0, 4)
    for i in range(3):
        body += f"cp.async.ca.shared.global [%r2+{128 * i}], [%d1+{128 * i}], 4;\ncp.async.commit_group;\n"
    body += "cp.async.wait_group 1;\n" + small.at("%d2", 1, 4)
    for i in range(3):
        body += f"ld.shared.f32 %f1, [%r2+{128 * i}];\nst.global.f32 [%d2+{128 * i}], %f1;\n"
    small.run(body + "cp.async.wait_all;", source, out, shared=384)
    np.testing.assert_array_equal(out[:2], source[:2])
    assert np.isnan(out[2]).all()


def test_waiting_for_all_takes_copies_without_a_group():
    source, out = rng.standard_normal(WARP).astype(np.float32), np.zeros(WARP, np.float32)
    body = "mov.u32 %r1, dynamic;\nmad.lo.u32 %r2, %l, 4, %r1;\n" + small.at("%d1", 0, 4)
    body += "cp.async.ca.shared.global [%r2], [%d1], 4;\ncp.async.wait_all;\nld.shared.f32 %f1, [%r2];\n"
    small.run(body + store("%f1", 1, "f32"), source, out, shared=128)
    np.testing.assert_array_equal(out, source)


def test_ptxas_takes_every_kernel(tmp_path):
    small.check_with_ptxas(tmp_path)
