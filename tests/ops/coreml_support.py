"""Core ML without a Mac: converts an exported program, and runs the ML program op by op in numpy.

coremltools predicts only on macOS. The op set is that of our programs; an op that is not here is an error, not a guess.
It cannot show what Apple's compiler accepts, nor speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.frontend.torch.ops import _get_inputs
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY, register_torch_op
from coremltools.converters.mil.mil import Builder, Program, types

Array = np.ndarray[Any, Any]


def convert(program: torch.export.ExportedProgram, precision: ct.precision) -> Program:
    """The ML program (iOS 18, with states) that coremltools makes of an exported program; nothing is loaded or run.

    coremltools 9.0 lacks an op that torch.export leaves where a buffer is passed on unchanged: it is registered here.
    """
    if "alias" not in _TORCH_OPS_REGISTRY:

        @register_torch_op
        def alias(context, node) -> None:  # type: ignore[no-untyped-def]
            context.add(Builder.identity(x=_get_inputs(context, node, expected=1)[0], name=node.name))

    model = ct.convert(
        program.run_decompositions({}),
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=precision,
        skip_model_load=True,
    )
    return model._mil_program


def run(program: Program, inputs: dict[str, Array], state: dict[str, Array]) -> list[Array]:
    """The outputs of one call of `main`; `state` is updated in place. Each result is rounded to its declared dtype."""
    main = program.functions["main"]
    values: dict[str, Array] = {**inputs}

    def value(var: Any) -> Any:
        if isinstance(var, (list, tuple)):
            return [value(item) for item in var]
        if var.name in values:
            return values[var.name]
        return var.val

    for operation in main.operations:
        if operation.op_type == "read_state":
            results = [state[operation.inputs["input"].name]]
        elif operation.op_type == "coreml_update_state":
            state[operation.inputs["state"].name] = value(operation.inputs["value"])
            results = [value(operation.inputs["value"])]
        elif operation.outputs[0].val is not None:
            continue  # a constant
        else:
            arguments = {name: value(var) for name, var in operation.inputs.items() if var is not None}
            computed = _OPS[operation.op_type](arguments)
            results = list(computed) if isinstance(computed, tuple) else [computed]
        for var, result in zip(operation.outputs, results, strict=True):
            values[var.name] = np.asarray(result).astype(types.nptype_from_builtin(var.dtype))
            assert values[var.name].shape == tuple(var.shape), (operation.op_type, operation.name)
    return [values[var.name] for var in main.outputs]


def _slice(a: dict[str, Any]) -> Array:
    rank = a["x"].ndim
    stride = a.get("stride")
    masks = {name: a.get(name) for name in ("begin_mask", "end_mask", "squeeze_mask")}
    cuts: list[slice | int] = []
    for axis in range(rank):
        begin, end = int(a["begin"][axis]), int(a["end"][axis])
        if masks["squeeze_mask"] is not None and masks["squeeze_mask"][axis]:
            cuts.append(begin)
            continue
        first = None if masks["begin_mask"] is not None and masks["begin_mask"][axis] else begin
        last = None if masks["end_mask"] is not None and masks["end_mask"][axis] else end
        cuts.append(slice(first, last, 1 if stride is None else int(stride[axis])))
    result: Array = a["x"][tuple(cuts)]
    return result


def _topk(a: dict[str, Any]) -> tuple[Array, Array]:
    """Of equal values the last one first: the other way round than torch, so that nobody relies on either."""
    x, axis, k = a["x"], int(a.get("axis", -1)), int(a["k"])
    assert not a.get("ascending", False)
    order = np.flip(np.argsort(x, axis=axis, kind="stable"), axis=axis)
    order = np.take(order, np.arange(k), axis=axis)
    return np.take_along_axis(x, order, axis=axis), order


def _softmax(a: dict[str, Any]) -> Array:
    exponentials = np.exp(a["x"] - a["x"].max(axis=int(a["axis"]), keepdims=True))
    result: Array = exponentials / exponentials.sum(axis=int(a["axis"]), keepdims=True)
    return result


def _reduce(function: Callable[..., Array]) -> Callable[[dict[str, Any]], Array]:
    return lambda a: function(a["x"], axis=tuple(int(i) for i in a["axes"]), keepdims=bool(a.get("keep_dims", False)))


def _matmul(a: dict[str, Any]) -> Array:
    x = np.swapaxes(a["x"], -1, -2) if a.get("transpose_x", False) else a["x"]
    y = np.swapaxes(a["y"], -1, -2) if a.get("transpose_y", False) else a["y"]
    return np.matmul(x, y)


def _pad(a: dict[str, Any]) -> Array:
    assert a.get("mode", "constant") == "constant"
    widths = np.asarray(a["pad"]).reshape(-1, 2)
    missing = [(0, 0)] * (a["x"].ndim - len(widths))
    return np.pad(a["x"], [*missing, *map(tuple, widths)], constant_values=a.get("constant_val", 0))


def _binary(function: Callable[[Array, Array], Array]) -> Callable[[dict[str, Any]], Array]:
    return lambda a: function(a["x"], a["y"])


def _unary(function: Callable[[Array], Array]) -> Callable[[dict[str, Any]], Array]:
    return lambda a: function(a["x"])


_OPS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "add": _binary(np.add),
    "sub": _binary(np.subtract),
    "mul": _binary(np.multiply),
    "real_div": _binary(np.divide),
    "floor_div": _binary(np.floor_divide),
    "minimum": _binary(np.minimum),
    "maximum": _binary(np.maximum),
    "equal": _binary(np.equal),
    "less": _binary(np.less),
    "less_equal": _binary(np.less_equal),
    "greater": _binary(np.greater),
    "greater_equal": _binary(np.greater_equal),
    "logical_and": _binary(np.logical_and),
    "logical_or": _binary(np.logical_or),
    "logical_not": _unary(np.logical_not),
    "sqrt": _unary(np.sqrt),
    "exp": _unary(np.exp),
    "log": lambda a: np.log(a["x"] + a.get("epsilon", 0)),
    "relu": lambda a: np.maximum(a["x"], 0),
    "identity": _unary(np.asarray),
    "cast": _unary(np.asarray),
    "clip": lambda a: np.clip(a["x"], a["alpha"], a["beta"]),
    "reduce_sum": _reduce(np.sum),
    "reduce_mean": _reduce(np.mean),
    "reduce_max": _reduce(np.max),
    "reduce_min": _reduce(np.min),
    "softmax": _softmax,
    "matmul": _matmul,
    "select": lambda a: np.where(a["cond"], a["a"], a["b"]),
    "fill_like": lambda a: np.full(a["ref_tensor"].shape, a["value"]),
    "cumsum": lambda a: np.cumsum(a["x"], axis=int(a["axis"])),
    "topk": _topk,
    "gather": lambda a: np.take(a["x"], a["indices"], axis=int(a["axis"])),
    "reshape": lambda a: a["x"].reshape([int(i) for i in a["shape"]]),
    "transpose": lambda a: a["x"].transpose([int(i) for i in a["perm"]]),
    "expand_dims": lambda a: np.expand_dims(a["x"], tuple(int(i) for i in a["axes"])),
    "squeeze": lambda a: np.squeeze(a["x"], tuple(int(i) for i in a["axes"])),
    "tile": lambda a: np.tile(a["x"], [int(i) for i in a["reps"]]),
    "concat": lambda a: np.concatenate(a["values"], axis=int(a["axis"])),
    "stack": lambda a: np.stack(a["values"], axis=int(a["axis"])),
    "slice_by_index": _slice,
    "pad": _pad,
}
