"""Faults planted in small kernels, which the PTX machine has to report, each beside the variant that is right.

What a GPU leaves undefined is an error here; what is legal must pass, or the tests of kernels cry wolf. Legal is, by
the ISA, that lanes which have ended are not waited for, also where they jumped over a shuffle to the kernel's end.
"""

import numpy as np
import pytest

from tests.ptx import machine, small
from tests.ptx.errors import PtxError

WARP = 32
BASE = "mov.u32 %r1, dynamic;\n"
OWN = BASE + "mad.lo.u32 %r2, %t, 4, %r1;\n"  # this thread's word of shared memory
OTHER = "xor.b32 %r3, %t, {};\nmad.lo.u32 %r3, %r3, 4, %r1;\n"  # and another's
CONVERGE = "setp.lt.u32 %p1, %t, 16;\n"

# Name: what is said, the faulty body, the right one, threads.
PLANTED = {
    "global load past the end": (
        "outside of every tensor",
        "ld.global.u32 %r5, [%a0+256];",
        "ld.global.u32 %r5, [%a0+252];",
        32,
    ),
    "global load that ends past the end": (
        "outside of every tensor",
        "ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%a0+256];",
        "ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%a0+240];",
        32,
    ),
    "global store before the start": (
        "outside of every tensor",
        "mov.u32 %r5, 1;\nst.global.u32 [%a0+-4], %r5;",
        "mov.u32 %r5, 1;\nst.global.u32 [%a0], %r5;",
        32,
    ),
    "global load near the end of the address space": (
        "outside of every tensor",
        "mov.u64 %d1, -4;\nld.global.u32 %r5, [%d1];",
        "mov.u64 %d1, %a0;\nld.global.u32 %r5, [%d1];",
        32,
    ),
    "null pointer": (
        "outside of every tensor",
        "mov.u64 %d1, 0;\nld.global.u32 %r5, [%d1];",
        "mov.u64 %d1, 0;",
        32,
    ),
    "shared load past the end": (
        "outside of the block's",
        "ld.shared.u32 %r5, [dynamic+1024];",
        "ld.shared.u32 %r5, [dynamic+1020];",
        32,
    ),
    "shared store before the start": (
        "outside of the block's",
        BASE + "st.shared.u32 [%r1+-4], %r1;",
        BASE + "st.shared.u32 [%r1], %r1;",
        32,
    ),
    "shared load at a negative 64-bit address": (
        "outside of the block's",
        "mov.u64 %d1, -16;\nld.shared.u32 %r5, [%d1];",
        "mov.u64 %d1, 16;\nld.shared.u32 %r5, [%d1];",
        32,
    ),
    "misaligned global vector": (
        "not aligned to 16",
        "ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%a0+8];",
        "ld.global.v2.u32 {%r5, %r6}, [%a0+8];",
        32,
    ),
    "misaligned shared load": (
        "not aligned to 4",
        "ld.shared.u32 %r5, [dynamic+2];",
        "ld.shared.u16 %h5, [dynamic+2];",
        32,
    ),
    "misaligned row of a matrix": (
        "not aligned to 16",
        BASE + "mad.lo.u32 %r2, %l, 24, %r1;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r2];",
        BASE + "mad.lo.u32 %r2, %l, 32, %r1;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r2];",
        32,
    ),
    "read after write of another warp": (
        "reads what thread 3[2-9] .*without a barrier|reads what thread [4-6]",
        OWN + "st.shared.u32 [%r2], %t;\n" + OTHER.format(32) + "ld.shared.u32 %r5, [%r3];",
        OWN + "st.shared.u32 [%r2], %t;\nbar.sync 0;\n" + OTHER.format(32) + "ld.shared.u32 %r5, [%r3];",
        64,
    ),
    "write after read by another warp": (
        "writes what thread .* read without",
        OWN + OTHER.format(32) + "ld.shared.u32 %r5, [%r3];\nst.shared.u32 [%r2], %t;",
        OWN + OTHER.format(32) + "ld.shared.u32 %r5, [%r3];\nbar.sync 0;\nst.shared.u32 [%r2], %t;",
        64,
    ),
    "write after a read by everybody, by the last reader": (
        "writes what thread .* read without",
        "ld.shared.u32 %r5, [dynamic];\nsetp.eq.u32 %p1, %t, 63;\n@%p1 st.shared.u32 [dynamic], %t;",
        "ld.shared.u32 %r5, [dynamic];\nbar.sync 0;\nsetp.eq.u32 %p1, %t, 63;\n"
        "@%p1 st.shared.u32 [dynamic], %t;",
        64,
    ),
    "write after a read by everybody, by the first reader": (
        "writes what thread .* read without",
        "ld.shared.u32 %r5, [dynamic];\nsetp.eq.u32 %p1, %t, 0;\n@%p1 st.shared.u32 [dynamic], %t;",
        "ld.shared.u32 %r5, [dynamic];\nbar.sync 0;\nsetp.eq.u32 %p1, %t, 0;\n"
        "@%p1 st.shared.u32 [dynamic], %t;",
        64,
    ),
    "write after reads by two warps, one after the other": (
        "writes what thread .* read without",
        "setp.lt.u32 %p1, %t, 32;\nsetp.eq.u32 %p2, %t, 63;\n@%p1 ld.shared.u32 %r5, [dynamic];\n"
        "@!%p1 ld.shared.u32 %r6, [dynamic];\nbar.warp.sync -1;\n@%p2 st.shared.u32 [dynamic], %t;",
        "setp.lt.u32 %p1, %t, 32;\nsetp.eq.u32 %p2, %t, 63;\n@%p1 ld.shared.u32 %r5, [dynamic];\nbar.sync 0;\n"
        "@%p2 ld.shared.u32 %r6, [dynamic];\n@%p2 st.shared.u32 [dynamic], %t;",
        64,
    ),
    "write after write of another warp": (
        "writes what thread .* wrote without",
        OWN + "st.shared.u32 [%r2], %t;\n" + OTHER.format(32) + "st.shared.u32 [%r3], %t;",
        OWN + "st.shared.u32 [%r2], %t;\nbar.sync 0;\n" + OTHER.format(32) + "st.shared.u32 [%r3], %t;",
        64,
    ),
    "read after write within a warp": (
        "reads what thread .* wrote without",
        OWN + "st.shared.u32 [%r2], %t;\n" + OTHER.format(1) + "ld.shared.u32 %r5, [%r3];",
        OWN + "st.shared.u32 [%r2], %t;\nbar.warp.sync -1;\n" + OTHER.format(1) + "ld.shared.u32 %r5, [%r3];",
        32,
    ),
    "write after read within a warp, by the last reader": (
        "writes what thread .* read without",
        "ld.shared.u32 %r5, [dynamic];\nsetp.eq.u32 %p1, %t, 31;\n@%p1 st.shared.u32 [dynamic], %t;",
        "ld.shared.u32 %r5, [dynamic];\nbar.warp.sync -1;\nsetp.eq.u32 %p1, %t, 31;\n"
        "@%p1 st.shared.u32 [dynamic], %t;",
        32,
    ),
    "a barrier of the warp does not order two warps": (
        "reads what thread .* wrote without",
        OWN
        + "st.shared.u32 [%r2], %t;\nbar.warp.sync -1;\n"
        + OTHER.format(32)
        + "ld.shared.u32 %r5, [%r3];",
        OWN + "st.shared.u32 [%r2], %t;\nbar.warp.sync -1;\n" + OTHER.format(2) + "ld.shared.u32 %r5, [%r3];",
        64,
    ),
    "read after write in global memory": (
        "race in global memory: .* reads what",
        small.at("%d1", 0, 4)
        + "st.global.u32 [%d1], %t;\nxor.b32 %r5, %t, 32;\n"
        + small.at("%d2", 0, 4, "%r5")
        + "ld.global.u32 %r6, [%d2];",
        small.at("%d1", 0, 4)
        + "st.global.u32 [%d1], %t;\nxor.b32 %r5, %t, 32;\nbar.sync 0;\n"
        + small.at("%d2", 0, 4, "%r5")
        + "ld.global.u32 %r6, [%d2];",
        64,
    ),
    "write after read in global memory": (
        "race in global memory: .* writes what",
        "xor.b32 %r5, %t, 32;\n"
        + small.at("%d2", 0, 4, "%r5")
        + "ld.global.u32 %r6, [%d2];\n"
        + small.at("%d1", 0, 4)
        + "st.global.u32 [%d1], %t;",
        "xor.b32 %r5, %t, 32;\n"
        + small.at("%d2", 0, 4, "%r5")
        + "ld.global.u32 %r6, [%d2];\nbar.sync 0;\n"
        + small.at("%d1", 0, 4)
        + "st.global.u32 [%d1], %t;",
        64,
    ),
    "a plain read beside atomic changes": (
        "reads what thread .* changed atomically",
        "red.shared.add.u32 [dynamic], 1;\nld.shared.u32 %r5, [dynamic];",
        "red.shared.add.u32 [dynamic], 1;\nbar.sync 0;\nld.shared.u32 %r5, [dynamic];",
        64,
    ),
    "an atomic change beside a plain write": (
        "changes atomically what thread .* wrote",
        "setp.eq.u32 %p1, %t, 0;\n@%p1 st.shared.u32 [dynamic], %t;\nred.shared.add.u32 [dynamic], 1;",
        "setp.eq.u32 %p1, %t, 0;\n@%p1 st.shared.u32 [dynamic], %t;\nbar.sync 0;\n"
        "red.shared.add.u32 [dynamic], 1;",
        64,
    ),
    "different values to one address": (
        "different values to one address",
        "st.shared.u32 [dynamic], %t;",
        "mov.u32 %r5, 7;\nst.shared.u32 [dynamic], %r5;",
        32,
    ),
    "different values to one address of global memory": (
        "different values to one address",
        "st.global.u32 [%a0], %t;",
        "mov.u32 %r5, 7;\nst.global.u32 [%a0], %r5;",
        32,
    ),
    "a shuffle that half of the lanes do not reach": (
        "waits at shfl.* others never reach",
        CONVERGE + "@%p1 bra SKIP;\nshfl.sync.idx.b32 %r5, %t, 20, 31, -1;\nSKIP:\nbar.warp.sync -1;",
        CONVERGE + "@%p1 bra SKIP;\nshfl.sync.idx.b32 %r5, %t, 20, 31, 0xffff0000;\nSKIP:\nbar.warp.sync -1;",
        32,
    ),
    "a shuffle from lanes that ended": (
        "reads lane 0, which does not take part",
        CONVERGE + "@%p1 ret;\nmov.u32 %r5, 16;\nshfl.sync.bfly.b32 %r5, %t, %r5, 31, -1;",
        CONVERGE + "@%p1 ret;\nmov.u32 %r5, 8;\nshfl.sync.bfly.b32 %r5, %t, %r5, 31, -1;",
        32,
    ),
    "a guarded vote": (
        "waits at @%p1 vote.* others never reach",
        CONVERGE + "@%p1 vote.sync.ballot.b32 %r5, %p1, -1;\nbar.warp.sync -1;",
        CONVERGE + "@%p1 vote.sync.ballot.b32 %r5, %p1, 0xffff;\nbar.warp.sync -1;",
        32,
    ),
    "lanes of one warp that name different masks": (
        "waits at vote",
        CONVERGE
        + "selp.b32 %r5, 0xffffffff, 0xffff0000, %p1;\nvote.sync.ballot.b32 %r6, %p1, %r5;\nbar.warp.sync -1;",
        CONVERGE
        + "selp.b32 %r5, 0x0000ffff, 0xffff0000, %p1;\nvote.sync.ballot.b32 %r6, %p1, %r5;\nbar.warp.sync -1;",
        32,
    ),
    "a lane that is not in its mask": (
        "is not in the mask",
        "redux.sync.add.u32 %r5, %t, 0xffff;",
        CONVERGE + "@%p1 redux.sync.add.u32 %r5, %t, 0xffff;",
        32,
    ),
    "a shuffle from a lane that does not take part": (
        "reads lane 20, which does not take part",
        CONVERGE + "@%p1 shfl.sync.idx.b32 %r5, %t, 20, 31, 0xffff;",
        CONVERGE + "@%p1 shfl.sync.idx.b32 %r5, %t, 12, 31, 0xffff;",
        32,
    ),
    "a matrix that half of the lanes load": (
        "waits at .*ldmatrix",
        CONVERGE + BASE + "@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r1];\nbar.warp.sync -1;",
        CONVERGE + BASE + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r1];",
        32,
    ),
    "a matrix after lanes have ended": (
        "have ended",
        CONVERGE + BASE + "@%p1 ret;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r1];",
        CONVERGE + BASE + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r1];\n@%p1 ret;",
        32,
    ),
    "a barrier that half of a warp reaches": (
        "barrier",
        CONVERGE + "@%p1 bra SKIP;\nbar.sync 0;\nSKIP:\nbar.sync 0;",
        CONVERGE + "@%p1 bra SKIP;\nmov.u32 %r5, 1;\nSKIP:\nbar.sync 0;",
        32,
    ),
    "a barrier that some threads never reach": (
        "others never reach",
        "setp.lt.u32 %p1, %t, 48;\n@%p1 bra SKIP;\nvote.sync.ballot.b32 %r5, %p1, -1;\nSKIP:\nbar.sync 0;",
        "setp.lt.u32 %p1, %t, 32;\n@%p1 bra SKIP;\nvote.sync.ballot.b32 %r5, %p1, -1;\nSKIP:\nbar.sync 0;",
        64,
    ),
    "a barrier under a guard that splits a warp": (
        "another barrier instruction than its warp",
        CONVERGE + "@%p1 bar.sync 0;\n@!%p1 bar.sync 0;",
        "setp.lt.u32 %p1, %t, 32;\n@%p1 bar.sync 0;\n@!%p1 bar.sync 0;",
        64,
    ),
    "two barriers at once": (
        "wait at different barriers",
        "setp.lt.u32 %p1, %t, 32;\nselp.u32 %r5, 1, 2, %p1;\nbar.sync %r5;",
        "setp.lt.u32 %p1, %t, 99;\nselp.u32 %r5, 1, 2, %p1;\nbar.sync %r5;",
        64,
    ),
    "trap": (
        "trap in thread 5 ",
        "setp.eq.u32 %p1, %t, 5;\n@%p1 trap;",
        "setp.eq.u32 %p1, %t, 99;\n@%p1 trap;",
        32,
    ),
    "copies that nobody waits for": (
        "asynchronous copies were waited for",
        OWN + small.at("%d1", 0, 4) + "cp.async.ca.shared.global [%r2], [%d1], 4;\ncp.async.commit_group;",
        OWN + small.at("%d1", 0, 4) + "cp.async.ca.shared.global [%r2], [%d1], 4;\ncp.async.wait_all;",
        32,
    ),
    "a copy of more bytes than its size": (
        "is to read 5",
        OWN + small.at("%d1", 0, 4) + "mov.u32 %r5, 5;\ncp.async.ca.shared.global [%r2], [%d1], 4, %r5;",
        OWN
        + small.at("%d1", 0, 4)
        + "mov.u32 %r5, 3;\ncp.async.ca.shared.global [%r2], [%d1], 4, %r5;\ncp.async.wait_all;",
        32,
    ),
    "a copy from past the end": (
        "outside of every tensor",
        OWN + "mov.u32 %r5, 4;\ncp.async.ca.shared.global [%r2], [%a0+256], 4, %r5;\ncp.async.wait_all;",
        OWN + "mov.u32 %r5, 0;\ncp.async.ca.shared.global [%r2], [%a0+256], 4, %r5;\ncp.async.wait_all;",
        32,
    ),
    "a copy over what another warp still reads": (
        "writes what thread .* read without",
        OWN
        + OTHER.format(32)
        + small.at("%d1", 0, 4)
        + "ld.shared.u32 %r5, [%r3];\ncp.async.ca.shared.global [%r2], [%d1], 4;\ncp.async.wait_all;",
        OWN
        + OTHER.format(32)
        + small.at("%d1", 0, 4)
        + "ld.shared.u32 %r5, [%r3];\nbar.sync 0;\ncp.async.ca.shared.global [%r2], [%d1], 4;\ncp.async.wait_all;",
        64,
    ),
    "another's copy, waited for but without a barrier": (
        "reads what thread .* wrote without",
        OWN
        + OTHER.format(32)
        + small.at("%d1", 0, 4)
        + "cp.async.ca.shared.global [%r2], [%d1], 4;\ncp.async.wait_all;\nld.shared.u32 %r5, [%r3];",
        OWN
        + OTHER.format(32)
        + small.at("%d1", 0, 4)
        + "cp.async.ca.shared.global [%r2], [%d1], 4;\ncp.async.wait_all;\nbar.sync 0;\nld.shared.u32 %r5, [%r3];",
        64,
    ),
}


def execute(body, threads, grid=(1,)):
    small.run(body, np.zeros(64, np.uint32), threads=threads, grid=grid, shared=1024)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault_is_reported(name):
    message, faulty, right, threads = PLANTED[name]
    with pytest.raises(PtxError, match=message):
        execute(faulty, threads)
    execute(right, threads)


def test_a_load_across_the_end():
    """Aligned, and its start inside."""
    body = "ld.global.v2.u32 {%r5, %r6}, [%a0+8];"
    small.run(body, np.zeros(4, np.uint32))
    with pytest.raises(PtxError, match="outside of every tensor"):
        small.run(body, np.zeros(3, np.uint32))


def test_races_between_blocks():
    """Also between blocks that the machine runs one after the other (8192 threads at once)."""
    for grid in ((2,), (40,)):
        body = "setp.eq.u32 %p1, %c, {};\n@%p1 st.global.u32 [%a0], %r5;\n@!%p1 ld.global.u32 %r6, [%a0{}];"
        for writer in (0, grid[0] - 1):
            with pytest.raises(PtxError, match="race in global memory"):
                execute("mov.u32 %r5, 9;\n" + body.format(writer, ""), 256, grid)
            execute("mov.u32 %r5, 9;\n" + body.format(writer, "+4"), 256, grid)
        execute("red.global.add.u32 [%a0], 1;", 256, grid)


def test_a_place_that_was_copied_to_is_unknown_until_the_copy_is_waited_for():
    """Not only the first time, when shared memory is NaN anyway."""
    source, out = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    copy = "cp.async.ca.shared.global [%r2], [%d1], 4;\ncp.async.commit_group;\n"
    body = (
        OWN
        + small.at("%d1", 0, 4)
        + copy
        + "cp.async.wait_group 0;\n"
        + copy
        + "{}ld.shared.f32 %f1, [%r2];\n"
    )
    body += small.at("%d2", 1, 4) + "st.global.f32 [%d2], %f1;\ncp.async.wait_all;"
    small.run(body.format(""), source, out, shared=128)
    assert np.isnan(out).all()
    small.run(body.format("cp.async.wait_group 0;\n"), source, out, shared=128)
    np.testing.assert_array_equal(out, source)


PRODUCT = (
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2, %f3, %f4}, %d1, %d1, %p9, 1, 1, 0, 0;\n"
)
WGMMA = {
    "fill": "mov.u32 %r1, dynamic;\nmad.lo.u32 %r2, %t, 16, %r1;\nmov.u32 %r3, 0x3c003c00;\n"
    "st.shared.v4.u32 [%r2], {%r3, %r3, %r3, %r3};\n"
    f"mov.b64 %d1, {128 >> 4 << 16 | 256 >> 4 << 32};\nsetp.ne.u32 %p9, %r1, %r1;\nmov.f32 %f1, 0f3F800000;\n",
    "proxy": "fence.proxy.async.shared::cta;\n",
    "barrier": "bar.sync 0;\n",
    "product": "wgmma.fence.sync.aligned;\n" + PRODUCT + "wgmma.commit_group.sync.aligned;\n",
    "wait": "wgmma.wait_group.sync.aligned 0;\n",
    "read": "mad.lo.u32 %r4, %t, 4, 0;\ncvt.u64.u32 %d3, %r4;\nadd.s64 %d3, %d3, %a0;\n"
    "st.global.f32 [%d3], %f1;\n",
    "overwrite": "mov.u32 %r3, 0;\nst.shared.u32 [%r2], %r3;\n",
}


def product(*steps):
    out = np.zeros(128, np.float32)
    small.run("".join(WGMMA[step] for step in steps), out, threads=128, shared=2048)
    return out


def test_products_of_a_warpgroup():
    right = ("fill", "proxy", "barrier", "product", "wait", "read")
    assert (product(*right) == 16).all()
    assert (product(*right[:5], "barrier", "overwrite", "read") == 16).all()
    with pytest.raises(PtxError, match="without a fence.proxy.async"):
        product("fill", "barrier", "product", "wait", "read")
    with pytest.raises(PtxError, match="without a fence.proxy.async"):  # too early
        product("proxy", "fill", "barrier", "product", "wait", "read")
    with pytest.raises(PtxError, match="reads what thread .* wrote without a barrier"):
        product("fill", "proxy", "product", "wait", "read")
    with pytest.raises(PtxError, match="ended before its products were waited for"):
        product("fill", "proxy", "barrier", "product", "read")
    assert np.isnan(product("fill", "proxy", "barrier", "product", "read", "wait")).all()
    with pytest.raises(PtxError, match="writes what thread .* read without"):
        product("fill", "proxy", "barrier", "product", "wait", "overwrite")
    with pytest.raises(PtxError, match="before the product that reads it was waited for"):
        small.run(
            "".join(
                WGMMA[s] for s in ("fill", "proxy", "barrier", "product", "barrier", "overwrite", "wait")
            ),
            np.zeros(1, np.float32),
            threads=128,
            shared=2048,
            races=False,
        )
    with pytest.raises(PtxError, match="waits at .*wgmma"):
        steps = (
            WGMMA["fill"] + WGMMA["proxy"] + WGMMA["barrier"] + "setp.lt.u32 %p1, %t, 32;\n@%p1 bra SKIP;\n"
        )
        small.run(steps + WGMMA["product"] + WGMMA["wait"] + "SKIP:\n", threads=128, shared=2048)


def test_a_loop_without_end(monkeypatch):
    """Half a warp waits for a flag that nobody sets."""
    monkeypatch.setattr(machine, "_MOST_ISSUES", 5000)
    body = CONVERGE + "@%p1 bra END;\nLOOP:\nld.volatile.global.u32 %r5, [%a0];\nsetp.eq.u32 %p2, %r5, {};\n"
    body += "@%p2 bra LOOP;\nEND:\n"
    with pytest.raises(PtxError, match="thread 16 of block 0 is still running after 5,000"):
        execute(body.format(0), 32)
    execute(body.format(1), 32)


def test_barriers_that_count_threads():
    execute("bar.sync 1, 64;\nbar.sync 2;\nbarrier.sync.aligned 0;", 64)
    with pytest.raises(PtxError, match="some of a block's threads is not supported"):
        execute("setp.lt.u32 %p1, %t, 32;\n@%p1 bar.sync 1, 32;", 64)


def test_barriers_under_a_guard():
    """Of a whole warp, of nobody, and by blocks."""
    execute("setp.lt.u32 %p1, %t, 99;\n@%p1 bar.sync 0;\n@!%p1 bar.sync 0;\nbar.sync 0;", 64)
    execute("setp.eq.u32 %p1, %c, 1;\n@%p1 bar.sync 0;\n@!%p1 bra END;\nbar.sync 0;\nEND:\n", 64, grid=(3,))


def test_what_several_registers_may_hold_at_once():
    """A destination that is also a source, in every instruction with more than one of either."""
    out = np.zeros((WARP, 4), np.uint32)
    body = "mov.u32 %r1, 3;\nmov.u32 %r2, 5;\nmov.b64 %d1, {%r1, %r2};\nmov.b64 {%r2, %r1}, %d1;\n"
    body += "mad.lo.u32 %r1, %r1, %r2, %r1;\nsub.u32 %r2, %r1, %r2;\n"  # 5 * 3 + 5, 20 - 3
    body += "setp.gt.u32 %p1|%p2, %r1, %r2;\nselp.u32 %r3, 1, 0, %p1;\nselp.u32 %r4, 1, 0, %p2;\n"
    small.run(body + small.at("%d2", 0, 16) + "st.global.v4.u32 [%d2], {%r1, %r2, %r3, %r4};", out)
    assert out.tolist() == [[20, 17, 1, 0]] * WARP


def test_registers_and_shared_memory_start_poisoned():
    """Not with zeros, which hide that nothing was written."""
    out = np.zeros(4, np.float32)
    small.run("ld.shared.f32 %f1, [dynamic];\nst.global.v2.f32 [%a0], {%f1, %f2};", out, shared=16)
    assert np.isnan(out[:2]).all()


def test_every_order_of_a_right_exchange_passes():
    """Double-buffered exchange between warps, one barrier a round: no false alarm over many rounds."""
    out = np.zeros(128, np.uint32)
    body = OWN + "mov.u32 %r6, 0;\nmov.u32 %r7, %t;\nLOOP:\nand.b32 %r8, %r6, 1;\nshl.b32 %r8, %r8, 9;\n"
    body += "add.u32 %r9, %r2, %r8;\n"
    body += "st.shared.u32 [%r9], %r7;\nbar.sync 0;\nadd.u32 %r10, %t, 37;\nand.b32 %r10, %r10, 127;\n"
    body += "mad.lo.u32 %r10, %r10, 4, %r1;\nadd.u32 %r10, %r10, %r8;\nld.shared.u32 %r7, [%r10];\n"
    body += "add.u32 %r7, %r7, 1;\n"
    body += (
        "add.u32 %r6, %r6, 1;\nsetp.lt.u32 %p1, %r6, 6;\n@%p1 bra LOOP;\n"
        + small.at("%d1", 0, 4)
        + "st.global.u32 [%d1], %r7;"
    )
    small.run(body, out, threads=128, shared=1024)
    np.testing.assert_array_equal(out, (np.arange(128) + 6 * 37) % 128 + 6)
    with pytest.raises(PtxError, match="race"):  # one buffer needs two barriers
        small.run(body.replace("shl.b32 %r8, %r8, 9", "mov.u32 %r8, 0"), out, threads=128, shared=1024)


def test_ptxas_takes_every_kernel(tmp_path):
    small.check_with_ptxas(tmp_path)
