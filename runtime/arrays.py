"""Where the solver computes: numpy and scipy on the host, or torch on a device, behind one face.

The solver (`runtime.solve`, `runtime.local_search`, `runtime.subspaces`, and the sums of `runtime.moments`) is written once
over the array API standard: ``xp`` is the namespace that `array_api_compat` gives to numpy or to torch. What the standard
lacks is here, a method each: Cholesky factors and what is solved with them, submatrices, diagonals that are written to.
On the host LAPACK works in place, as it always did.

Sums and solutions are float64 everywhere. Where a device multiplies float64 far more slowly than float32 (all but the large
GPUs), a matrix is factored in float32 and each solution refined against the float64 matrix (Higham, Accuracy and Stability
of Numerical Algorithms, chapter 12): x <- x + L^-T L^-1 (b - A x). The size of the last steps says how far the solution is
from the true one; where two of them do not bring it below `ACCURACY`, or float32 does not factor the matrix at all, it is
factored in float64. How often that was so stands in the report (`Precision`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import array_api_compat.numpy
import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.linalg import blas, lapack

from liar_opt.runtime.errors import InternalError, OptionError

SOLVERS = ("auto", "host", "device")
ACCURACY = 1e-7
"""How far a solution that was refined may be from the exact one, relative, by the estimate of its last steps."""
STEPS = 2
"""Steps of refinement at the most."""
SLOW = 6.0
"""So many times the time of a float32 product, and float64 is not there at speed."""
PANEL = 64
"""Columns that are worked on at a time where a whole matrix would be copied."""
AnyArray = Any
"""An array of numpy's or a tensor of torch's."""
Indices = NDArray[np.integer[Any]]


@dataclass
class Precision:
    """How well it was solved, counted over a run.

    Attributes:
        single: whether matrices are factored in float32 first.
        factored: matrices that were factored.
        again: of them those that needed float64.
        worst: the largest estimated error of a solution in float32, behind its refinement; relative.
    """

    single: bool = False
    factored: int = 0
    again: int = 0
    worst: float = 0.0


@dataclass(eq=False)
class Cholesky:
    """A factor L of a symmetric positive definite matrix, [n, n], lower triangle; what is above it means nothing.

    Attributes:
        arrays: where it is.
        lower: L, of float64 or float32.
        matrix: what it is a factor of, where solutions are refined against it; None where they are exact.
    """

    arrays: Arrays
    lower: AnyArray
    matrix: AnyArray | None = None
    exact: AnyArray | None = field(default=None, init=False)

    def solve(self, right: AnyArray) -> AnyArray:
        """Returns x with L L^T x = right, [n, m]."""
        if self.matrix is None:
            return self.arrays.solved(self.lower, right)
        if self.exact is None:
            refined = self._refined(right)
            if refined is not None:
                return refined
            self._in_double()
        return self.arrays.solved(self.exact, right)

    def inverse(self, dtype: Any) -> AnyArray:
        """Returns (L L^T)^-1 in full, of float64 or float32."""
        if self.matrix is not None and self.exact is None and dtype != self.lower.dtype:
            self._in_double()
        return self.arrays.inverted(self.lower if self.exact is None else self.exact, dtype)

    def _refined(self, right: AnyArray) -> AnyArray | None:
        """Returns the solution after steps of refinement; None where they do not get there."""
        arrays, before = self.arrays, math.inf
        low = self.lower.dtype
        found = arrays.cast(arrays.solved(self.lower, arrays.cast(right, low)), right.dtype)
        for _ in range(STEPS):
            residual = right - self.matrix @ found
            step = arrays.cast(arrays.solved(self.lower, arrays.cast(residual, low)), right.dtype)
            found = found + step
            size, whole = math.sqrt(arrays.inner(step, step)), math.sqrt(arrays.inner(found, found))
            moved = size / whole if whole else 0.0
            # The steps shrink by a factor each: by that much less than the last one is left.
            left = moved * min(moved / before if before < math.inf and before else moved, 1.0)
            if left <= ACCURACY:
                arrays.precision.worst = max(arrays.precision.worst, left)
                return found
            before = moved
        return None

    def _in_double(self) -> None:
        self.arrays.precision.again += 1
        self.exact = self.arrays.lower_of(self.matrix)
        if self.exact is None:
            raise InternalError(f"a matrix of width {self.lower.shape[0]} factors in float32 and not in float64")


class Arrays:
    """numpy on the host.

    Attributes:
        xp: the namespace, of the array API standard.
        where: what messages and the report call it.
        precision: how well it was solved.
    """

    xp: Any = array_api_compat.numpy
    where = "host"

    def __init__(self) -> None:
        self.precision = Precision()

    # -- in and out -------------------------------------------------------------------------------------------------

    def there(self, array: Any) -> AnyArray:
        """Takes an array, a tensor or a value of ONNX Runtime's as an array of its own type."""
        if isinstance(array, np.ndarray):
            return array
        return array.detach().cpu().numpy() if hasattr(array, "detach") else np.asarray(array.numpy())

    def real(self, array: Any) -> AnyArray:
        """Takes the same as float64; what is that already is not copied."""
        return np.asarray(self.there(array), np.float64)

    def host(self, array: AnyArray) -> NDArray[Any]:
        """Returns an array as one of numpy's."""
        return np.asarray(array)

    def index(self, indices: NDArray[Any]) -> AnyArray:
        """Returns indices, which are of numpy, as what arrays are indexed with."""
        return indices

    def zeros(self, shape: Sequence[int], dtype: Any = None) -> AnyArray:
        """Returns zeros; of float64 if not said."""
        return np.zeros(shape, np.float64 if dtype is None else dtype)

    def eye(self, size: int, dtype: Any = None) -> AnyArray:
        """Returns an identity; of float64 if not said."""
        return np.eye(size, dtype=np.float64 if dtype is None else dtype)

    def empty(self, shape: Sequence[int], dtype: Any) -> AnyArray:
        """Returns an array whose numbers mean nothing."""
        return np.empty(shape, dtype)

    def cast(self, array: AnyArray, dtype: Any) -> AnyArray:
        """Returns an array in a type; the same where it has that."""
        return array.astype(dtype, copy=False)

    # -- parts ------------------------------------------------------------------------------------------------------

    def take(self, array: AnyArray, indices: Indices) -> AnyArray:
        """Returns some rows."""
        return array[indices]

    def part(self, matrix: AnyArray, rows: Indices, columns: Indices) -> AnyArray:
        """Returns a submatrix, rows behind each other in memory."""
        # Two steps of `take`: far quicker than one look-up by pairs.
        return np.asarray(matrix.take(rows, axis=0).take(columns, axis=1), order="C")

    def diagonal(self, matrix: AnyArray) -> AnyArray:
        """Returns the diagonal, or the diagonals of a stack; written to, the matrix changes."""
        return np.einsum("...ii->...i", matrix)

    def floor_diagonal(self, matrix: AnyArray) -> None:
        """Raises what is negative on the diagonal to zero, in place."""
        diagonal = self.diagonal(matrix)
        np.maximum(diagonal, 0.0, out=diagonal)

    # -- products ---------------------------------------------------------------------------------------------------

    def inner(self, left: AnyArray, right: AnyArray) -> float:
        """Sum of the products of all entries; arrays of either order (LAPACK gives columns) are read in place."""
        if left.flags.f_contiguous and right.flags.f_contiguous:
            left, right = left.T, right.T
        if left.ndim != 2 or (left.flags.c_contiguous and right.flags.c_contiguous):
            return float(np.vdot(left, right))
        return float(np.einsum("ij,ij->", left, right))

    def column_inner(self, left: AnyArray, right: AnyArray) -> AnyArray:
        """Sums of the products of all entries of each column."""
        return np.einsum("ij,ij->j", left, right)

    def subtract_product(self, matrix: AnyArray, left: AnyArray, right: AnyArray) -> None:
        """Matrix -= left^T right, in place."""
        # matrix.T has the column order that BLAS writes into without a copy.
        gemm = blas.sgemm if matrix.dtype == np.float32 else blas.dgemm
        gemm(-1.0, right.T, left.T, beta=1.0, c=matrix.T, trans_b=1, overwrite_c=1)

    def narrowed(self, matrix: AnyArray) -> AnyArray:
        """Returns a square R with R R^T = matrix matrix^T, for a matrix with more columns than rows."""
        return np.ascontiguousarray(np.asarray(np.linalg.qr(matrix.T, mode="r")).T)

    # -- factors ----------------------------------------------------------------------------------------------------

    def factor(self, matrix: AnyArray, lam: float, largest: float) -> Cholesky | None:
        """Returns the factor of a symmetric matrix + lam I; None where it is singular, but for a rounding residue.

        Args:
            matrix: [n, n].
            lam: what is added to its diagonal.
            largest: entry of its diagonal.
        """
        shifted = matrix.copy()
        diagonal = self.diagonal(shifted)
        diagonal += lam
        lower = self.lower_of(shifted)
        floor = matrix.shape[0] * np.finfo(np.float64).eps * (largest + lam)
        if lower is None or float(np.min(np.diagonal(lower))) ** 2 <= floor:
            return None
        self.precision.factored += 1
        return Cholesky(self, lower)

    def lower_of(self, matrix: AnyArray) -> AnyArray | None:
        """Returns the Cholesky factor of a matrix, in its memory; None where it has none."""
        lower, info = lapack.dpotrf(matrix.T, lower=1, overwrite_a=1, clean=0)
        return lower if info == 0 else None

    def solved(self, lower: AnyArray, right: AnyArray) -> AnyArray:
        """Returns x with L L^T x = right."""
        return scipy.linalg.cho_solve((lower, True), right, check_finite=False)

    def inverted(self, lower: AnyArray, dtype: Any) -> AnyArray:
        """Returns (L L^T)^-1 in full, of float64 or float32; the factor is of float64 either way."""
        potri = lapack.spotri if dtype == np.float32 else lapack.dpotri
        inverse, info = potri(lower.astype(dtype, copy=False), lower=1)
        if info != 0:
            raise InternalError(f"inverse of a factored matrix failed with info {info}")
        # The transposed result holds the upper triangle row by row; the lower one is copied from it by panels.
        full = np.ascontiguousarray(inverse.T)
        mirror_upper(full)
        return full

    def small_inverse(self, matrix: AnyArray) -> AnyArray:
        """Returns L^-1 of a small symmetric positive definite matrix L L^T."""
        lower = np.linalg.cholesky(matrix)
        return scipy.linalg.solve_triangular(lower, self.eye(len(lower), lower.dtype), lower=True)

    # -- what is said of it -----------------------------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        """Returns where it was solved, and how well, as plain data."""
        known = self.precision
        said = {"where": self.where, "precision": "float32, refined" if known.single else "float64"}
        if not known.single:
            return said
        return {**said, "factored": known.factored, "again_in_float64": known.again, "worst_error": known.worst}


class TorchArrays(Arrays):
    """torch on one of its devices.

    Args:
        device: "cuda", "cpu", or what torch calls one.
        single: whether matrices are factored in float32 and solutions refined; if None as the device's speed says.
    """

    def __init__(self, device: Any = "cuda", single: bool | None = None) -> None:
        super().__init__()
        # Typed loosely: what torch has beside the standard is used, and numpy's methods are overridden.
        self.torch = torch = cast(Any, importlib.import_module("torch"))
        self.xp = importlib.import_module("array_api_compat.torch")
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        self.where = f"{self.device} ({name})" if name else f"torch on {self.device}"
        self.precision.single = self._slow_double() if single is None else single

    def _slow_double(self) -> bool:
        """Returns whether products of float64 take far longer than those of float32."""
        if self.device.type != "cuda":
            return False
        seconds = {}
        for dtype in (self.torch.float32, self.torch.float64):
            matrix = self.torch.ones((2048, 2048), dtype=dtype, device=self.device)
            matrix @ matrix  # loads the kernels
            self.torch.cuda.synchronize(self.device)
            began = time.perf_counter()
            matrix @ matrix @ matrix
            self.torch.cuda.synchronize(self.device)
            seconds[dtype] = time.perf_counter() - began
        return bool(seconds[self.torch.float64] > SLOW * seconds[self.torch.float32])

    def there(self, array: Any) -> AnyArray:
        """Takes a tensor, an array or a value of ONNX Runtime's, by dlpack; without a copy where it is on the device."""
        if isinstance(array, self.torch.Tensor):
            return array.detach().to(self.device)
        if not isinstance(array, np.ndarray):  # a value of ONNX Runtime's; older ones share no memory
            if hasattr(array, "__dlpack__"):
                return self.torch.from_dlpack(array).to(self.device)
            array = array.numpy()
        plain = np.asarray(array)
        if plain.dtype.kind == "V":  # bfloat16 is no type of numpy's own
            return self.torch.from_numpy(plain.view(np.int16).copy()).to(self.device).view(self.torch.bfloat16)
        plain = plain if plain.flags.writeable and all(s >= 0 for s in plain.strides) else plain.copy()
        return self.torch.from_numpy(plain).to(self.device)

    def real(self, array: Any) -> AnyArray:
        """Takes the same as float64."""
        return self.there(array).to(self.torch.float64)

    def host(self, array: AnyArray) -> NDArray[Any]:
        """Returns a tensor as an array of numpy."""
        return array if isinstance(array, np.ndarray) else np.asarray(array.detach().cpu().numpy())

    def index(self, indices: NDArray[Any]) -> AnyArray:
        """Returns indices on the device."""
        return self.torch.from_numpy(np.ascontiguousarray(indices)).to(self.device)

    def zeros(self, shape: Sequence[int], dtype: Any = None) -> AnyArray:
        """Returns zeros; of float64 if not said."""
        return self.torch.zeros(tuple(shape), dtype=self.torch.float64 if dtype is None else dtype, device=self.device)

    def eye(self, size: int, dtype: Any = None) -> AnyArray:
        """Returns an identity; of float64 if not said."""
        return self.torch.eye(size, dtype=self.torch.float64 if dtype is None else dtype, device=self.device)

    def empty(self, shape: Sequence[int], dtype: Any) -> AnyArray:
        """Returns a tensor whose numbers mean nothing."""
        return self.torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def cast(self, array: AnyArray, dtype: Any) -> AnyArray:
        """Returns a tensor in a type."""
        return array.to(dtype)

    def take(self, array: AnyArray, indices: Indices) -> AnyArray:
        """Returns some rows."""
        return array.index_select(0, self.index(indices))

    def part(self, matrix: AnyArray, rows: Indices, columns: Indices) -> AnyArray:
        """Returns a submatrix."""
        return matrix.index_select(0, self.index(rows)).index_select(1, self.index(columns))

    def diagonal(self, matrix: AnyArray) -> AnyArray:
        """Returns the diagonal, or the diagonals of a stack; written to, the matrix changes."""
        return matrix.diagonal(dim1=-2, dim2=-1)

    def floor_diagonal(self, matrix: AnyArray) -> None:
        """Raises what is negative on the diagonal to zero, in place."""
        self.diagonal(matrix).clamp_(min=0.0)

    def inner(self, left: AnyArray, right: AnyArray) -> float:
        """Sum of the products of all entries."""
        return float((left * right).sum())

    def column_inner(self, left: AnyArray, right: AnyArray) -> AnyArray:
        """Sums of the products of all entries of each column."""
        return (left * right).sum(dim=0)

    def subtract_product(self, matrix: AnyArray, left: AnyArray, right: AnyArray) -> None:
        """Matrix -= left^T right, in place."""
        matrix.addmm_(left.T, right, alpha=-1.0)

    def narrowed(self, matrix: AnyArray) -> AnyArray:
        """Returns a square R with R R^T = matrix matrix^T, for a matrix with more columns than rows."""
        return self.torch.linalg.qr(matrix.T, mode="r").R.T.contiguous()

    def factor(self, matrix: AnyArray, lam: float, largest: float) -> Cholesky | None:
        """Returns the factor of a symmetric matrix + lam I; None where it is singular, but for a rounding residue."""
        shifted = matrix.clone()
        self.diagonal(shifted).add_(lam)
        low = self.torch.float32
        lower = self.lower_of(shifted.to(low)) if self.precision.single else None
        refined = lower is not None and self._regular(lower, largest + lam)
        if not refined:
            lower = self.lower_of(shifted)
            if lower is None or not self._regular(lower, largest + lam):
                return None
            self.precision.again += self.precision.single
        self.precision.factored += 1
        return Cholesky(self, lower, shifted if refined else None)

    def _regular(self, lower: AnyArray, scale: float) -> bool:
        """Returns whether a factor is more than a rounding residue everywhere."""
        floor = lower.shape[0] * self.torch.finfo(lower.dtype).eps * scale
        return bool(float(self.diagonal(lower).min()) ** 2 > floor)

    def lower_of(self, matrix: AnyArray) -> AnyArray | None:
        """Returns the Cholesky factor of a matrix; None where it has none."""
        lower, info = self.torch.linalg.cholesky_ex(matrix)
        return lower if int(info) == 0 else None

    def solved(self, lower: AnyArray, right: AnyArray) -> AnyArray:
        """Returns x with L L^T x = right."""
        return self.torch.cholesky_solve(right, lower)

    def inverted(self, lower: AnyArray, dtype: Any) -> AnyArray:
        """Returns (L L^T)^-1 in full, of float64 or float32."""
        return self.torch.cholesky_inverse(lower.to(dtype)).contiguous()

    def small_inverse(self, matrix: AnyArray) -> AnyArray:
        """Returns L^-1 of a small symmetric positive definite matrix L L^T."""
        lower = self.torch.linalg.cholesky(matrix)
        return self.torch.linalg.solve_triangular(lower, self.eye(len(lower), lower.dtype), upper=False)


HOST = Arrays()
_solver: Arrays = HOST


def arrays_of(array: AnyArray) -> Arrays:
    """Returns where an array is."""
    if isinstance(array, np.ndarray):
        return HOST
    if isinstance(_solver, TorchArrays) and array.device == _solver.device:
        return _solver
    return _torch_on(array.device)


@functools.cache
def _torch_on(device: Any) -> TorchArrays:
    return TorchArrays(device)


def solver() -> Arrays:
    """Returns where this run solves."""
    return _solver


@contextlib.contextmanager
def solving_on(arrays: Arrays) -> Iterator[Arrays]:
    """Moments that are made within the block are there, and what is solved from them."""
    global _solver
    before, _solver = _solver, arrays
    try:
        yield arrays
    finally:
        _solver = before


def device_of_torch() -> str | None:
    """Returns torch's device for the solver: "cuda" where a device and a torch for it are; None elsewhere."""
    # torch takes seconds to import; a machine without the driver has no use for it.
    if not _driver_present() or importlib.util.find_spec("torch") is None:
        return None
    import torch

    return "cuda" if torch.cuda.is_available() else None


def arrays_for(name: str) -> Arrays:
    """Returns where an option ``solver`` says to solve.

    Args:
        name: "host" is numpy; "device" is torch on the CUDA device; "auto" the device where it can be had.

    Raises:
        OptionError: unknown, or "device" where there is none.
    """
    if name not in SOLVERS:
        raise OptionError(f"solver '{name}' is unknown; choose one of {', '.join(SOLVERS)}")
    device = None if name == "host" else device_of_torch()
    if device is not None:
        return TorchArrays(device)
    if name == "device":
        raise OptionError(
            "solver 'device' needs a CUDA device, its driver and a torch that was built for it; use solver 'host'"
        )
    return HOST


def _driver_present() -> bool:
    places = ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia", "/dev/dxg", "C:/Windows/System32/nvcuda.dll")
    return any(Path(p).exists() for p in places)


def mirror_upper(matrix: NDArray[Any]) -> None:
    """Copies the upper triangle of a square array of numpy [n, n] onto the lower one in place, a panel at a time."""
    width = matrix.shape[0]
    for low in range(0, width, PANEL):
        high = min(low + PANEL, width)
        square = np.triu(matrix[low:high, low:high])
        matrix[low:high, low:high] = square + np.triu(square, 1).T
        matrix[high:, low:high] = matrix[low:high, high:].T
