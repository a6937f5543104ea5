"""The library is compiled once and kept; without a compiler plain torch serves, and says so once."""

import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from s2o_compile import S2OConfig, attention
from s2o_compile.kernels.support import cpp_library
from s2o_compile.kernels.support.errors import ImplementationUnavailableError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unloaded():
    """Nothing is known of the machine, before and after."""
    for function in (cpp_library._loaded, cpp_library._warn):
        function.cache_clear()
    yield
    for function in (cpp_library._loaded, cpp_library._warn):
        function.cache_clear()


def attend(implementation="auto"):
    q, k, v = torch.randn(3, 1, 2, 600, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    return attention(q, k, v, causal=True, config=S2OConfig(tau=0.5, min_seq_len=0, implementation=implementation))


def test_a_machine_without_a_compiler_says_so_once_and_computes_the_same(monkeypatch):
    expected = attend()
    cpp_library._loaded.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(UserWarning, match=r"plain torch.*expected a C\+\+ compiler.*got none.*Install g\+\+"):
        actual = attend()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend()
    assert cpp_library.why_not()
    assert not cpp_library.serves(CPU)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_it_can_be_switched_off_in_silence(monkeypatch):
    monkeypatch.setenv("S2O_CPP", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cpp_library.serves(CPU)
    assert cpp_library.why_not() == "S2O_CPP=0"


def test_other_sources_have_a_library_of_their_own_and_no_warning(monkeypatch, tmp_path):
    if not cpp_library.serves(CPU):
        pytest.skip("needs a C++ compiler")
    source = tmp_path / "some.cpp"
    source.write_text('extern "C" int s2o_seven() { return 7; }')
    assert cpp_library.quietly((source,)).s2o_seven() == 7
    monkeypatch.setenv("S2O_CPP", "0")
    cpp_library._loaded.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpp_library.quietly((source,)) is None


FAILING = {
    "error": (
        "#!/bin/sh\necho 'a warning' >&2; echo 'error: no licence today' >&2; exit 1\n",
        "error: no licence today",
    ),
    "crash": ("#!/bin/sh\nkill -SEGV $$\n", "died with"),
    "silent": ("#!/bin/sh\necho >&2; exit 1\n", "CalledProcessError"),
    "no-program": ("\x7fELF", "Exec format error"),
}


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize("kind", FAILING)
def test_a_compiler_that_fails_is_named_with_what_it_said(kind, monkeypatch, tmp_path):
    broken, (text, said) = tmp_path / "broken", FAILING[kind]
    broken.write_text(text)
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(UserWarning, match=f"broken failed: .*{said}.*Install g"):
        assert not cpp_library.serves(CPU)


def test_a_quotation_mark_too_few_is_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "'g++")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.warns(UserWarning, match="got none"):
        assert not cpp_library.serves(CPU)


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    if not cpp_library.serves(CPU):
        pytest.skip("needs a C++ compiler")
    cpp_library._loaded.cache_clear()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("S2O_CACHE", str(tmp_path / "file" / "cache"))
    said = r"expected a folder to keep the compiled library in, got .*file.*\. Let S2O_CACHE name a folder"
    with pytest.warns(UserWarning, match=said):
        assert not cpp_library.serves(CPU)
    with pytest.raises(ImplementationUnavailableError, match=f"{said}.*or use"):
        attend("cpp")


def test_a_library_that_a_disk_has_spoilt_is_made_anew(monkeypatch, tmp_path):
    if not cpp_library.serves(CPU):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("S2O_CACHE", str(tmp_path / "a folder"))
    compiler = cpp_library._compiler()
    assert compiler is not None
    path = cpp_library._path(compiler, cpp_library.SOURCES)
    path.parent.mkdir()
    path.write_bytes(b"\x7fELF".ljust(100, b"\0"))
    cpp_library._loaded.cache_clear()
    assert cpp_library.serves(CPU)
    assert path.stat().st_size > 10_000


def test_a_compiler_may_have_arguments(monkeypatch):
    name = next((name for name in cpp_library.COMPILERS if shutil.which(name)), None)
    if name is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("CXX", f"{name} -O1")
    assert cpp_library._compiler() == (shutil.which(name), "-O1")


def test_it_is_compiled_once_for_all_processes(monkeypatch, tmp_path):
    if not cpp_library.serves(CPU):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("S2O_CACHE", str(tmp_path))
    code = "from s2o_compile.kernels.support import cpp_library; assert not cpp_library.why_not()"
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    (path,) = tmp_path.iterdir()
    made = path.stat().st_mtime_ns
    cpp_library._loaded.cache_clear()
    assert cpp_library.serves(CPU)
    assert [p.stat().st_mtime_ns for p in tmp_path.iterdir()] == [made]


def test_a_lack_of_memory_is_an_error_of_python():
    argument = cpp_library.structure("place", "size", "number")()
    with pytest.raises(MemoryError, match=r"attention in C\+\+: expected memory to work in, got none"):
        cpp_library.run(lambda _: 1, argument)
    cpp_library.run(lambda _: 0, argument)
