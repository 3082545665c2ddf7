"""The check of what ptxas did to wgmma's registers finds planted faults; test_cuda_report.py has the library."""

import pytest

from benchmarks.wgmma_inputs import overwritten


def listing(*code: str) -> str:
    lines = [f"        /*{16 * i:04x}*/                   {text} ;" for i, text in enumerate(code)]
    return "\n".join(["\t\tFunction : kernel", *lines])


FIRST = "HGMMA.64x104x16.F32.BF16 R24, R152, gdesc[UR12].tnspB, R24, gsb0"
SECOND = "HGMMA.64x104x16.F32.BF16 R24, R156, gdesc[UR12].tnspB, R24, gsb0"
ALL, ALL_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        ([FIRST, ALL, "FADD R152, R1, R2"], 0),
        ([FIRST, "FADD R152, R1, R2", ALL], 1),
        ([FIRST, "@P0 FADD R155, R1, R2", ALL], 1),
        ([FIRST, "FADD R156, R1, R152", "STS [R152], R155", ALL], 0),
        ([FIRST, "LDS.128 R148, [R1]", "LDS.64 R150, [R1]", ALL], 0),
        ([FIRST, "LDS.128 R149, [R1]", ALL], 1),
        ([FIRST, "IMAD.WIDE.U32 R150, R1, R2, R4", "IMAD.WIDE.U32 R151, R1, R2, R4", ALL], 1),
        # A wait for all groups but one leaves the last one running.
        ([FIRST, SECOND, ALL_BUT_ONE, "MOV R152, R1", ALL], 0),
        ([FIRST, SECOND, ALL_BUT_ONE, "MOV R156, R1", ALL], 1),
        # Without gsb0 a product belongs to the group of the next one that has it.
        ([FIRST.removesuffix(", gsb0"), ALL, "MOV R152, R1", SECOND, ALL], 1),
        ([FIRST.removesuffix(", gsb0"), SECOND, ALL, "MOV R152, R1"], 0),
        # Its results are not its inputs, and another product's results are registers like any others.
        ([FIRST, "HGMMA.64x16x16.F32 R148, gdesc[UR4], R148, gsb0", ALL], 1),
    ],
)
def test_planted_faults(code, faults):
    count, found = overwritten(listing(*code))
    assert len(found) == faults, found
    assert count == sum("R152, gdesc" in line or "R156, gdesc" in line for line in code)
