"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): choose integers so that a matrix's products, not its values, stay.

The columns are rounded one after the other; what rounding one of them changes in the products of typical inputs is made
up for in those to come. The grid, scales and zero points, is fixed before. torchao's implementation needs a GPU and
its own grid; this one takes any.
"""

import numpy as np
import torch
from torch import Tensor

DAMPING = 0.01  # of the mean power, added to every input's: GPTQ's own value
COLUMNS = 32  # rounded before their errors are passed on to all that follow


def inverse_factor(moments: Tensor) -> Tensor:
    """Upper triangular U with U.T U = (moments + damping) ** -1, float32.

    Args:
        moments: mean of x x^T over inputs x, [in, in].
    """
    damped = moments.double()
    damped = damped + torch.eye(len(damped)) * (damped.diagonal().mean() * DAMPING).clamp(min=1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def compensated_codes(
    matrix: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, block: int, top: int, factor: np.ndarray
) -> np.ndarray:
    """Round a matrix to integers on a given grid, w = (q - zero_point) * scale.

    Args:
        matrix: float32 [rows, columns].
        scales, zero_points: float32 [rows, blocks] each.
        block: columns that share them.
        top: largest integer; the smallest is 0.
        factor: `inverse_factor` of the inputs' second moments, [columns, columns].
    Returns:
        uint8 [rows, columns].
    """
    columns = matrix.shape[1]
    left = np.array(matrix.T, order="C")  # [columns, rows], a copy: what one column needs lies side by side
    codes = np.empty(left.shape, np.uint8)
    scales, zero_points = np.ascontiguousarray(scales.T), np.ascontiguousarray(zero_points.T)  # [blocks, rows]
    for start in range(0, columns, COLUMNS):
        end = min(start + COLUMNS, columns)
        errors = np.empty((end - start, left.shape[1]), np.float32)
        for column in range(start, end):
            scale, zero_point = scales[column // block], zero_points[column // block]
            code = np.clip(np.rint(left[column] / scale) + zero_point, 0, top)  # [rows]
            error = (left[column] - (code - zero_point) * scale) / factor[column, column]
            left[column + 1 : end] -= factor[column, column + 1 : end, None] * error
            codes[column], errors[column - start] = code, error
        left[end:] -= factor[start:end, end:].T @ errors
    return np.ascontiguousarray(codes.T)
