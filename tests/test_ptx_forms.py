"""What the PTX machine refuses before it executes anything: unknown instructions, programs that are none."""

import numpy as np
import pytest

from tests.ptx import program, small
from tests.ptx.errors import PtxError

# What the machine does not execute as written must be an error, whatever else it resembles.
UNKNOWN = """
add.sat.s32 %r1, %r2, %r3; add.rz.f32 %f1, %f2, %f3; add.cc.u32 %r1, %r2, %r3; add.f32x2 %d1, %d2, %d3;
add.bf16 %h1, %h2, %h3; add.bf16x2 %r1, %r2, %r3; mul.f16x2 %r1, %r2, %r3; mul.rn.bf16 %h1, %h2, %h3;
mul.rp.f32 %f1, %f2, %f3; mul.u32 %r1, %r2, %r3; mul24.lo.s32 %r1, %r2, %r3;
mad.hi.sat.s32 %r1, %r2, %r3, %r4; mad.lo.cc.u32 %r1, %r2, %r3, %r4; fma.rz.f32 %f1, %f2, %f3, %f4;
fma.rn.sat.f32 %f1, %f2, %f3, %f4; fma.rn.f16 %h1, %h2, %h3, %h4; div.rz.f32 %f1, %f2, %f3;
rem.f32 %f1, %f2, %f3; max.xorsign.abs.f32 %f1, %f2, %f3; max.f32 %f1, %f2, %f3, %f4;
max.bf16x2 %r1, %r2, %r3; max.u16x2 %r1, %r2, %r3; sqrt.rz.f32 %f1, %f2; rcp.rm.f32 %f1, %f2;
ex2.approx.ftz.bf16x2 %r1, %r2; ex2.approx.f16 %h1, %h2; tanh.approx.f32 %f1, %f2; sin.approx.f32 %f1, %f2;
shf.l.b32 %r1, %r2, %r3, %r4; lop3.or.b32 %r1|%p1, %r2, %r3, %r4, 1, %p2; bfi.u32 %r1, %r2, %r3, 1, 2;
prmt.b32.f4e %r1, %r2, %r3, %r4; setp.lt.b32 %p1, %r1, %r2; setp.equ.s32 %p1, %r1, %r2;
set.lt.u32.s32 %r1, %r2, %r3; slct.f32.s32 %f1, %f2, %f3, %r1; cvta.shared.u64 %d1, %d2;
cvta.to.shared.u64 %d1, %d2; cvt.rz.f32.f64 %f1, %e1; cvt.rz.f32.s32 %f1, %r1; cvt.f32.s32 %f1, %r1;
cvt.rn.tf32.f32 %r1, %f1; cvt.rz.bf16.f32 %h1, %f1; cvt.rn.relu.f16x2.f32 %r1, %f1, %f2;
cvt.rn.satfinite.bf16.f32 %h1, %f1; cvt.sat.u8.s32 %r1, %r2; cvt.s32.f32 %r1, %f1; cvt.rni.f64.f32 %e1, %f1;
cvt.rna.f16x2.f32 %r1, %f1, %f2; cvt.rni.bf16.bf16 %h1, %h2; cvt.rn.f16x2.e4m3x2 %r1, %h1;
ld.local.u32 %r1, [%d1]; ld.const.u32 %r1, [%d1]; ld.shared::cluster.u32 %r1, [%r2];
ld.global.b128 %d1, [%d2]; ld.global.v8.b16 %r1, [%d1]; st.async.shared.u32 [%r1], %r2;
st.param.u32 [%r1], %r2; atom.global.inc.u32 %r1, [%d1], 5; atom.global.add.noftz.f16x2 %r1, [%d1], %r2;
red.global.add.noftz.bf16 [%d1], %h1; atom.global.add.b32 %r1, [%d1], 1;
red.global.v2.f32.add [%d1], {%f1, %f2}; shfl.idx.b32 %r1, %r2, 0, 31; shfl.sync.idx.b32 %r1, %r2, 0, 31;
vote.ballot.b32 %r1, %p1; match.all.sync.b32 %r1, %r2, -1; redux.sync.max.f32 %f1, %f2, -1;
redux.sync.add.b32 %r1, %r2, -1; activemask.b32 %r1; bar.arrive 0, 64; bar.red.popc.u32 %r1, 0, %p1;
barrier.cluster.arrive; mbarrier.init.shared.b64 [%r1], 1;
ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r1, %r2}, [%r3];
ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1}, [%r3];
stmatrix.sync.aligned.m16n8.x1.trans.shared.b8 [%r1], {%r2}; ldmatrix.sync.aligned.m8n8.x1.b16 {%r1}, [%d1];
mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1, %r2}, {%r3, %r4, %r5, %r6}, {%r7, %r8}, {%r1, %r2};
mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1,%r2,%r3,%r4}, {%r5,%r6,%r7,%r8}, {%r9,%r10}, {%r1,%r2,%r3,%r4};
mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1,%f2,%f3,%f4}, {%r5,%r6}, {%r9}, {%f1,%f2,%f3,%f4};
mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%f1,%f2,%f3,%f4}, {%r5,%r6}, {%r9}, {%f1,%f2,%f3,%f4};
wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {%r1,%r2}, %d1, %d2, %p1, 1, 1, 0, 0;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1,%f2,%f3,%f4}, %d1, %d2, %p1, -1, 1, 0, 0;
wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%f1,%f2,%f3,%f4}, %d1, %d2, %p1, 1, 1, 0, 0;
wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16 {%f1,%f2,%f3,%f4}, %d1, %d2, %r1, 0, %p1, 1, 1, 0, 0;
cp.async.bulk.commit_group; cp.async.cg.shared.global [%r1], [%d1], 8; cp.async.bulk.wait_group 0;
tcgen05.wait::ld.sync.aligned; call foo; brx.idx %r1, table; mov.u32 %r1, %clock; mov.u32 %r1, %smid;
mov.f32 %f1, 1; mov.f32 %f1, 0d3FF0000000000000;
"""


@pytest.mark.parametrize(
    "statement", [f"{part.strip()};" for part in UNKNOWN.replace("\n", " ").split(";") if part.strip()]
)
def test_unknown_instructions_and_modifiers_are_errors(statement):
    """Even where no thread executes them."""
    with pytest.raises((PtxError, ValueError)):
        text = small.HEAD + small.entry("k", f"bra END;\n{statement}\nEND:\n", 1)
        small.execute(program.parse(text), [np.zeros(64, np.uint32)])


def test_what_a_program_may_not_say():
    run = lambda text: program.parse(small.HEAD + text)
    with pytest.raises(ValueError, match="stands twice"):
        run(small.entry("k", "L:\nbra.uni L;\n{\nL:\n}\n", 0))
    with pytest.raises(ValueError, match="not understood"):
        run(small.entry("k", ".local .align 4 .b8 stack[8];", 0))
    for body, message in (
        ("mov.u32 %r1, nowhere;", "unknown symbol"),
        ("ld.param.u32 %r1, [p0+6];", "misaligned"),
    ):
        with pytest.raises(PtxError, match=message):
            parsed = program.parse(small.HEAD + small.entry("k", body, 1))
            small.execute(parsed, [np.zeros(1, np.uint32)])
    text = small.HEAD + small.entry("k", "", 0).replace("\n{", "\n.reqntid 64\n{")
    small.execute(program.parse(text), [], threads=64)
    with pytest.raises(PtxError, match="compiled for 64 threads, not 32"):
        small.execute(program.parse(text), [])
