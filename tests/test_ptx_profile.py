"""The profile's counts for kernels whose counts one knows by hand."""

import numpy as np
import pytest

from tests.ptx import small
from tests.ptx.profile import Profile


def profile(body, *arrays, threads=32, **options):
    counts = Profile()
    small.run(body, *arrays, threads=threads, profile=counts, **options)
    return counts


def shared(stride, kind, size, lanes=32):
    """A load of ``size`` bytes by each lane, ``stride`` bytes apart: its wavefronts and the ideal."""
    registers = {4: "%r5", 8: "%d5", 16: "{%r5, %r6, %r7, %r8}", 1: "%h5", 2: "%h5"}[size]
    body = f"mov.u32 %r1, dynamic;\nmad.lo.u32 %r2, %l, {stride}, %r1;\nsetp.ge.u32 %p1, %l, {lanes};\n"
    body += "@%p1 ret;\n"
    counts = profile(body + f"ld.shared.{kind} {registers}, [%r2];", shared=8192)
    found = counts.by_class()["shared load"]
    assert found.issued == 1 and found.shared_bytes == lanes * size
    return found.wavefronts, found.ideal_wavefronts


@pytest.mark.parametrize(
    "stride, kind, size, expected",
    [
        (4, "u32", 4, (1, 1)),  # one word in each bank
        (8, "u32", 4, (2, 1)),  # every second bank, two words in each
        (12, "u32", 4, (1, 1)),  # an odd stride meets all banks
        (128, "u32", 4, (32, 1)),  # all in one bank
        (132, "u32", 4, (1, 1)),  # a padded row
        (64, "u32", 4, (16, 1)),
        (0, "u32", 4, (1, 1)),  # one word for all
        (1, "u8", 1, (1, 1)),
        (2, "u16", 2, (1, 1)),
        (64, "u16", 2, (16, 1)),
        (8, "u64", 8, (2, 2)),  # two half warps
        (16, "u64", 8, (4, 2)),
        (128, "u64", 8, (32, 2)),
        (16, "v4.u32", 16, (4, 4)),  # four quarters
        (32, "v4.u32", 16, (8, 4)),
        (128, "v4.u32", 16, (32, 4)),
        (144, "v4.u32", 16, (4, 4)),
        (0, "v4.u32", 16, (4, 4)),
    ],
)
def test_bank_conflicts(stride, kind, size, expected):
    assert shared(stride, kind, size) == expected


def test_groups_without_threads_take_nothing():
    assert shared(16, "v4.u32", 16, lanes=8) == (1, 1)
    assert shared(128, "v4.u32", 16, lanes=9) == (9, 2)
    assert shared(128, "u32", 4, lanes=3) == (3, 1)


@pytest.mark.parametrize("pitch, expected", [(16, 4), (128, 32), (144, 4), (64, 16), (80, 4)])
def test_phases_of_ldmatrix(pitch, expected):
    body = f"mov.u32 %r1, dynamic;\nmad.lo.u32 %r2, %l, {pitch}, %r1;\n"
    body += "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r2];"
    found = profile(body, shared=8192).by_class()["matrix load"]
    assert (found.issued, found.wavefronts, found.ideal_wavefronts) == (1, expected, 4)


def test_atomic_changes_of_one_word_take_turns():
    found = profile("red.shared.add.u32 [dynamic], 1;", shared=16).by_class()["shared atomic"]
    assert (found.wavefronts, found.ideal_wavefronts) == (32, 1)


@pytest.mark.parametrize(
    "stride, kind, size, expected",
    [
        (4, "f32", 4, (4, 4)),
        (8, "f32", 4, (8, 4)),
        (32, "f32", 4, (32, 4)),
        (128, "f32", 4, (32, 4)),
        (0, "f32", 4, (1, 1)),  # one place for all
        (2, "u16", 2, (2, 2)),
        (16, "v4.f32", 16, (16, 16)),
        (32, "v4.f32", 16, (32, 16)),
    ],
)
def test_sectors(stride, kind, size, expected):
    space = np.zeros(8192, np.uint8)
    start = -space.ctypes.data % 128  # sectors are counted from addresses that are multiples of 32
    registers = {4: "%f5", 2: "%h5", 16: "{%f5, %f6, %f7, %f8}"}[size]
    body = f"mad.wide.u32 %d1, %l, {stride}, %a0;\nld.global.{kind} {registers}, [%d1+{start}];"
    found = profile(body, space).by_class()["global load"]
    assert (found.sectors, found.ideal_sectors) == expected
    assert found.bytes == 32 * size and found.wavefronts == 0
    if stride == 4:  # off by a word: one sector more
        found = profile(body.replace(f"+{start}", f"+{start + 4}"), space).by_class()["global load"]
        assert (found.sectors, found.ideal_sectors) == (5, 4)


def test_copies_count_on_both_sides():
    space = np.zeros(1024, np.uint8)
    start = -space.ctypes.data % 128
    body = "mov.u32 %r1, dynamic;\nmad.lo.u32 %r2, %l, 16, %r1;\nmad.wide.u32 %d1, %l, 16, %a0;\n"
    body += "setp.lt.u32 %p1, %l, 16;\nselp.u32 %r3, 16, 0, %p1;\n"
    body += f"cp.async.cg.shared.global [%r2], [%d1+{start}], 16, %r3;\ncp.async.wait_all;"
    found = profile(body, space, shared=512).by_class()["asynchronous copy"]
    assert (found.wavefronts, found.ideal_wavefronts, found.sectors, found.ideal_sectors) == (4, 4, 8, 8)
    assert (found.bytes, found.shared_bytes) == (256, 512)


def test_issues_by_class_and_line():
    body = "mov.f32 %f1, 0f3F800000;\nmov.u32 %r1, 0;\nLOOP:\nfma.rn.f32 %f1, %f1, %f1, %f1;\n"
    body += "ex2.approx.f32 %f2, %f1;\n"
    body += "add.u32 %r1, %r1, 1;\nsetp.lt.u32 %p1, %r1, 5;\n@%p1 bra LOOP;\n"
    body += "shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;\n"
    body += "cvt.rn.f16.f32 %h1, %f2;\ndiv.rn.f32 %f3, %f2, %f1;\nadd.f64 %e1, %e2, %e3;\nbar.sync 0;\n"
    counts = profile(body, threads=64, grid=(3,))
    warps = 6
    issued = {name: c.issued for name, c in counts.by_class().items()}
    assert issued["float"] == issued["transcendental"] == 5 * warps
    assert issued["exchange"] == issued["conversion"] == issued["division"] == issued["float64"] == warps
    assert issued["barrier"] == warps and issued["control"] == 6 * warps  # the loop's five and ret
    (line,) = [key for key, c in counts.lines.items() if c.text.startswith("fma")]
    assert counts.lines[line].issued == 5 * warps
    assert counts.worst("issued", 1)[0][2].issued == 5 * warps
    assert counts.total().issued == sum(issued.values())


def test_parts_of_a_divergent_warp_are_issued_apart():
    body = "setp.lt.u32 %p1, %l, 7;\n@%p1 bra THEN;\nlg2.approx.f32 %f1, %f2;\nbra.uni JOIN;\nTHEN:\n"
    body += "ex2.approx.f32 %f1, %f2;\nJOIN:\nrcp.rn.f32 %f1, %f2;\n@%p1 sqrt.rn.f32 %f1, %f2;"
    counts = profile(body, threads=96)
    issued = {c.text.split(".")[0].split()[-1]: c.issued for c in counts.lines.values()}
    assert (issued["lg2"], issued["ex2"], issued["rcp"], issued["sqrt"]) == (3, 3, 3, 3)


def test_operations_of_tensor_cores():
    body = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, "
    body += "{%f1, %f2, %f3, %f4};\nmma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1, %f2, %f3, %f4}, "
    body += (
        "{%r1, %r2, %r3, %r4}, {%r5, %r6}, {%f1, %f2, %f3, %f4};\nmov.b64 %d1, 0;\nsetp.eq.u32 %p1, %l, %l;\n"
    )
    body += "wgmma.fence.sync.aligned;\n"
    body += (
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f5, %f6, %f7, %f8}, %d1, %d1, %p1, 1, 1, 0, 0;\n"
    )
    body += "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;"
    found = profile(body, threads=128, shared=4096).by_class()["tensor core"]
    assert found.flops == 4 * (2 * 16 * 8 * 16 + 2 * 16 * 8 * 8) + 2 * 64 * 8 * 16
    assert found.issued == 12


def test_table_names_the_worst_lines(capsys):
    body = "mov.u32 %r1, dynamic;\nmad.lo.u32 %r2, %l, 128, %r1;\nld.shared.u32 %r5, [%r2];\n"
    body += "mad.wide.u32 %d1, %l, 64, %a0;\nld.global.u32 %r6, [%d1];"
    counts = profile(body, np.zeros(2048, np.uint8), shared=4096)
    (kernel, line, worst), *rest = counts.worst("conflicts")
    assert (kernel, worst.text, rest) == ("small", "ld.shared.u32 %r5, [%r2]", [])
    counts.table()
    printed = capsys.readouterr().out
    assert f"small:{line}: 32 wavefronts, ideally 1, in 1 issues: ld.shared.u32" in printed
    assert "32 sectors, ideally 4, in 1 issues: ld.global.u32" in printed
    assert counts.worst("sectors")[0][2].text.startswith("ld.global")
