"""Sessions of ONNX Runtime on the CPU: what the engines onnx and llamacpp (its vision tower) have in common."""

from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as problems

from vlm.errors import UserError

# ONNX Runtime's errors share no base class.
LOAD_PROBLEMS = (
    problems.EPFail,
    problems.Fail,
    problems.InvalidArgument,
    problems.InvalidGraph,
    problems.InvalidProtobuf,
    problems.NoSuchFile,
    problems.NotImplemented,
    problems.RuntimeException,
)


def open_session(path: Path, threads: int, spins: bool = True) -> ort.InferenceSession:
    """Load a graph.

    Args:
        path: of the graph.
        threads: of its own pool.
        spins: whether idle threads of the pool keep their processors for a while. Only the pool that works most may:
            another's would take the processors away from it, for whole time slices.
    Raises:
        UserError: the file is not there, damaged, or not for the installed version.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if not spins:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors; warnings about unused constants say nothing to a user
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except LOAD_PROBLEMS as error:
        raise UserError(f"{path}: ONNX Runtime {ort.__version__} cannot load it ({error}). Export it again.") from error
