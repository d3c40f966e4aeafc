"""What every test of the GPU kernels gets: memory that holds nan, and a faster interpreter."""

import functools
import types

import pytest

try:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    from anode_fast.kernels.gpu import host
except ImportError:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device(device):
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1")
    return device


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """The memory that kernels are to fill holds nan first."""
    empty = host.empty
    monkeypatch.setattr(host, "empty", lambda *args: empty(*args).fill_(float("nan")))


@pytest.fixture(autouse=True, scope="session")
def _language_patched_once_a_launch():
    """The interpreter patches triton.language in every device function, 40% of its time."""
    if not hasattr(interpreter, "_LangPatchScope"):  # Triton 3.8's
        yield
        return
    patch, scopes, patched = interpreter._patch_lang, [], set()

    @functools.cache
    def languages_of(fn):
        return {name for name in (tl, tl.core) if any(name is x for x in fn.__globals__.values())}

    def restore():
        while scopes:
            scopes.pop().restore()
        patched.clear()

    def patch_once(fn):
        is_launch = not patched
        if not languages_of(fn) <= patched:
            patched.update(languages_of(fn))
            scopes.append(patch(fn))
        return types.SimpleNamespace(restore=restore if is_launch else lambda: None)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", patch_once)
        yield
