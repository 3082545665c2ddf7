"""Counts of machine instructions: the mapping on a loop that one can count by hand, and the command's rows."""

import json
import sys

import numpy as np
import pytest

from benchmarks import count_instructions
from benchmarks.cases import Case
from tests.ptx import machine_code, program, small
from tests.ptx.profile import ByProgram, Profile

needs_tools = pytest.mark.skipif(machine_code.why_not() is not None, reason=str(machine_code.why_not()))

# 7 rounds, of which the trip count comes from memory, so that no compiler can unroll them.
LOOP = """
.reg .b32 %n;
ld.global.u32 %n, [%a0];
mov.u32 %r1, 0;
mad.wide.u32 %d1, %l, 4, %a0;
ld.global.f32 %f1, [%d1+4];
.pragma "nounroll";
LOOP:
ex2.approx.ftz.f32 %f1, %f1;
shfl.sync.bfly.b32 %f2, %f1, 1, 31, -1;
fma.rn.f32 %f1, %f2, %f1, %f1;
add.u32 %r1, %r1, 1;
setp.lt.u32 %p1, %r1, %n;
@%p1 bra LOOP;
st.global.f32 [%d1+4], %f1;
"""


def counted(warps: int):
    parsed = program.parse(small.HEAD + small.entry("small", LOOP, 1))
    values = np.zeros(64, np.int32)
    values[0] = 7
    profile = Profile()
    small.execute(parsed, [values], threads=32 * warps, races=False, profile=profile)
    return parsed, profile


@needs_tools
@pytest.mark.parametrize("warps", [1, 3])
def test_a_loop(warps):
    parsed, profile = counted(warps)
    code = machine_code.disassembled(parsed, small.ARCHITECTURE)
    opcodes = machine_code.issued(parsed, code, profile)
    names = {}
    for opcode, issued in opcodes.items():
        name = opcode.partition(".")[0]
        names[name] = names.get(name, 0) + issued
    assert names["MUFU"] == names["SHFL"] == names["FFMA"] == names["BRA"] == 7 * warps
    assert names["LDG"] == 2 * warps and names["STG"] == names["EXIT"] == warps
    assert sum(n for name, n in names.items() if name.startswith("ISETP")) == 7 * warps
    assert "NOP" not in names  # what pads the code is never issued
    assert machine_code.copied(parsed, code) == 0


@needs_tools
def test_copies_share_their_count():
    parsed, profile = counted(1)
    code = machine_code.disassembled(parsed, small.ARCHITECTURE)
    loop = [m for m in code if m.name in ("MUFU", "SHFL", "FFMA")]
    assert machine_code.copied(parsed, code + 3 * loop) == 1
    opcodes = machine_code.issued(parsed, code + 3 * loop, profile)
    names = {opcode.partition(".")[0]: issued for opcode, issued in opcodes.items()}
    assert names["MUFU"] == names["SHFL"] == names["FFMA"] == 7


def test_the_end_of_the_code_is_left_out():
    text = """
.text.other:
        /*0000*/                   MOV R1, R2 ;
.text.small:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
	//## File "kernel.ptx", line 12
        /*0010*/              @!P0 IMAD.MOV.U32 R1, RZ, RZ, R2 ;
        /*0020*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
	//## File "kernel.ptx", line 15
        /*0030*/                   EXIT ;
        /*0034*/                   BSSY B0, `(.L_x_1) ;
        /*0038*/                   WARPSYNC.COLLECTIVE R48, `(.L_x_1) ;
        /*003c*/              @!P0 EXIT ;
.L_x_0:
        /*0040*/                   BRA `(.L_x_0);
        /*0050*/                   NOP;
$__internal_0_$__cuda_sm20_div_s64:
	//## File "kernel.ptx", line 13
        /*0060*/                   RET.REL.NODEC R2 `(small) ;
"""
    found = [(m.opcode, m.name, m.line) for m in machine_code.parse(text, "small")]
    assert found[0] == ("LDC", "LDC", 12)  # before the first line's number
    assert found[1:] == [("IMAD.MOV.U32", "IMAD", 12), ("UIADD3", "UIADD3", 12), ("EXIT", "EXIT", 15)]
    with pytest.raises(ValueError, match="no machine code of missing"):
        machine_code.parse(text, "missing")


def test_instructions_on_one_line_share_its_count():
    text = small.HEAD + small.entry("small", "mov.f32 %f1, %f2; add.f32 %f1, %f1, %f2;", 0)
    parsed, profile = program.parse(text), Profile()
    small.execute(parsed, [], threads=64, races=False, profile=profile)
    (line,) = {i.line for i in parsed.instructions if i.name == "add"}
    assert profile.lines["small", line].issued == 4
    code = [machine_code.Machine("FADD.FTZ", line)]
    assert machine_code.issued(parsed, code, profile) == {"FADD.FTZ": 2}


def test_programs_of_one_name_are_kept_apart():
    profiles = ByProgram()
    for body in ("mov.f32 %f1, %f2;", "add.f32 %f1, %f1, %f2;\nadd.f32 %f1, %f1, %f2;"):
        parsed = program.parse(small.HEAD + small.entry("small", body, 0))
        small.execute(parsed, [], races=False, profile=profiles)
    first, second = (profile for _, profile in profiles.profiles())
    assert "float" not in first.by_class() and second.by_class()["float"].issued == 2


def test_rows_of_the_command(monkeypatch, tmp_path, capsys):
    reason = count_instructions.why_not("cuda")
    if reason is not None:
        pytest.skip(reason)
    case = Case("upsample_argmax", (1, 5, 32, 4, 512, 64), backward=False)
    problem = count_instructions.Counted("label map", case, 3.0, rows=2)
    monkeypatch.setattr(count_instructions, "problems", lambda rows: [problem])
    monkeypatch.setattr(
        sys,
        "argv",
        ["count_instructions.py", "--backend", "cuda", "--lines", "--json", str(tmp_path / "c.json")],
    )
    assert count_instructions.main() == 0
    record = json.loads((tmp_path / "c.json").read_text())
    assert (
        record["versions"]["nvcc"]
        and record["versions"]["ptxas"]
        and record["card"]["multiprocessors"] == 132
    )
    kernels = [row["kernel"] for row in record["rows"]]
    assert any("label_kernel" in name for name in kernels)
    for row in record["rows"]:
        assert row["instructions"] > 0 and row["instructions"] == pytest.approx(
            sum(row["by_opcode"].values()), rel=0.3
        )
        assert row["floor"] == max(row["microseconds"].values()) == row["microseconds"][row["bound"]]
        assert row["microseconds"]["issue"] == pytest.approx(row["instructions"] / (132 * 4 * 1755), abs=0.01)
        assert row["wavefronts"] >= row["ideal_wavefronts"] and row["sectors"] >= row["ideal_sectors"] > 0
    printed = capsys.readouterr().out
    assert "label_kernel" in printed and "lower bounds" in printed
