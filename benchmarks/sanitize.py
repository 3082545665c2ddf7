"""Every Triton and CUDA kernel once under each of compute-sanitizer's tools, at small odd shapes.

    python benchmarks/sanitize.py [--limit SECONDS] [--tools memcheck racecheck initcheck synccheck]   # all at once
    python benchmarks/sanitize.py --launch [--device cpu]   # what the tools watch: every operator, no checking

Exit status 1 where a tool found something or did not finish. Without a GPU or without compute-sanitizer it says so and
gives 0. PyTorch's caching allocator is off under the tools: within its large blocks no access is out of bounds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OUTPUT = threading.Lock()
FOUND = 99  # the exit status that compute-sanitizer gives for findings

# Odd everywhere: no size is a multiple of a tile, heads and classes are few, grids are not square.
B, N, M, HEADS, CLASSES, GRID, SIZE, WIDTH = 2, 77, 21, 3, 21, (7, 11), (45, 70), 40
DIMS = (50, 100)


def launches(device: str) -> Iterator[tuple[str, object]]:
    """(name, call) of every operator's forward and backward on every kernel backend that runs here."""
    import torch

    from depict_kernels import backends, ops

    def normal(*shape, dtype):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    target = torch.randint(0, CLASSES, (B, *SIZE), generator=torch.Generator().manual_seed(1))
    target[0, :5] = 255
    target = target.to(device)
    dtypes = (torch.float32,) if device == "cpu" else (torch.bfloat16, torch.float32)

    def differentiated(function, *tensors):
        out = function(*tensors)
        return torch.autograd.grad(out, tensors, torch.ones_like(out))

    for backend in ("triton", "cuda", *(("cpp",) if device == "cpu" else ())):
        for dtype in dtypes:
            name = f"{backend} {str(dtype).removeprefix('torch.')}"
            has = lambda op, b=backend, t=dtype: backends.why_unavailable(b, op, device, t) is None
            options = {"backend": backend}
            for dim in DIMS:
                w, q = normal(B, N, HEADS, dim, dtype=dtype), normal(B, M, HEADS, dim, dtype=dtype)
                if has("subspace_self_attention"):
                    run = lambda w, o=options: ops.subspace_self_attention(w, **o)
                    yield f"{name} self-attention {dim}", lambda f=run, w=w: differentiated(f, w)
                if has("subspace_cross_attention"):
                    run = lambda q, w, o=options: ops.subspace_cross_attention(q, w, **o)
                    yield f"{name} cross-attention {dim}", lambda f=run, q=q, w=w: differentiated(f, q, w)
            if has("mask_logits"):
                x, q = normal(B, N, WIDTH, dtype=dtype), normal(B, CLASSES, WIDTH, dtype=dtype)
                a, b = (normal(CLASSES, dtype=torch.float32) for _ in range(2))
                run = lambda x, q, a, b, o=options: ops.mask_logits(x, q, a, b, GRID, **o)
                yield f"{name} mask logits", lambda f=run, t=(x, q, a, b): differentiated(f, *t)
            # Sharp logits take the careful path, a small scale the border cells alone.
            for sharpness in (1.0, 60.0):
                z = (sharpness * normal(B, CLASSES, *GRID, dtype=dtype)).detach().requires_grad_()
                for reduction in ("mean", "none"):
                    if has("upsample_cross_entropy"):
                        run = lambda z, o=options, r=reduction: ops.upsample_cross_entropy(
                            z, target, 255, label_smoothing=0.1, reduction=r, **o
                        )
                        yield (
                            f"{name} loss {reduction} x {sharpness:g}",
                            lambda f=run, z=z: differentiated(f, z),
                        )
                if has("upsample_argmax"):
                    yield f"{name} label map", lambda z=z, o=options: (ops.upsample_argmax(z, SIZE, **o),)
                if has("upsample_confusion"):
                    yield (
                        f"{name} confusion",
                        lambda z=z, o=options: (ops.upsample_confusion(z, target, 255, **o),),
                    )


def launch(device: str, match: str = "") -> int:
    """Runs those whose name contains ``match``; gives their number. Raises where a result is not finite."""
    import torch

    count = 0
    for name, call in launches(device):
        if match not in name:
            continue
        results = call()
        if device == "cuda":
            torch.cuda.synchronize()
        if not all(bool(t.isfinite().all()) for t in results):
            raise FloatingPointError(f"{name}: a result is not finite")
        count += 1
    print(f"{count} launches of operators, all finite")
    return count


def check(tool: str, limit: float | None) -> tuple[bool, str]:
    """(clean, one line about it). The launches end themselves at their limit: a tool that is killed leaves them."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
    command += [sys.executable, str(Path(__file__).resolve()), "--launch"]
    command += ["--limit", f"{limit:g}"] if limit else []
    with tempfile.TemporaryFile("w+") as log:
        try:
            status = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
        log.seek(0)
        text = log.read()
    with OUTPUT:
        print(f"--- {tool}\n{text[-6000:]}", flush=True)
    return verdict(status, text, limit)


def verdict(status: int | None, text: str, limit: float | None) -> tuple[bool, str]:
    """What a tool's exit status and output mean; clean only with all launches done and no finding."""
    if status is None:
        return False, f"not finished after {limit:g} s"
    done = re.search(r"(\d+) launches of operators", text)
    summary = re.findall(r"========= ((?:ERROR|RACECHECK) SUMMARY: .*)", text)
    line = summary[-1] if summary else f"exit status {status}"
    if status == 0 and done and int(done[1]) > 0:
        return True, f"{line} ({done[1]} operator launches)"
    return False, line if done else f"{line}; the launches did not finish"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--launch", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--match", default="", help="with --launch: only operators whose name contains this")
    parser.add_argument("--limit", type=float, help="seconds of all of it (none)")
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS)
    args = parser.parse_args()
    begin = time.monotonic()
    if args.launch:
        if args.limit:
            signal.setitimer(signal.ITIMER_REAL, args.limit)  # ends the process, wherever it is
        launch(args.device, args.match)
        return 0
    import torch

    if not torch.cuda.is_available():
        print("skipped: compute-sanitizer needs a CUDA GPU")
        return 0
    if shutil.which("compute-sanitizer") is None:
        print("skipped: compute-sanitizer is not on the PATH (it is part of the CUDA toolkit)")
        return 0
    # Compiles what is compiled at first use, so that the tools watch kernels and not a compiler. Where a kernel fails,
    # the tools are to say why.
    try:
        launch("cuda")
    except Exception as error:
        print(f"without a tool: {type(error).__name__}: {error}", flush=True)
    left = args.limit and max(1.0, args.limit - (time.monotonic() - begin))
    with ThreadPoolExecutor() as pool:
        results = dict(zip(args.tools, pool.map(lambda tool: check(tool, left), args.tools)))
    print(
        "; ".join(
            f"{tool}: {'clean' if clean else 'FAILED'}, {line}" for tool, (clean, line) in results.items()
        )
    )
    return 0 if all(clean for clean, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
