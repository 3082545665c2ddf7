"""Builds the compiled parts. Metadata is in pyproject.toml.

``depict_kernels/_cpu.abi3.so`` holds the C++ kernels, ``_cuda.abi3.so`` the CUDA kernels, built where nvcc is found
(with or without a GPU). They use torch's stable interface alone, so one binary serves every torch from TORCH_TARGET
on and every Python from 3.10. What was built, with what, or why not, is written to ``_build.json`` beside them (in the
tree for an in-place or editable build alone); ``python -m depict_kernels`` shows it. Without a compiler the package
installs without the part and the operators run on stock torch.

Environment variables:
    CXX                             the C++ compiler, with options if need be; nvcc takes it for the host's part
    NVCC_CCBIN                      another compiler for nvcc alone, where CXX is newer than nvcc allows
    MAX_JOBS                        bounds the parallel compilations
    TORCH_CUDA_ARCH_LIST            GPU architectures, by default those of CUDA_ARCHITECTURES that nvcc knows
    DEPICT_KERNELS_NO_CUDA=1        no CUDA kernels; DEPICT_KERNELS_NO_EXTENSIONS=1: nothing compiled at all
    DEPICT_KERNELS_EMULATE_CUDA=1   also builds the CUDA kernels for the emulator, which runs them on the CPU in tests
    DEPICT_KERNELS_SANITIZE=1       the CPU parts with AddressSanitizer and UBSan (see ``make asan``)
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
RECORD = ROOT / "depict_kernels" / "_build.json"
TORCH_TARGET = (2, 11)
PYTHON_TARGET = (3, 10)
MEMORY_PER_JOB = 2 << 30  # bytes that one compilation may need

LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")  # may stand before the compiler in CXX

CUDA_ARCHITECTURES = "8.0;9.0a;10.0;12.0+PTX"
CUDA_MINIMUM = (12, 0)  # the first that knows sm_90a

CPU_SOURCES = [
    "csrc/bindings_cpu.cpp",
    "csrc/cpu/attention.cpp",
    "csrc/cpu/mask_head.cpp",
    "csrc/cpu/upsample.cpp",
    "csrc/cpu/instruction_set.cpp",
    "csrc/cpu/avx512.cpp",
    "csrc/cpu/avx2.cpp",
    "csrc/cpu/baseline.cpp",
]
# Contraction to FMA stays on (it is the same for any number of threads); nothing here may assume finite numbers
# or reorder sums. Psabi: vectors are only passed to functions that are inlined.
CXX_FLAGS = [
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-g0",
]
SANITIZE_FLAGS = [
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover",
]


EMULATE_FLAGS = [
    "-x",
    "c++",
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-DDEPICT_EMULATE",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-g0",
]
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]


def switched_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() not in ("", "0", "false", "no", "off")


def compiler() -> str | None:
    """The C++ compiler's command, or None where there is none."""
    command = os.environ.get("CXX", "").strip() or "c++"
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise SystemExit(f"CXX: {command!r} is no command ({error})") from None
    # ninja calls it from another folder.
    words = [os.path.abspath(word) if os.sep in word and os.path.isfile(word) else word for word in words]
    return shlex.join(words) if shutil.which(words[0]) else None


def host_compiler() -> str | None:
    """The compiler alone, which nvcc calls itself: without a cache in front of it and without options."""
    words = shlex.split(compiler())
    return shutil.which(words[len(words) > 1 and Path(words[0]).name in LAUNCHERS])


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A command with its output as text; one that cannot be run, or does not end, has failed."""
    settings = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "cwd": ROOT, "timeout": 60}
    try:
        return subprocess.run(command, env={**os.environ, "LC_ALL": "C"}, **settings)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", f"error: {error}")


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it fails."""
    result = run(*command)
    return result.stdout.strip() if result.returncode == 0 else None


def why_not() -> str | None:
    """What keeps any compiled part from being built, or None."""
    if switched_on("DEPICT_KERNELS_NO_EXTENSIONS"):
        return "DEPICT_KERNELS_NO_EXTENSIONS was set when the package was built"
    if sys.platform == "win32":
        return "the compiled parts are built on Linux and macOS only"
    if compiler() is None:
        return (
            f"there was no C++ compiler (looked for {os.environ.get('CXX', 'c++')!r}); install g++ or set CXX"
        )
    # macOS has a c++ without its developer tools too, which only says that they are missing.
    if output_of(*shlex.split(compiler()), "--version") is None:
        return f"{compiler()!r} does not answer to --version; install a C++ compiler (macOS: xcode-select --install)"
    try:
        import torch
    except ImportError:
        return "torch was not installed in the build environment (needed with --no-build-isolation)"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_TARGET:
        return f"the build environment has torch {torch.__version__}, at least {version_text(TORCH_TARGET)} is needed"
    return None


class Toolkit(NamedTuple):
    """A CUDA toolkit that compiles and links here."""

    nvcc: Path
    version: tuple[int, ...]
    command: list[str]  # nvcc with the host compiler that it takes
    compile_flags: list[str]  # of host code that calls its runtime
    link_flags: list[str]


def toolkits() -> list[Path]:
    """Every nvcc: of CUDA_HOME, on the PATH, in NVIDIA's default place, of the packages that it keeps on PyPI."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes]
    if shutil.which("nvcc"):
        candidates.append(Path(shutil.which("nvcc")))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for folder in sys.path:
        candidates += sorted(Path(folder or ".").glob("nvidia/cu*/bin/nvcc"), reverse=True)
    found = [path.resolve() for path in candidates if path.is_file() and os.access(path, os.X_OK)]
    return list(dict.fromkeys(found))


@functools.cache
def toolkit() -> Toolkit | str:
    """The first toolkit that compiles and links here, or what keeps the first one from it."""
    reasons = []
    for nvcc in toolkits():
        kit = _probed(nvcc)
        if isinstance(kit, Toolkit):
            return kit
        reasons.append(kit)
    places = "CUDA_HOME, on the PATH and in /usr/local/cuda"
    missing = f"nvcc was not found (looked in {places}); install the CUDA toolkit and build again"
    return (reasons or [missing])[0]


def _probed(nvcc: Path) -> Toolkit | str:
    """A toolkit that compiles and links a few lines, or why it does not."""
    found = re.search(r"release (\d+)\.(\d+)", output_of(str(nvcc), "--version") or "")
    if found is None:
        return f"{nvcc} does not answer to --version"
    version = tuple(map(int, found.groups()))
    if version < CUDA_MINIMUM:
        return f"{nvcc} is CUDA {version_text(version)}, at least {version_text(CUDA_MINIMUM)} is needed"
    # nvcc knows best where headers and libraries are: conda has them in a folder of the target's, Debian among the
    # system's, and what is on the PATH may be a wrapper.
    said = run(str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull).stderr
    known = dict(re.findall(r"^#\$ (TOP|INCLUDES|LIBRARIES)=(.*)$", said, re.MULTILINE))
    home = Path(known["TOP"]).resolve() if "TOP" in known else nvcc.parent.parent
    includes = [Path(folder) for folder in re.findall(r'"-I(.+?)"', known.get("INCLUDES", ""))]
    folders = [Path(folder) for folder in re.findall(r'-L([^"]+?)(?="|\s|$)', known.get("LIBRARIES", ""))]
    folders += [path.parent for path in sorted(home.glob("**/libcudart_static.a"))]
    folders = [folder.resolve() for folder in folders if (folder / "libcudart_static.a").is_file()]
    if not folders:
        return f"libcudart_static.a was not found below {home}; install all of the CUDA toolkit"
    includes = dict.fromkeys(folder.resolve() for folder in [*includes, home / "include"])
    compile_flags = [f"-I{folder}" for folder in includes]
    link = [f"-L{folder}" for folder in dict.fromkeys(folders)]
    link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
    with tempfile.TemporaryDirectory() as folder:
        device, host, linked = (str(Path(folder) / name) for name in ("probe.cu", "probe.cpp", "probe.so"))
        Path(device).write_text("#include <algorithm>\n#include <cmath>\n__global__ void probe() {}\n")
        Path(host).write_text(
            "#include <cuda_runtime_api.h>\nint count(int* n) { return cudaGetDeviceCount(n); }\n"
        )
        command, reason = _with_host_compiler(nvcc, device, f"{device}.o")
        if reason:
            return f"{nvcc} does not compile: {reason}"
        arguments = ["-shared", "-fPIC", f"{device}.o", host, *compile_flags, *link, "-o", linked]
        result = run(*shlex.split(compiler()), *arguments)
        if result.returncode:
            return (
                f"{nvcc}: what it compiles cannot be linked: {_complaint(result)}; install all of the toolkit"
            )
    return Toolkit(nvcc, version, command, compile_flags, link)


def _with_host_compiler(nvcc: Path, source: str, target: str) -> tuple[list[str], str]:
    """nvcc with a host compiler with which it compiles ``source``, or why it takes none.

    It refuses one that is newer than itself. The packages of Debian and Ubuntu have an nvcc older than the default
    compiler, and with it an older compiler, which nvcc takes where it is not told another.
    """
    named = os.environ.get("NVCC_CCBIN", "").strip()  # nvcc reads it too, but not in every version
    if named and not (shutil.which(named) or os.path.isdir(named)):
        raise SystemExit(f"NVCC_CCBIN: {named!r} is no compiler; write e.g. g++-12, without options")
    named = os.path.abspath(named) if os.sep in named else named
    choices = [[f"-ccbin={named}"]] if named else [[f"-ccbin={host_compiler()}"], []]
    complaint = ""
    for choice in choices:
        result = run(str(nvcc), *choice, *NVCC_FLAGS, "-c", source, "-o", target)
        if result.returncode == 0:
            return [str(nvcc), *choice], ""
        complaint = complaint or _complaint(result)
    if named or "unsupported" in complaint:
        complaint += " (NVCC_CCBIN names a host compiler that it takes, such as g++-12)"
    return [], complaint


def _complaint(result: subprocess.CompletedProcess[str]) -> str:
    """The line that tells what went wrong."""
    lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    telling = [line for line in lines if re.search("error|fatal|not found|No such file|cannot", line)]
    return (telling or lines[-1:] or [f"exit status {result.returncode}"])[0]


def why_not_cuda() -> str | None:
    """What keeps the CUDA part from being built where the CPU part is, or None."""
    if switched_on("DEPICT_KERNELS_NO_CUDA"):
        return "DEPICT_KERNELS_NO_CUDA was set when the package was built"
    if sys.platform != "linux":
        return "the CUDA part is built on Linux only"
    kit = toolkit()
    return kit if isinstance(kit, str) else None


@functools.cache
def architectures() -> list[str]:
    """Compute capabilities to compile for, such as ["8.0", "9.0a", "12.0+PTX"]."""
    nvcc = toolkit().nvcc
    known = (output_of(str(nvcc), "--list-gpu-code") or "").split()
    number = lambda entry: re.match(r"\d+\.\d", entry)[0].replace(".", "")
    asked = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(";, "))
    if asked == [""]:
        return [entry for entry in CUDA_ARCHITECTURES.split(";") if f"sm_{number(entry)}" in known]
    for entry in asked:
        if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", entry):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is no architecture; write e.g. 8.0;9.0a;12.0+PTX"
            )
        if f"sm_{number(entry)}" not in known:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {entry}: {nvcc} compiles for {' '.join(known)} alone")
    # Containers set it to all that torch runs on.
    chosen = [entry for entry in asked if int(number(entry)) >= 80]
    if not chosen:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST: {asked[0]}: the CUDA kernels need compute capability 8.0; "
            "DEPICT_KERNELS_NO_CUDA=1 installs without them"
        )
    return chosen


def architecture_flags() -> list[str]:
    flags = []
    for entry in architectures():
        number = entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def version_text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def bound_jobs() -> None:
    """At most one compilation per core and per MEMORY_PER_JOB of memory, unless MAX_JOBS says otherwise."""
    if asked := os.environ.get("MAX_JOBS"):
        if not re.fullmatch(r"[1-9]\d*", asked):  # ninja takes 0 for no bound at all
            raise SystemExit(f"MAX_JOBS: {asked!r} is no number of compilations; write e.g. 2")
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    os.environ["MAX_JOBS"] = str(max(1, min(cores, memory // MEMORY_PER_JOB)))


def build_record() -> dict:
    record = {
        "version": 2,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": output_of("git", "describe", "--always", "--dirty", "--abbrev=12") or "unknown",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpu": {"built": reason is None, "reason": reason},
        "cuda": {"built": cuda_reason is None, "reason": cuda_reason},
        "cuda_emulated": {
            "built": emulate,
            "reason": None if emulate else "it is built for tests only, on Linux",
        },
    }
    if reason is None:
        import torch

        command = compiler()
        record["torch"] = torch.__version__
        record["torch_target"] = version_text(TORCH_TARGET)
        record["compiler"] = output_of(*shlex.split(command), "--version").partition("\n")[0] or command
        record["cpu"]["flags"] = " ".join(flags)
        record["cpu"]["instruction_sets"] = (
            ["avx512", "avx2", "baseline"] if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
        )
    if cuda_reason is None:
        record["cuda"]["nvcc"] = version_text(toolkit().version)
        record["cuda"]["architectures"] = architectures()
    return record


def compile_objects(folder: Path, command: list[str], sources: list[str]) -> list[str]:
    """Compiles each source to an object under ``folder`` where it or what it includes changed; ninja does the work."""
    import ninja

    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    escape = lambda path: str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
    objects = [folder / (Path(source).stem + ".o") for source in sources]
    lines = [
        "rule compile",
        f"  command = {shlex.join(command).replace('$', '$$')} -MD -MF $out.d -c $in -o $out",
        "  description = $in",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    lines += [f"build {escape(o)}: compile {escape(ROOT / s)}" for o, s in zip(objects, sources)]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    program = Path(ninja.BIN_DIR) / "ninja"
    subprocess.run([str(program), "-C", str(folder), "-j", os.environ["MAX_JOBS"]], check=True)
    return [str(path) for path in objects]


reason = why_not()
cuda_reason = reason or why_not_cuda()
emulate = reason is None and sys.platform == "linux" and switched_on("DEPICT_KERNELS_EMULATE_CUDA")
flags = CXX_FLAGS + (SANITIZE_FLAGS if switched_on("DEPICT_KERNELS_SANITIZE") else [])
sanitize = [flag for flag in flags if flag.startswith("-fsanitize")]
headers = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")]
cuda_sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
cuda_bindings = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("bindings_cuda*.cpp"))
extensions, commands, object_builds = [], {}, {}


def extension(name: str, sources: list[str], flags: list[str], link_flags: list[str]):
    from torch.utils.cpp_extension import CppExtension

    major, minor = TORCH_TARGET
    target = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"
    return CppExtension(
        f"depict_kernels.{name}",
        sources,
        extra_compile_args={"cxx": [*flags, target]},
        extra_link_args=[*link_flags, *sanitize],
        depends=headers,
        py_limited_api=True,
    )


if reason is None:
    from torch.utils.cpp_extension import BuildExtension

    bound_jobs()
    if os.environ.get("CXX"):
        os.environ["CXX"] = compiler()  # torch's build calls it from another folder too
    commands["build_ext"] = BuildExtension
    extensions.append(extension("_cpu", CPU_SOURCES, flags, []))
if cuda_reason is None:
    kit = toolkit()
    cuda_flags = [*CXX_FLAGS, *kit.compile_flags]
    extensions.append(extension("_cuda", cuda_bindings, cuda_flags, kit.link_flags))
    command = [*kit.command, *NVCC_FLAGS, *architecture_flags()]
    if any(entry.startswith("9.0a") for entry in architectures()):  # host code cannot tell otherwise
        command.append("-DDEPICT_BUILT_FOR_SM90A")
    object_builds["depict_kernels._cuda"] = (command, cuda_sources)
if emulate:
    extensions.append(extension("_cuda_emulated", cuda_bindings, [*flags, "-DDEPICT_EMULATE"], []))
    # Uninitialised variables hold a pattern, not whatever a GPU's registers would happen to hold.
    pattern = ["-ftrivial-auto-var-init=pattern"]
    known = subprocess.run(
        [*shlex.split(compiler()), *pattern, "-E", "-x", "c++", os.devnull], capture_output=True
    )
    pattern = pattern if known.returncode == 0 else []
    command = [*shlex.split(compiler()), *EMULATE_FLAGS, *pattern, *sanitize]
    object_builds["depict_kernels._cuda_emulated"] = (
        command,
        [*cuda_sources, "csrc/cuda/emulator.cpp", "csrc/cuda/emulator_sm90.cpp"],
    )


class BuildPython(build_py):
    """Copies the modules alone: what an earlier build left, in the tree or in ``build_lib``, is not this build's."""

    def run(self) -> None:
        super().run()
        package = RECORD.parent if self.editable_mode else Path(self.build_lib) / "depict_kernels"
        if not self.editable_mode:
            for library in package.glob("_*.abi3.so"):
                library.unlink()
        if not extensions:  # else it is written beside the libraries once they are there
            write_record(package)


def write_record(package: Path) -> None:
    (package / RECORD.name).write_text(json.dumps(build_record(), indent=2) + "\n")
    if reason is not None:
        print(f"depict_kernels: the C++ kernels are not built: {reason}", file=sys.stderr)
    elif cuda_reason is not None:
        print(f"depict_kernels: the CUDA kernels are not built: {cuda_reason}", file=sys.stderr)


commands["build_py"] = BuildPython
if extensions:
    build_extension = commands["build_ext"]

    class BuildCpp(build_extension):
        def run(self) -> None:
            for module in self.extensions:
                if module.name not in object_builds:
                    continue
                folder = self.folder_of(module) / "kernels"
                try:
                    module.extra_objects = compile_objects(folder, *object_builds[module.name])
                except subprocess.CalledProcessError:
                    hint = "; DEPICT_KERNELS_NO_CUDA=1 installs without the CUDA kernels"
                    raise SystemExit(
                        f"{module.name} did not compile, see above{hint if module.name.endswith('_cuda') else ''}"
                    ) from None
            super().run()
            in_tree = self.inplace or self.editable_mode
            write_record(RECORD.parent if in_tree else Path(self.build_lib) / "depict_kernels")

        def build_extension(self, module) -> None:
            # A folder for each: the bindings are compiled for the GPU and for the emulator.
            together, self.build_temp = self.build_temp, str(self.folder_of(module))
            super().build_extension(module)
            self.build_temp = together

        def folder_of(self, module) -> Path:
            return Path(self.build_temp) / module.name.rpartition(".")[2]

    commands["build_ext"] = BuildCpp

setup(
    ext_modules=extensions,
    cmdclass=commands,
    options={"bdist_wheel": {"py_limited_api": f"cp{PYTHON_TARGET[0]}{PYTHON_TARGET[1]}"}}
    if extensions
    else {},
)
