"""Writes programs for the C++ tests into a folder: python -m tests.cpp.programs FOLDER

programs.inc is test_program.cpp's: programs lowered, with arguments and what torch makes of them.
perceptrons.inc is test_solver.cpp's: perceptrons lowered, with what they are.
"""

import ctypes
import random
import sys
from pathlib import Path

import torch

from anode_fast.kernels import program
from anode_fast.kernels.cpu import lowering
from anode_fast.spec import ACTIVATIONS, MLPSpec, program_of
from tests.kernels.cpu.test_program import FIELDS, built, chain
from tests.kernels.programs import tensors_of

ROWS, WITH_COTANGENT = 64, 2  # as many as the widest tile has, as the narrowest vector
TIME = 0.75
ENUMS = {"op": "Op", "space": "Space"}

WIDTHS = (1, 2, 3, 5, 7, 17, 33)
MOST_LAYERS, MOST_VECTORS = 4, 4  # hidden layers; vectors of the widest tile


def literal(x):
    """A struct, an array or a number as C++ has it."""
    if isinstance(x, ctypes.Structure):
        values = [(name, literal(getattr(x, name))) for name, *_ in x._fields_]
        parts = [f"{ENUMS[name]}({v})" if name in ENUMS else v for name, v in values]
        return "{" + ", ".join(parts) + "}"
    if isinstance(x, ctypes.Array):
        return "{" + ", ".join(map(literal, x)) + "}"
    return repr(x)


def numbers(tensor):
    return "{" + ", ".join(map(repr, tensor.flatten().tolist())) + "}"


def shape_of(name, of):
    """Definitions of the arrays of a program's ProgramShape, and its initialiser."""
    shape = lowering.shape(of)
    lines, members = [], []
    for member, kind in shape._fields_:
        value = getattr(shape, member)
        if isinstance(kind, type) and issubclass(kind, ctypes._Pointer):
            count = {"groups": shape.end_group[3], "operations": count_operations(shape)}
            n = count[member] if member in count else getattr(shape, f"num_{member}")
            struct = CPP[member]
            rows = ", ".join(literal(value[i]) for i in range(n)) or "{}"
            lines.append(f"const {struct} {name}_{member}[] = {{{rows}}};")
            members.append(f"{name}_{member}")
        else:
            members.append(literal(value))
    return lines, "{" + ", ".join(members) + "}"


def example(name, of):
    lines, shape = shape_of(name, of)
    tensors = tensors_of(of)
    y = torch.randn(ROWS, of.dim, dtype=torch.float64)
    t = torch.tensor(TIME, dtype=torch.float64)
    cotangent = torch.randn_like(y)
    cotangent[WITH_COTANGENT:] = 0
    of_y, of_t, grads = program.vjp(of, tensors, t, y, cotangent)
    value = program.evaluate(of, tensors, t, y)
    outcome = ", ".join(map(numbers, [y, cotangent, value, of_y, of_t]))
    lists = [", ".join(map(numbers, x)) for x in (tensors, grads)]
    lines.append(f"const Example {name}{{")
    lines.append(f'    "{name}", {shape}, {outcome}, {{{lists[0]}}}, {{{lists[1]}}}}};')
    return lines


def perceptron(name, spec):
    lines, shape = shape_of(name, program_of(spec))
    hidden = ", ".join(map(str, spec.hidden))
    activation = ACTIVATIONS.index(spec.activation)
    what = f"{spec.dim}, {len(spec.hidden)}, {{{hidden}}}, {activation}, {spec.time_dependent:d}"
    lines.append(f"const Perceptron {name}{{{what}, {shape}}};")
    return lines


CPP = {
    "groups": "Group",
    "operations": "Operation",
    "constants": "ConstantShape",
    "panels": "PanelShape",
    "sums": "SumShape",
    "tensors": "TensorShape",
    "record_zeros": "Zeros",
    "delta_zeros": "Zeros",
}


def count_operations(shape):
    return max((shape.groups[i].end_operation for i in range(shape.end_group[3])), default=0)


def examples():
    torch.manual_seed(0)
    programs = {make.__name__: built(make, 5) for make in FIELDS}
    for activation in ("relu", "tanh", "gelu", "elu"):
        programs[f"{activation}_chain"] = chain(3, (17, 20), activation, True)
    lines = [f"constexpr double kTime = {TIME};"]
    for name, of in programs.items():
        lines += example(name, of)
    sources = ", ".join(f"&{name}" for name in programs)
    return [*lines, f"const Example* const kExamples[] = {{{sources}}};"]


def perceptrons():
    """Of random widths for every activation, depth and number of vectors; that of the solves."""
    rng = random.Random(1)
    lines, names = [], []
    for activation in ACTIVATIONS:
        for layers in range(1, MOST_LAYERS + 1):
            for vectors in range(1, MOST_VECTORS + 1):
                dim, *hidden = rng.choices(WIDTHS, k=1 + layers)
                names.append(f"{activation}_{layers}_{vectors}")
                spec = MLPSpec(dim, tuple(hidden), activation, rng.random() < 0.5)
                lines += perceptron(names[-1], spec)
    lines += perceptron("of_solves", MLPSpec(3, (5, 7), "tanh", True))
    shape = f"[{len(ACTIVATIONS)}][{MOST_LAYERS}][{MOST_VECTORS}]"
    sources = ", ".join(f"&{name}" for name in names)
    return [*lines, f"const Perceptron* const kPerceptrons{shape} = {{{sources}}};"]


if __name__ == "__main__":
    for file, lines in (("programs.inc", examples()), ("perceptrons.inc", perceptrons())):
        Path(sys.argv[1], file).write_text("\n".join(lines) + "\n")
