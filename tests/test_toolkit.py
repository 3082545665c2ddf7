"""setup.py: which CUDA toolkit is taken, with which host compiler and for which GPUs, or why none is."""

import json
import os
import shutil
import sys

import pytest
from test_extension import needs_sources, run_setup

NVCC = """#!/bin/sh
case "$*" in
    *--version*) echo "Cuda compilation tools, release {release}, V{release}.140"; exit ;;
    *--list-gpu-code*) echo sm_80 sm_90a; exit ;;
    *--dryrun*) echo '{dryrun}' >&2; exit ;;
    {refused}) echo "In file included from x.h:" >&2; echo "x.h:1: error: unsupported GNU version" >&2; exit 1 ;;
esac
for target; do :; done
exec c++ -x c++ -fPIC -c /dev/null -o "$target"
"""


def toolkit(home, refused="none", release="12.0", dryrun="", target="", runtime=True) -> str:
    """A CUDA toolkit that compiles whatever it is given to nothing, in the given layout; its folder."""
    for name in ("bin", f"{target}include", f"{target}lib"):
        (home / name).mkdir(parents=True, exist_ok=True)
    (home / "bin" / "nvcc").write_text(
        NVCC.format(refused=refused, release=release, dryrun=dryrun.format(home=home))
    )
    (home / "bin" / "nvcc").chmod(0o755)
    (home / f"{target}include" / "cuda_runtime_api.h").write_text('extern "C" int cudaGetDeviceCount(int*);')
    if runtime:
        (home / f"{target}lib" / "libcudart_static.a").write_bytes(b"!<arch>\n")
    return str(home)


def answers(cases) -> list[str]:
    """What expressions give in setup.py under environment variables, in one process, which takes seconds to start."""
    code = """
import os
for variables, expression in json.loads(os.environ.pop("CASES")):
    before = dict(os.environ)
    os.environ.update(variables)
    for name in ("toolkit", "architectures"):
        module[name].cache_clear()
    try:
        answer = eval(expression, module)
    except SystemExit as stop:
        answer = f"stopped: {stop}"
    os.environ.clear()
    os.environ.update(before)
    print(json.dumps(str(answer)))
"""
    clear = ("CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN", "TORCH_CUDA_ARCH_LIST", "CXX", "MAX_JOBS")
    kept = {k: v for k, v in os.environ.items() if k not in clear and not k.startswith("DEPICT_KERNELS_")}
    result = run_setup(code, {**kept, "DEPICT_KERNELS_NO_CUDA": "1", "CASES": json.dumps(cases)})
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


needs_linux = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None, reason="needs Linux and a C++ compiler"
)
CUDA = {"DEPICT_KERNELS_NO_CUDA": "no"}


@needs_sources
@needs_linux
def test_the_toolkit_that_is_taken_or_what_keeps_it_from_being_taken(tmp_path):
    """Ubuntu 24.04 has an nvcc that refuses the compiler beside it, and packs one that it takes."""
    made = lambda name, **options: toolkit(tmp_path / name, **options)
    plain, proud = made("pl ain"), made("proud", refused="*-ccbin=*")
    conda = made(
        "conda",
        target="targets/x/",
        dryrun='#$ INCLUDES="-I{home}/targets/x/include"  \n#$ LIBRARIES=  "-L{home}/targets/x/lib"',
    )
    old, new = made("old", release="11.5"), made("new", release="13.9")
    first = {"CUDA_HOME": old, "CUDA_PATH": new}
    named = {"CUDA_HOME": made("named", refused="*-ccbin=*/c++*"), "NVCC_CCBIN": "g++"}
    wanted = {
        "the machine's compiler": ({"CUDA_HOME": plain}, f"command=['{plain}/bin/nvcc', '-ccbin="),
        "nvcc's own": ({"CUDA_HOME": proud}, f"command=['{proud}/bin/nvcc'], "),
        "the one named": (named, "'-ccbin=g++'], "),
        "conda's layout": ({"CUDA_HOME": conda}, f"link_flags=['-L{conda}/targets/x/lib', "),
        "the first that is new enough": (first, f"command=['{new}/bin/nvcc'"),
        "no name of a compiler": ({"CUDA_HOME": plain, "NVCC_CCBIN": "g++ -O"}, "stopped: NVCC_CCBIN: 'g++ -O' is no"),
    }  # fmt: skip
    refused = {
        "none that it takes": (made("none", refused="*-c*"), ": x.h:1: error: unsupported GNU version (NVCC_CCBIN"),
        "no runtime": (made("bare", runtime=False), "libcudart_static.a was not found below"),
        "too old": (old, "old/bin/nvcc is CUDA 11.5, at least 12.0 is needed"),
        "no toolkit": (made("what", release="?"), "what/bin/nvcc does not answer to --version"),
    }  # fmt: skip
    cases = [({**CUDA, **variables}, "toolkit()") for variables, _ in wanted.values()]
    cases += [(CUDA, f"_probed(Path({home!r}) / 'bin/nvcc')") for home, _ in refused.values()]
    for name, answer in zip((*wanted, *refused), answers(cases)):
        assert {**wanted, **refused}[name][1] in answer, (name, answer)


@needs_sources
@needs_linux
def test_architectures_that_are_asked_for(tmp_path):
    wanted = {
        "": "['8.0', '9.0a']",
        "8.6;8.0": "['8.6', '8.0']",
        "7.5 8.0 9.0a+PTX": "['8.0', '9.0a+PTX']",
        "Hopper": "stopped: TORCH_CUDA_ARCH_LIST: 'Hopper' is no architecture; write e.g. 8.0;9.0a;12.0+PTX",
        "7.5": "stopped: TORCH_CUDA_ARCH_LIST: 7.5: the CUDA kernels need compute capability 8.0; DEPICT",
        "9.9": "stopped: TORCH_CUDA_ARCH_LIST: 9.9: ",
    }  # fmt: skip
    home = toolkit(tmp_path)
    script = tmp_path / "bin" / "nvcc"
    script.write_text(script.read_text().replace("sm_80 sm_90a", "sm_75 sm_80 sm_86 sm_90 sm_90a"))
    cases = [
        ({**CUDA, "CUDA_HOME": home, "TORCH_CUDA_ARCH_LIST": asked}, "architectures()") for asked in wanted
    ]
    for (asked, words), answer in zip(wanted.items(), answers(cases)):
        assert answer.startswith(words), (asked, answer)


@needs_sources
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_without_nvcc_or_where_it_is_not_wanted():
    off = {"DEPICT_KERNELS_NO_CUDA": "1"}, "why_not_cuda()"
    none = CUDA, "why_not_cuda.__globals__.update(toolkits=lambda: []) or why_not_cuda()"
    assert answers([off, none]) == [
        "DEPICT_KERNELS_NO_CUDA was set when the package was built",
        "nvcc was not found (looked in CUDA_HOME, on the PATH and in /usr/local/cuda); "
        "install the CUDA toolkit and build again",
    ]
