"""The C binding as it is built and used: with each compiler, from C and C++, by pkg-config, and its
own tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from . import c_fixtures
from .c_driver import C, make

pytestmark = c_fixtures.needs_gcc

STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
STARTS = "int main(void) { return pie_init() == PIE_CLOSED ? 0 : 1; }\n"


def each(*compilers: str) -> list[object]:
    """Parameters that are skipped where the compiler is missing."""
    return [
        pytest.param(cc, marks=pytest.mark.skipif(not shutil.which(cc), reason=f"no {cc}"))
        for cc in compilers
    ]


C_COMPILERS = pytest.mark.parametrize("cc", each("gcc", "clang"))
CXX_COMPILERS = pytest.mark.parametrize("cxx", each("g++", "clang++"))


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    make(C, "all")


def compiled(*command: object, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@C_COMPILERS
@pytest.mark.parametrize("optimized", ["-O0", "-O2"])
def test_the_binding_compiles_without_a_warning(cc: str, optimized: str, tmp_path: Path) -> None:
    compiled(cc, "-std=c11", *STRICT, optimized, "-c", "-o", tmp_path / "o", C / "inferlet.c")


@C_COMPILERS
@pytest.mark.parametrize("standard", ["c11", "gnu17"])
def test_the_header_stands_alone_and_may_come_twice(cc: str, standard: str, tmp_path: Path) -> None:
    source = tmp_path / "main.c"
    source.write_text('#include "inferlet.h"\n#include "inferlet.h"\n' + STARTS)
    more = ["-Wconversion", "-Wshadow", "-Wstrict-prototypes", "-Wmissing-prototypes"]
    program = tmp_path / "main"
    library = C / "build" / "libinferlet.a"
    compiled(cc, f"-std={standard}", *STRICT, *more, f"-I{C}", "-o", program, source, library)
    assert subprocess.run([program], timeout=20).returncode == 0


@CXX_COMPILERS
@pytest.mark.parametrize("standard", ["c++11", "c++20"])
def test_the_header_is_usable_from_cpp(cxx: str, standard: str, tmp_path: Path) -> None:
    program = tmp_path / "check"
    sources = [C / "tests" / "cpp_check.cc", C / "build" / "libinferlet.a"]
    compiled(cxx, f"-std={standard}", *STRICT, "-Wshadow", f"-I{C}", "-o", program, *sources)
    assert subprocess.run([program], timeout=20).returncode == 0


@pytest.mark.skipif(not shutil.which("pkg-config"), reason="no pkg-config")
@pytest.mark.parametrize("cc", each("gcc", "clang", "g++", "clang++"))
@pytest.mark.parametrize("how", ["-static", "-pie"])
def test_pkg_config_finds_the_library_wherever_it_is_copied(
    cc: str, how: str, tmp_path: Path
) -> None:
    """As the README says, with what `make` made and nothing else of the repository."""
    copy = tmp_path / "elsewhere" / "inferlet"
    copy.mkdir(parents=True)
    for name in ("inferlet.h", "libinferlet.a", "inferlet.pc"):
        shutil.copy(C / "build" / name, copy)
    (tmp_path / ("main.cc" if cc.endswith("++") else "main.c")).write_text(
        "#include <inferlet.h>\n" + STARTS
    )
    line = f"{cc} {how} main.* $(pkg-config --cflags --libs inferlet) -o main"
    compiled(
        "sh",
        "-ec",
        f"cd '{tmp_path}'\npkg-config --validate inferlet\n{line}",
        environment={"PKG_CONFIG_PATH": str(copy)},
    )
    assert subprocess.run([tmp_path / "main"], timeout=20).returncode == 0


def test_make_test_passes() -> None:
    """With each compiler that is here."""
    out = make(C, "test")
    for cc in filter(shutil.which, ("gcc", "clang")):
        assert f"build/test_connection.{cc}\n" in out
    for cxx in filter(shutil.which, ("g++", "clang++")):
        assert f"build/cpp_check.{cxx}\n" in out
    assert "all passed" in out
