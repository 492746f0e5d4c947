"""Builds the extension module pycomm._C; everything else about the package stands in pyproject.toml.

C++ goes through torch's BuildExtension and ninja. CUDA sources go to nvcc alone, in a ninja build beside it: torch
refuses .cu files when it is a CPU-only build, and our kernels include no torch header anyway (docs/cuda.md).

Environment:
  PYCOMM_CUDA=0|1            leaves CUDA out | insists on it; by default it is built where nvcc is found
  PYCOMM_CUDA_ARCHS="80 90"  instead of the default architectures
  PYCOMM_WERROR=1            warnings are errors; the Makefile sets it"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
except ImportError:
    sys.exit(
        "pycomm: torch is not importable here, and the module must be compiled against the torch it will run beside.\n"
        "Install torch 2.11 to 2.15 first, then: pip install --no-build-isolation .   (docs/install.md says why)"
    )
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

ROOT = Path(__file__).resolve().parent
TORCH_MINOR = ".".join(torch.__version__.split(".")[:2])
if tuple(map(int, TORCH_MINOR.split("."))) < (2, 11):
    sys.exit(f"pycomm: torch {torch.__version__} is installed; the module needs torch 2.11 to 2.15")
CUDA_ARCHS = os.environ.get("PYCOMM_CUDA_ARCHS", "80 90 100").split()
RUNTIME = ("csrc/cuda/cuda_device.cc", "csrc/cuda/info.cc")  # of csrc/cuda's .cc files these need the CUDA toolkit
WARNINGS = ["-Wall", "-Wextra"] + ["-Werror"] * (os.environ.get("PYCOMM_WERROR") == "1")


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def find_cuda() -> Path | None:
    """The CUDA toolkit's folder, or None where there is none or PYCOMM_CUDA=0. Exits if PYCOMM_CUDA=1 finds none."""
    wanted = os.environ.get("PYCOMM_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"PYCOMM_CUDA={wanted}: must be 0 (without CUDA), 1 (with CUDA) or unset (where nvcc is found)")
    if wanted == "0":
        return None
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1]]
    for home in map(Path, filter(None, [*candidates, "/usr/local/cuda"])):
        if (home / "bin/nvcc").is_file() and (home / "include/cuda_runtime_api.h").is_file():
            return home
    if wanted == "1":
        sys.exit("PYCOMM_CUDA=1, but no CUDA toolkit: none under CUDA_HOME, CUDA_PATH, nvcc on PATH or /usr/local/cuda")
    return None


def static_cudart(cuda: Path) -> str:
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (cuda / folder / "libcudart_static.a").is_file():
            return str(cuda / folder / "libcudart_static.a")
    sys.exit(f"{cuda} has nvcc but no libcudart_static.a; install the CUDA runtime's development files")


def nvcc_ninja(cuda: Path, objects: dict[str, str]) -> str:
    """The ninja file that compiles each .cu file into its object. Code for every architecture, PTX for the last."""
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
    gencode.append(f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}")
    host = ",".join(["-fPIC", "-fvisibility=hidden", *WARNINGS])
    werror = "-Werror all-warnings" if "-Werror" in WARNINGS else ""
    flags = f"-std=c++20 -O3 {' '.join(gencode)} -Xcompiler {host} {werror} -I{ROOT / 'csrc'} -DPYCOMM_WITH_CUDA"
    rule = f"rule nvcc\n  command = {cuda}/bin/nvcc {flags} -MD -MT $out -MF $out.d -c $in -o $out\n"
    rule += "  depfile = $out.d\n  deps = gcc\n  description = nvcc $in\n"
    return rule + "".join(f"build {obj}: nvcc {ROOT / source}\n" for source, obj in objects.items())


class Build(BuildExtension):
    """BuildExtension, with nvcc at work beside the C++ compiler and waited for before the link."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # One folder per torch and Python, whoever builds (make, pip, pip -e): a rebuild compiles what changed. The
        # names matter, because torch's headers are system headers to the compiler and so no dependency of any object.
        self.build_temp = str(ROOT / "build" / f"torch-{torch.__version__}-{sys.implementation.cache_tag}")

    def build_extensions(self) -> None:
        cuda = find_cuda()
        nvcc = self.start_nvcc(cuda) if cuda else None
        link = self.compiler.link_shared_object

        def link_when_nvcc_is_done(*args, **kwargs):
            if nvcc and nvcc.wait():
                sys.exit("pycomm: nvcc failed; its messages stand above")
            link(*args, **kwargs)

        self.compiler.link_shared_object = link_when_nvcc_is_done
        try:
            super().build_extensions()
        finally:
            if nvcc and nvcc.poll() is None:  # the C++ half failed first
                nvcc.terminate()
                nvcc.wait()

    def start_nvcc(self, cuda: Path) -> subprocess.Popen:
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        objects = {source: str(folder / (Path(source).name + ".o")) for source in sources("cuda/*.cu")}
        (folder / "build.ninja").write_text(nvcc_ninja(cuda, objects))
        self.extensions[0].extra_objects += [*objects.values(), static_cudart(cuda)]
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        return subprocess.Popen(["ninja", "-C", str(folder), *jobs])


def extension() -> CppExtension:
    cuda = find_cuda()
    system_includes = include_paths() + ([str(cuda / "include")] if cuda else [])
    return CppExtension(
        "pycomm._C",
        # Those with torch's headers first: they take longest, and none should run alone at the end.
        sources("torch/*.cc") + [s for s in sources("core/*.cc", "cpu/*.cc", "cuda/*.cc") if cuda or s not in RUNTIME],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("PYCOMM_WITH_CUDA", None)] if cuda else [],
        # -isystem outranks the -I that BuildExtension gives torch's headers, so warnings are of our code alone.
        extra_compile_args=["-std=c++20", "-O3", "-g1", "-fvisibility=hidden", *WARNINGS]
        + [flag for path in system_includes for flag in ("-isystem", path)],
        # The static CUDA runtime stays private: torch puts its own, of another version perhaps, in the global scope.
        extra_link_args=["-Wl,--exclude-libs,ALL", "-Wl,--as-needed", "-lrt", "-ldl", "-pthread"],
    )


if sys.argv[1:] == ["cuda_home"]:  # the Makefile asks, so that cmake takes the same toolkit
    print(find_cuda() or "")
    sys.exit()

setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": Build},
    install_requires=["numpy>=1.26", f"torch=={TORCH_MINOR}.*"],
)
