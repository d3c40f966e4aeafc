"""Prints programs for test_program.cpp: lowered, with arguments and what torch makes of them."""

import ctypes

import torch

from anode_fast.kernels import program
from anode_fast.kernels.cpu import lowering
from tests.kernels.cpu.test_program import FIELDS, built, chain
from tests.kernels.programs import tensors_of

ROWS, WITH_COTANGENT = 64, 2  # as many as the widest tile has, as the narrowest vector
TIME = 0.75
ENUMS = {"op": "Op", "space": "Space"}


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


def show(name, of):
    shape = lowering.shape(of)
    members = []
    for member, kind in shape._fields_:
        value = getattr(shape, member)
        if isinstance(kind, type) and issubclass(kind, ctypes._Pointer):
            count = {"groups": shape.end_group[3], "operations": count_operations(shape)}
            n = count[member] if member in count else getattr(shape, f"num_{member}")
            struct = CPP[member]
            rows = ", ".join(literal(value[i]) for i in range(n)) or "{}"
            print(f"const {struct} {name}_{member}[] = {{{rows}}};")
            members.append(f"{name}_{member}")
        else:
            members.append(literal(value))
    tensors = tensors_of(of)
    y = torch.randn(ROWS, of.dim, dtype=torch.float64)
    t = torch.tensor(TIME, dtype=torch.float64)
    cotangent = torch.randn_like(y)
    cotangent[WITH_COTANGENT:] = 0
    of_y, of_t, grads = program.vjp(of, tensors, t, y, cotangent)
    value = program.evaluate(of, tensors, t, y)
    outcome = ", ".join(map(numbers, [y, cotangent, value, of_y, of_t]))
    lists = [", ".join(map(numbers, x)) for x in (tensors, grads)]
    print(f"const Example {name}{{")
    print(f'    "{name}", {{{", ".join(members)}}}, {outcome}, {{{lists[0]}}}, {{{lists[1]}}}}};')


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


torch.manual_seed(0)
examples = {make.__name__: built(make, 5) for make in FIELDS}
for activation in ("relu", "tanh", "gelu", "elu"):
    examples[f"{activation}_chain"] = chain(3, (17, 20), activation, True)
print(f"constexpr double kTime = {TIME};")
for name, of in examples.items():
    show(name, of)
print(f"const Example* const kExamples[] = {{{', '.join('&' + name for name in examples)}}};")
