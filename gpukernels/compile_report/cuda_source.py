"""CUDA C compiled by NVRTC, as CuPy would hand it over, without a driver."""

from pathlib import Path

from gpukernels.compile_report.binary import Compiled
from gpukernels.compile_report.chips import RESERVED, checked


def compile_cuda(
    source: str, name: str, capability: int, options: tuple[str, ...] = (), *, threads: int = 256
) -> Compiled:
    """The machine code of one kernel of a CUDA C source, for a GPU that need not be here.

    The options are those of `cupy.RawKernel`: C++17, denormal float32 numbers flushed to zero in arithmetic
    (-ftz=true), CUDA's headers, and the CUDA C++ library under `cuda/std`; then `options`.

    Args:
        name: the kernel as C++ would call it, an instantiation of a template too: "cast<__half, float>".
        capability: a key of `CHIPS`.
        threads: of a block, which the launch decides and the source does not say.

    Raises:
        ModuleNotFoundError: CuPy is not installed.
        ValueError: an unknown capability; a source that NVRTC refuses, with its log.
    """
    function, cubin = _compiled("compile_cuda", source, name, capability, options, "getCUBIN")
    # CuPy takes the last byte for the end of a string. The format's last table ends there, with zeros.
    compiled = Compiled(cubin + b"\0", capability, 0, -(-threads // 32), 1, function)
    kept = RESERVED if capability >= 90 else 0
    return compiled._replace(shared_memory=max(0, compiled.static_shared_memory - kept))


def cuda_ptx(source: str, name: str, capability: int, options: tuple[str, ...] = ()) -> tuple[str, str]:
    """As `compile_cuda`: the kernel's name in the PTX of a source, and the PTX."""
    function, text = _compiled("cuda_ptx", source, name, capability, options, "getPTX")
    return function, text.decode() if isinstance(text, bytes) else text


def _compiled(who: str, source: str, name: str, capability: int, options: tuple[str, ...], form: str) -> tuple:
    checked(who, capability)
    import cupy
    from cupy_backends.cuda.libs import nvrtc

    headers = Path(cupy.__file__).parent / "_core" / "include"
    folders = [headers, headers / "cupy" / "_cccl" / "libcudacxx"]
    folders += [Path(root) / "include" for root in [cupy.cuda.get_cuda_path()] if root]
    usual = ("-std=c++17", "-ftz=true", "-default-device", *(f"-I{folder}" for folder in folders))
    program = nvrtc.createProgram(source, f"{name}.cu", (), ())
    try:
        nvrtc.addNameExpression(program, name)
        nvrtc.compileProgram(program, (*usual, f"-arch=sm_{capability}", *options))
        return nvrtc.getLoweredName(program, name), getattr(nvrtc, form)(program)
    except nvrtc.NVRTCError as fault:
        log = nvrtc.getProgramLog(program).strip()
        raise ValueError(f"{who}: NVRTC refuses {name}: {log or fault}") from None
    finally:
        nvrtc.destroyProgram(program)
