"""Which instructions the machine executes: every modifier, and how many operands.

An instruction that is not listed is an error, even where a maker would take it: what is accepted and executed
otherwise than the GPU does it is the worst fault a test can have. Source: PTX ISA 9.0, syntax of each instruction.
"""

from __future__ import annotations

import re
from functools import lru_cache

from tests.ptx.errors import PtxError

# Shorthands in the patterns, which are matched against the opcode with every separator written as a dot.
_WORDS = {
    "I": "[su](?:16|32|64)",
    "B": "b(?:16|32|64)",
    "F": r"(?:(?:ftz\.)?f32|f64)",
    "TYPE": "(?:[bsu](?:8|16|32|64)|f32|f64)",
    "CMP": "(?:eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan)",
    "JOIN": r"(?:\.(?:and|or|xor))?",
    # Hints of caches, without effect on what is computed.
    "HINT": r"(?:\.(?:L1|L2)\.(?:evict_\w+|no_allocate|cache_hint|64B|128B|256B))*",
    "COP": r"(?:\.(?:ca|cg|cs|lu|cv|wb|wt))?",
    "SCOPE": "(?:cta|gpu|sys)",
    "ORDER": r"(?:\.(?:relaxed|acquire|release|acq_rel)|\.(?:cta|gpu|sys))*",
    "SHARED": r"shared(?:\.cta)?",
}
# (pattern, the least and the largest number of operands)
_FORMS = [
    ("(?:add|sub).<I>", 3, 3), ("(?:add|sub)(?:.rn)?.<F>", 3, 3), ("(?:add|sub|mul)(?:.rn)?.f16", 3, 3),
    ("mul.(?:lo|hi).<I>", 3, 3), ("mul.wide.[su](?:16|32)", 3, 3), ("mul(?:.rn)?.<F>", 3, 3),
    ("mad.(?:lo|hi).<I>", 4, 4), ("mad.wide.[su](?:16|32)", 4, 4), ("(?:mad|fma).rn.<F>", 4, 4),
    ("(?:div|rem).<I>", 3, 3), ("div.rn.<F>", 3, 3), ("div.(?:full|approx)(?:.ftz)?.f32", 3, 3),
    ("abs.s(?:16|32|64)", 2, 2), ("neg.s(?:16|32|64)", 2, 2), ("(?:abs|neg).<F>", 2, 2),
    ("(?:abs|neg).(?:f16|bf16|f16x2|bf16x2)", 2, 2), ("copysign.f(?:32|64)", 3, 3),
    ("(?:min|max).<I>", 3, 3), ("(?:min|max).<F>", 3, 3), ("(?:min|max)(?:.ftz)?.NaN.f32", 3, 3),
    ("(?:min|max)(?:.NaN)?.f16", 3, 3),
    ("rcp.(?:rn|approx)(?:.ftz)?.f32", 2, 2), ("(?:rcp|sqrt).rn.f64", 2, 2), ("rcp.approx.ftz.f64", 2, 2),
    ("sqrt.(?:rn|approx)(?:.ftz)?.f32", 2, 2), ("(?:rsqrt|ex2|lg2).approx(?:.ftz)?.f32", 2, 2),
    ("(?:and|or|xor).(?:pred|<B>)", 3, 3), ("not.(?:pred|<B>)", 2, 2),
    ("shl.<B>", 3, 3), ("shr.(?:<B>|<I>)", 3, 3), ("bfe.[su](?:32|64)", 4, 4), ("popc.b(?:32|64)", 2, 2),
    ("brev.b(?:32|64)", 2, 2), ("bfind(?:.shiftamt)?.[su](?:32|64)", 2, 2), ("clz.b(?:32|64)", 2, 2),
    ("prmt.b32", 4, 4), ("bfi.b(?:32|64)", 5, 5), ("shf.[lr].(?:clamp|wrap).b32", 4, 4), ("lop3.b32", 5, 5),
    ("setp.(?:eq|ne).<B>", 3, 3), ("setp.(?:eq|ne)<JOIN>.<B>", 4, 4),
    ("setp.(?:eq|ne|lt|le|gt|ge|lo|ls|hi|hs).<I>", 3, 3), ("setp.(?:eq|ne|lt|le|gt|ge|lo|ls|hi|hs)<JOIN>.<I>", 4, 4),
    ("setp.<CMP>.(?:<F>|f16|bf16)", 3, 3), ("setp.<CMP><JOIN>.(?:<F>|f16|bf16)", 4, 4),
    ("selp.(?:<B>|<I>|f32|f64)", 4, 4), ("mov.(?:pred|<B>|<I>|f32|f64)", 2, 2), ("cvta(?:.to)?.global.u64", 2, 2),
    # Conversions: integers; floats to integers; integers to floats; floats.
    ("cvt.[su](?:8|16|32|64).[su](?:8|16|32|64)", 2, 2),
    ("cvt.r[nzmp]i(?:.ftz)?.[su](?:8|16|32|64).f32", 2, 2), ("cvt.r[nzmp]i.[su](?:8|16|32|64).(?:f16|bf16|f64)", 2, 2),
    ("cvt.rn.(?:f16|f32|f64).[su](?:8|16|32|64)", 2, 2), ("cvt.rn.bf16.[su](?:8|16|32)", 2, 2),
    ("cvt.r[nzmp]i(?:.ftz)?.f32.f32", 2, 2), ("cvt.r[nzmp]i.(?:f16.f16|f64.f64)", 2, 2),
    ("cvt(?:.ftz)?.f32.(?:f16|bf16|f32)", 2, 2), ("cvt(?:.ftz)?.f64.f32", 2, 2), ("cvt.f64.(?:f16|bf16)", 2, 2),
    ("cvt.rn(?:.ftz)?.f32.f64", 2, 2), ("cvt.rn.(?:f16|bf16).(?:f32|f64)", 2, 2), ("cvt.rn.bf16.f16", 2, 2),
    ("cvt.rn.(?:f16x2|bf16x2).f32", 3, 3), ("cvt.rna.tf32.f32", 2, 2),
    # Memory.
    ("ld.param(?:.v[24])?.<TYPE>", 2, 2),
    ("ld(?:.volatile)?.<SHARED>(?:.v[24])?.<TYPE>", 2, 2), ("st(?:.volatile)?.<SHARED>(?:.v[24])?.<TYPE>", 2, 2),
    ("ld(?:.volatile)?(?:.global)?(?:.nc)?<COP><HINT>(?:.v[248])?.<TYPE>", 2, 3),
    ("st(?:.volatile)?(?:.global)?<COP><HINT>(?:.v[248])?.<TYPE>", 2, 3),
    ("ld(?:.relaxed|.acquire).<SCOPE>.global(?:.v[24])?.<TYPE>", 2, 2),
    ("ld.global(?:.relaxed|.acquire).<SCOPE>(?:.v[24])?.<TYPE>", 2, 2),
    ("st(?:.relaxed|.release).<SCOPE>.global(?:.v[24])?.<TYPE>", 2, 2),
    ("st.global(?:.relaxed|.release).<SCOPE>(?:.v[24])?.<TYPE>", 2, 2),
    ("atom<ORDER>(?:.global|.<SHARED>)?<ORDER>.(?:add|min|max).[su](?:32|64)", 3, 3),
    ("atom<ORDER>(?:.global|.<SHARED>)?<ORDER>.(?:and|or|xor|exch).b(?:32|64)", 3, 3),
    ("atom<ORDER>(?:.global|.<SHARED>)?<ORDER>.cas.b(?:16|32|64)", 4, 4),
    ("atom<ORDER>(?:.global|.<SHARED>)?<ORDER>.add.f(?:32|64)", 3, 3),
    ("red<ORDER>(?:.global|.<SHARED>)?<ORDER>.(?:add|min|max).[su](?:32|64)", 2, 2),
    ("red<ORDER>(?:.global|.<SHARED>)?<ORDER>.(?:and|or|xor).b(?:32|64)", 2, 2),
    ("red<ORDER>(?:.global|.<SHARED>)?<ORDER>.add.f(?:32|64)", 2, 2),
    ("cp.async.(?:ca|cg).<SHARED>.global<HINT>", 3, 5), ("cp.async.(?:commit_group|wait_all)", 0, 0),
    ("cp.async.wait_group", 1, 1), ("(?:ld|st)matrix.sync.aligned.m8n8.x[124](?:.trans)?.<SHARED>.b16", 2, 2),
    # Ordering; none of it has an effect on what one thread after the other does.
    ("fence(?:.(?:sc|acq_rel|acquire|release))?.<SCOPE>", 0, 0), ("membar.(?:cta|gl|sys)", 0, 0),
    ("fence.proxy.async(?:.(?:global|<SHARED>))?", 0, 0), ("nanosleep.u32", 1, 1),
    ("prefetch.global.(?:L1|L2)(?:.evict_\\w+)?", 1, 1), ("griddepcontrol.(?:wait|launch_dependents)", 0, 0),
    # Warps and blocks.
    ("shfl.sync.(?:up|down|bfly|idx).b32", 5, 5), ("vote.sync.(?:all|any|uni).pred", 3, 3),
    ("vote.sync.ballot.b32", 3, 3), ("match.any.sync.b(?:32|64)", 3, 3),
    ("redux.sync.(?:add|min|max).[su]32", 3, 3), ("redux.sync.(?:and|or|xor).b32", 3, 3),
    ("elect.sync", 2, 2), ("bar.warp.sync", 1, 1), ("(?:bar(?:.cta)?|barrier(?:.cta)?).sync(?:.aligned)?", 1, 2),
    ("mma.sync.aligned.(?:m16n8k8|m16n8k16).row.col.f32.(?:f16.f16|bf16.bf16).f32", 4, 4),
    ("mma.sync.aligned.(?:m16n8k4|m16n8k8).row.col.f32.tf32.tf32.f32", 4, 4),
    (r"wgmma.mma_async.sync.aligned.m64n\d+k16.f32.(?:f16.f16|bf16.bf16)", 4, 8),
    (r"wgmma.mma_async.sync.aligned.m64n\d+k8.f32.tf32.tf32", 4, 6),
    ("wgmma.(?:fence|commit_group).sync.aligned", 0, 0), ("wgmma.wait_group.sync.aligned", 1, 1),
    ("bra(?:.uni)?", 1, 1), ("(?:ret|exit)(?:.uni)?", 0, 0), ("trap", 0, 0),
]  # fmt: skip


def _pattern(text: str) -> re.Pattern:
    # A dot stands for itself; the shorthands bring their own escapes.
    text = re.sub(r"(?<!\\)\.", r"\\.", text)
    while "<" in text:
        text = re.sub(r"<(\w+)>", lambda found: _WORDS[found[1]], text)
    return re.compile(text)


_COMPILED = [(_pattern(text), least, most) for text, least, most in _FORMS]


@lru_cache(None)
def _known(opcode: str, operands: int) -> bool:
    return any(least <= operands <= most and form.fullmatch(opcode) for form, least, most in _COMPILED)


def check(instruction) -> None:
    """Raises PtxError for an instruction that the machine does not execute exactly as written."""
    if not _known(".".join((instruction.name, *instruction.words)), len(instruction.operands)):
        raise PtxError(f"unknown instruction, modifier or number of operands: {instruction.text}")
