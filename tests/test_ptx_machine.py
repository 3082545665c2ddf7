"""What the PTX machine does with registers, memory and branches.

Arithmetic is in test_ptx_integers.py and test_ptx_floats.py, the faults it has to report in test_ptx_faults.py. Where
ptxas is installed it has to take every kernel of each, so that none tests an instruction that does not exist.
"""

import itertools

import numpy as np

from tests.ptx import machine, program, small
from tests.ptx.values import integers

elementwise = small.elementwise
rng = np.random.default_rng(0)


# Registers, parameters, memory


def test_moves_and_vectors():
    low, high = integers("u4"), rng.permutation(integers("u4"))
    packed = elementwise("mov.b64 {d}, {{{a}, {b}}}", "u8", low, high)
    np.testing.assert_array_equal(packed, low.astype("u8") | high.astype("u8") << np.uint64(32))
    np.testing.assert_array_equal(elementwise("mov.b64 {{_, {d}}}, {a}", "u4", packed), high)
    np.testing.assert_array_equal(
        elementwise("mov.b32 {{%h5, {d}}}, {a}", "u2", low), (low >> 16).astype("u2")
    )
    assert (elementwise("mov.f32 {d}, 0f3FC00000", "f4", low) == 1.5).all()
    assert (elementwise("mov.f64 {d}, 0dBFF8000000000000", "f8", low) == -1.5).all()
    assert (elementwise("mov.b32 {d}, -2", "i4", low) == -2).all()


def test_loads_widen_by_their_type():
    source = integers("u1")[:32].copy()
    out = np.zeros((32, 4), np.int64)
    body = "cvt.u64.u32 %d1, %t;\nadd.s64 %d1, %d1, %a0;\n"
    for i, kind in enumerate(("s8", "u8", "b8")):
        body += f"ld.global.{kind} %d{2 + i}, [%d1];\n"
    body += "ld.global.s8 %r1, [%d1];\ncvt.s64.s32 %d5, %r1;\n" + small.at("%d6", 1, 32)
    body += "st.global.v2.b64 [%d6], {%d2, %d3};\nst.global.v2.b64 [%d6+16], {%d4, %d5};"
    small.run(body, source, out)
    signed, unsigned = source.view("i1").astype("i8"), source.astype("i8")
    np.testing.assert_array_equal(out, np.stack([signed, unsigned, unsigned, signed], 1))


def test_addresses_and_narrow_stores():
    out = np.zeros(64, np.uint16)
    small.run(
        small.at("%d1", 0, 4) + "add.s64 %d1, %d1, 4;\nmov.u32 %r1, 0x12345678;\n"
        "st.global.b16 [%d1+-4], %r1;\nst.global.b8 [%d1+-2], %r1;",
        out,
    )
    assert out.reshape(32, 2).tolist() == [[0x5678, 0x78]] * 32


def test_parameters_are_aligned():
    text = small.HEAD + (
        ".visible .entry k(.param .u64 a, .param .u8 b, .param .f64 c, .param .align 16 .b8 d[24], .param .u16 e)"
        "{\n"
        ".reg .b64 %d<9>; .reg .b32 %r<3>; ld.param.u64 %d1, [a]; ld.param.u8 %r1, [b]; ld.param.f64 %d2, [c];\n"
        "ld.param.u64 %d3, [d+16]; ld.param.u16 %r2, [e]; st.global.u32 [%d1], %r1; st.global.u64 [%d1+8], %d2;\n"
        "st.global.u64 [%d1+16], %d3; st.global.u32 [%d1+24], %r2; ret; }"
    )
    parsed = program.parse(text)
    assert [p.offset for p in parsed.parameters.values()] == [0, 8, 16, 32, 56]
    out, blob = np.zeros(4, np.uint64), bytearray(range(58))
    blob[:8] = np.array([out.ctypes.data], np.uint64).tobytes()
    machine.launch(parsed, (1,), 32, bytes(blob), [machine.Region(out.ctypes.data, out.nbytes)])
    little = lambda low, count: int.from_bytes(bytes(range(low, low + count)), "little")
    assert out.tolist() == [little(8, 1), little(16, 8), little(48, 8), little(56, 2)]


def test_special_registers():
    out = np.zeros((12 * 64, 8), np.uint32)
    names = ["%tid.x", "%ntid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%laneid", "%nctaid.y", "%nctaid.z"]
    body = "".join(f"mov.u32 %r{i}, {name};\n" for i, name in enumerate(names))
    body += "mad.lo.s32 %r10, %r4, %r6, %r3;\nmov.u32 %r11, %nctaid.x;\nmad.lo.s32 %r10, %r10, %r11, %r2;\n"
    body += "mad.lo.s32 %r10, %r10, 64, %r0;\n" + small.at("%d1", 0, 32, "%r10")
    body += "st.global.v4.u32 [%d1], {%r0, %r1, %r2, %r3};\nst.global.v4.u32 [%d1+16], {%r4, %r5, %r6, %r7};"
    small.run(body, out, threads=64, grid=(2, 3, 2))
    thread = np.arange(64)
    for z, y, x in itertools.product(range(2), range(3), range(2)):
        rows = out.reshape(2, 3, 2, 64, 8)[z, y, x]
        expected = [thread, 64, x, y, z, thread % 32, 3, 2]
        np.testing.assert_array_equal(rows, np.stack([np.broadcast_to(e, 64) for e in expected], 1))


def test_atomic_operations():
    counts, floats = np.zeros(4, np.int64), np.zeros(1, np.float32)
    extremes = np.array([1000, -1000, 0], np.int32)
    old = np.zeros(96, np.uint64)
    body = "and.b32 %r1, %g, 3;\n" + small.at("%d1", 0, 8, "%r1") + "cvt.u64.u32 %d2, %g;\n"
    body += (
        "atom.global.gpu.relaxed.add.u64 %d3, [%d1], %d2;\n"
        + small.at("%d4", 3, 8)
        + "st.global.u64 [%d4], %d3;\n"
    )
    body += "red.global.add.f32 [%a1], 0f3F000000;\nsub.s32 %r2, %g, 48;\n"
    body += "red.global.min.s32 [%a2], %r2;\nred.global.max.s32 [%a2+4], %r2;\n"
    body += "atom.global.cas.b32 %r3, [%a2+8], 0, 7;"
    small.run(body, counts, floats, extremes, old, grid=(3,))
    assert counts.tolist() == [sum(range(i, 96, 4)) for i in range(4)]
    assert floats[0] == 48 and extremes.tolist() == [-48, 47, 7]
    for i in range(4):  # in some order, every sum before an addition
        seen = sorted(old[i::4].tolist())
        assert seen == list(itertools.accumulate(range(i, 96, 4), initial=0))[:-1]


def test_registers_in_braces_are_others():
    out = np.zeros(32, np.uint32)
    body = "mov.u32 %r1, 5;\n{\n.reg .b32 %r<3>;\n.reg .b32 x;\nmov.u32 %r1, 9;\nmov.u32 x, 1;\n}\n"
    body += small.at("%d1", 0, 4) + "st.global.u32 [%d1], %r1;"
    small.run(body, out)
    assert (out == 5).all()


def test_shared_memory_behind_static():
    text = small.HEAD.replace(".align 1024", ".align 16") + ".shared .align 4 .b8 fixed[20];\n"
    text += small.entry(
        "k", "mov.u32 %r1, fixed;\nmov.u32 %r2, dynamic;\nst.global.v2.u32 [%a0], {%r1, %r2};", 1
    )
    out = np.zeros(2, np.uint32)
    small.execute(program.parse(text), [out], shared=16)
    assert out.tolist() == [0, 32]


# Control


def test_divergence_in_a_loop():
    """Thread i adds 1 to i and skips multiples of three; odd ones leave early."""
    out = np.zeros(64, np.uint32)
    small.run(
        "mov.u32 %r1, 0;\nmov.u32 %r2, 0;\nand.b32 %r5, %t, 1;\nsetp.eq.u32 %p5, %r5, 1;\nLOOP:\n"
        "add.u32 %r1, %r1, 1;\n"
        "setp.gt.u32 %p1, %r1, %t;\n@%p1 bra DONE;\nrem.u32 %r3, %r1, 3;\nsetp.eq.u32 %p2, %r3, 0;\n"
        "@%p2 bra LOOP;\n"
        "add.u32 %r2, %r2, %r1;\nsetp.gt.and.u32 %p3, %r2, 20, %p5;\n@!%p3 bra.uni LOOP;\nDONE:\n"
        + small.at("%d1", 0, 4)
        + "@%p5 st.global.u32 [%d1], %r2;\n@!%p5 st.global.u32 [%d1], %r2;",
        out,
        threads=64,
    )

    def one(i):
        total = 0
        for k in range(1, i + 1):
            if k % 3:
                total += k
                if total > 20 and i % 2:
                    break
        return total

    assert out.tolist() == [one(i) for i in range(64)]


def test_barriers_count_threads_that_have_ended():
    out = np.zeros(64, np.uint32)
    small.run(
        "setp.ge.u32 %p1, %t, 40;\n@%p1 ret;\nmov.u32 %r1, dynamic;\nmad.lo.s32 %r1, %t, 4, %r1;\n"
        "st.shared.u32 [%r1], %t;\n"
        "bar.sync 0;\nxor.b32 %r2, %t, 1;\nmov.u32 %r3, dynamic;\nmad.lo.s32 %r2, %r2, 4, %r3;\n"
        "ld.shared.u32 %r4, [%r2];\n" + small.at("%d1", 0, 4) + "st.global.u32 [%d1], %r4;",
        out,
        threads=64,
        shared=256,
    )
    assert out.tolist() == [i ^ 1 if i < 40 else 0 for i in range(64)]


def test_ptxas_takes_every_kernel(tmp_path):
    small.check_with_ptxas(tmp_path)
