"""What a callable's value may depend on besides its arguments, and whether that has changed.

That is: attributes of modules and other objects, closures, default arguments, and the globals that
its code names; of lists and dicts among them the entries. What lies deeper is not seen.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_OURS_OR_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_FOREIGN = ("torch", "numpy", "builtins", "math", "functools", "typing", "collections", "random")
_MOST_ENTRIES = 1000  # of a list whose entries are looked at
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Surroundings:
    """What a callable sees, as it is now.

    Args:
        func: The callable.

    Attributes:
        counters: After `find_counters`: integers that one call adds to, and how much.
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        self._hooks: list[dict[Any, Any]] = []
        self.counters: list[tuple[_Place, int]] = []
        self._dicts: list[dict[Any, Any]] = []
        self._lists: list[list[Any]] = []
        self._sets: list[set[Any]] = []
        self._cells: list[types.CellType] = []
        self._names: list[tuple[dict[str, Any], str]] = []
        self._seen: set[int] = set()
        self._look(func)
        self._note()

    # --- what there is

    def _look(self, x: Any) -> None:
        if isinstance(x, (*_OURS_OR_PLAIN, Tensor, types.ModuleType)) or id(x) in self._seen:
            return
        self._seen.add(id(x))
        if isinstance(x, types.FunctionType):
            self._look_at_function(x)
        elif isinstance(x, types.MethodType):
            self._look(x.__self__)
            self._look(x.__func__)
        elif isinstance(x, functools.partial):
            self._look((x.func, *x.args, *x.keywords.values()))
        elif isinstance(x, (list, tuple, set, dict)):
            self._look_at_container(x)
        elif isinstance(x, type):
            self._look_at_class(x)
        elif isinstance(x, nn.Module) or (hasattr(x, "__dict__") and not _is_foreign(type(x))):
            self._look_at_object(x)

    def _look_at_function(self, x: types.FunctionType) -> None:
        if _is_foreign(x):
            return
        for cell in x.__closure__ or ():
            self._cells.append(cell)
            self._look(_contents(cell))
        self._look(x.__defaults__ or ())
        self._look(x.__kwdefaults__ or {})
        for name in _names(x.__code__):
            if name in x.__globals__:
                value = x.__globals__[name]
                if not isinstance(value, types.ModuleType):
                    self._names.append((x.__globals__, name))
                    self._look(value)

    def _look_at_container(self, x: Any) -> None:
        if isinstance(x, dict):
            self._dicts.append(x)
            entries: Iterable[Any] = x.values()
        else:
            entries = x
            if isinstance(x, list):
                self._lists.append(x)
            elif isinstance(x, set):
                self._sets.append(x)
        if len(x) <= _MOST_ENTRIES:
            for entry in entries:
                self._look(entry)

    def _look_at_class(self, x: type) -> None:
        if _is_foreign(x):
            return
        for base in x.__mro__:
            if not _is_foreign(base):
                for member in vars(base).values():
                    inner = getattr(member, "__func__", getattr(member, "fget", member))
                    if isinstance(inner, types.FunctionType):
                        self._look(inner)

    def _look_at_object(self, x: Any) -> None:
        members = x.__dict__
        self._dicts.append(members)
        if isinstance(x, nn.Module):
            self._hooks += [members[name] for name in _HOOKS]
            # The module's other dicts are of hooks: `has_hooks` looks at them.
            for name in ("_parameters", "_buffers", "_modules"):
                self._look(members[name])
            values = [v for k, v in members.items() if not k.startswith("_")]
        else:
            values = list(members.values())
        for value in values:
            self._look(value)
        self._look(type(x))

    # --- as it was

    def _note(self) -> None:
        self._were_dicts = [dict(x) for x in self._dicts]
        self._were_lists = [list(x) for x in self._lists]
        self._were_sets = [set(x) for x in self._sets]
        self._were_cells = [_contents(x) for x in self._cells]
        self._were_names = [space.get(name) for space, name in self._names]

    def have_changed(self) -> bool:
        """Whether anything is another than it was; counters do not count."""
        self.accept()
        try:
            return not (
                all(map(operator.eq, self._dicts, self._were_dicts))
                and all(map(operator.eq, self._lists, self._were_lists))
                and all(map(operator.eq, self._sets, self._were_sets))
                and all(map(_is, map(_contents, self._cells), self._were_cells))
                and all(
                    _is(space.get(name), was)
                    for (space, name), was in zip(self._names, self._were_names, strict=True)
                )
            )
        except Exception:  # whatever comparing two different things raises
            return True

    def accept(self) -> None:
        """Takes the counters' values of now for those that were."""
        for place, _ in self.counters:
            place.accept(self)

    def restore(self) -> None:
        """Gives the counters the values that were."""
        for place, _ in self.counters:
            place.set(self, place.was(self))

    def find_counters(self) -> str:
        """Takes integers that one call has changed for counters, and puts all back as it was.

        Returns:
            What else has changed, "" if nothing.
        """
        changed = ""
        self.counters = []
        for place, before, after in self._changes():
            place.set(self, before)
            if type(before) is type(after) is int:
                self.counters.append((place, after - before))
            else:
                changed = changed or place.name()
        for group, were in ((self._lists, self._were_lists), (self._sets, self._were_sets)):
            for x, was in zip(group, were, strict=True):
                if len(x) != len(was):
                    x.clear()  # type: ignore[attr-defined]
                    (x.extend if isinstance(x, list) else x.update)(was)  # type: ignore[attr-defined]
                    changed = changed or f"a {type(x).__name__}"
        return changed

    def _changes(self) -> Iterator[tuple[_Place, Any, Any]]:
        for i, (x, was) in enumerate(zip(self._dicts, self._were_dicts, strict=True)):
            for key in [*was, *(k for k in x if k not in was)]:
                before, after = was.get(key, _MISSING), x.get(key, _MISSING)
                if before is not after and not _equal(before, after):
                    yield _Place(i, key), before, after
        for i, (cell, before) in enumerate(zip(self._cells, self._were_cells, strict=True)):
            if not _is(_contents(cell), before):
                yield _Place(i, None), before, _contents(cell)
        for i, ((space, name), before) in enumerate(
            zip(self._names, self._were_names, strict=True)
        ):
            if not _is(space.get(name), before):
                yield _Place(i, name, True), before, space.get(name)

    def count(self, calls: int) -> None:
        """Moves the counters on by so many calls."""
        for place, step in self.counters:
            place.set(self, place.get(self) + calls * step)

    def has_hooks(self) -> bool:
        """Whether a module among it has hooks."""
        return any(self._hooks) or nn.modules.module._has_any_global_hook()

    def getter(self, tensor: Tensor) -> Callable[[], Any]:
        """What fetches a tensor from where it is held, so that another one there is found too."""
        for x in self._dicts:
            for key, value in x.items():
                if value is tensor:
                    return functools.partial(x.get, key)
        for cell in self._cells:
            if _contents(cell) is tensor:
                return functools.partial(_contents, cell)
        for space, name in self._names:
            if space.get(name) is tensor:
                return functools.partial(space.get, name)
        return lambda: tensor


class _Place:
    """An entry of a dict, a cell, or a global name."""

    def __init__(self, index: int, key: Any, is_global: bool = False) -> None:
        self._index, self._key, self._is_global = index, key, is_global

    def name(self) -> str:
        return f"{self._key!r}" if self._key is not None else "a variable around it"

    def _space(self, of: Surroundings) -> dict[Any, Any]:
        return of._names[self._index][0] if self._is_global else of._dicts[self._index]

    def get(self, of: Surroundings) -> Any:
        if self._key is None:
            return _contents(of._cells[self._index])
        return self._space(of).get(self._key)

    def set(self, of: Surroundings, value: Any) -> None:
        if self._key is None:
            of._cells[self._index].cell_contents = value
        elif value is _MISSING:
            self._space(of).pop(self._key, None)
        else:
            self._space(of)[self._key] = value

    def was(self, of: Surroundings) -> Any:
        if self._key is None:
            return of._were_cells[self._index]
        return (
            of._were_names[self._index]
            if self._is_global
            else (of._were_dicts[self._index][self._key])
        )

    def accept(self, of: Surroundings) -> None:
        """Takes the value of now for the one before, if it is an integer still."""
        value = self.get(of)
        if type(value) is not int:
            return
        if self._key is None:
            of._were_cells[self._index] = value
        elif self._is_global:
            of._were_names[self._index] = value
        else:
            of._were_dicts[self._index][self._key] = value


_MISSING = object()


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return _MISSING


def _is(a: Any, b: Any) -> bool:
    return a is b or _equal(a, b)


def _equal(a: Any, b: Any) -> bool:
    """Whether two plain values are the same; others never are."""
    return type(a) is type(b) and isinstance(a, _OURS_OR_PLAIN) and a == b


def _is_foreign(x: Any) -> bool:
    """Whether a function or class belongs to a library that does not change under us."""
    return str(getattr(x, "__module__", "")).partition(".")[0] in _FOREIGN


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names that code, and code inside it, may look up as globals."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return tuple(dict.fromkeys([*code.co_names, *(name for c in inner for name in _names(c))]))
