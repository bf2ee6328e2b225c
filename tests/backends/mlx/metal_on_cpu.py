"""`mx.fast.metal_kernel` without Metal: the kernels' own text, compiled as C++ and run on the CPU.

`shim/` has the part of the Metal language that they need. Simdgroups run one after another. Arrays
lie between margins of NaN and outputs begin as NaN, so that a value that no lane writes shows, and
so does one that is read or written beside an array.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_randygpt.backends.mlx.kernels import HEADER, KERNELS, LANES, Kernel
from mlx_randygpt.state import Array

MARGIN = 4096  # numbers
SHIM = Path(__file__).parent / "shim"
SIZES = ("C", "D", "H", "NORMED", "PARTS", "T")
FUNCTION = """
extern "C" bool %s(%s, const int* sizes, const uint* grid) {
    const int C = sizes[0], D = sizes[1], H = sizes[2];
    const int NORMED = sizes[3], PARTS = sizes[4], T = sizes[5];
    bool together = true;
    for (uint z_ = 0; z_ < grid[2]; z_++)
    for (uint y_ = 0; y_ < grid[1]; y_++)
    for (uint x_ = 0; x_ < grid[0]; x_ += %d)
    together &= simdgroup.run([&](uint thread_index_in_simdgroup) {
        const uint3 thread_position_in_grid{x_ + thread_index_in_simdgroup, y_, z_};
        %s
    });
    return together;
}
"""


def compiled(folder: Path) -> ctypes.CDLL:
    """Compile all kernels into one library in this folder."""
    text = HEADER
    for kernel in KERNELS:
        arrays = [f"const float* {name}" for name in kernel.inputs]
        arrays += [f"float* {name}" for name in kernel.outputs]
        text += FUNCTION % (kernel.name, ", ".join(arrays), LANES, kernel.body)
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(text)
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{SHIM}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def launcher(library: ctypes.CDLL, kernel: Kernel) -> Callable[..., list[mx.array]]:
    """Return a stand-in for what `mx.fast.metal_kernel` returns, with the same arguments."""
    function = getattr(library, kernel.name)
    function.restype = ctypes.c_bool
    sizes_used = set(SIZES) & set(re.findall(r"\w+", re.sub("//.*", "", kernel.body)))

    def launch(
        *,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, int]],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        assert len(inputs) == len(kernel.inputs)
        assert {array.dtype for array in inputs} | set(output_dtypes) == {mx.float32}
        assert min(array.size for array in inputs) >= 8  # else MLX makes it a constant
        assert grid[0] % LANES == threadgroup[0] % LANES == 0, "a simdgroup has to be full"
        assert dict(template).keys() == sizes_used
        arrays = [between_margins(np.array(array).reshape(-1)) for array in inputs]
        outputs = [between_margins(np.full(np.prod(s), np.nan)) for s in output_shapes]
        pointers = [ctypes.c_void_p(a[MARGIN:].ctypes.data) for a in (*arrays, *outputs)]
        sizes = (ctypes.c_int * len(SIZES))(*(dict(template).get(name, 1) for name in SIZES))
        assert function(*pointers, sizes, (ctypes.c_uint * 3)(*grid)), "lanes parted"
        assert all(np.isnan([a[:MARGIN], a[-MARGIN:]]).all() for a in outputs)
        written = [a[MARGIN:-MARGIN] for a in outputs]
        return [mx.array(a.reshape(s)) for a, s in zip(written, output_shapes, strict=True)]

    return launch


def between_margins(x: Array) -> Array:
    """Copy x with NaN before and after it, float32."""
    return np.pad(x.astype(np.float32), MARGIN, constant_values=np.nan)
