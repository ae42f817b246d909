"""The attackers, built once for every profile from the same sources."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from ..host_harness import write_program

ATTACKERS = Path(__file__).parents[1] / "attackers"
LIBRARIES = ("octets", "exhaust", "ring")
# loads one of them: how that ends, it says itself
LOADERS = {
    "python": (
        "main.py",
        """
        import ctypes, sys
        from pathlib import Path

        name, *words = sys.argv[2:]
        library = ctypes.CDLL(str(Path(__file__).with_name(f"{name}.so")))
        arguments = [word.encode() for word in words]
        sys.exit(library.attack(len(words), (ctypes.c_char_p * len(words))(*arguments)))
        """,
    ),
    "node": (
        "main.js",
        """
        process.dlopen({ exports: {} }, `${__dirname}/${process.argv[3]}.so`);
        """,
    ),
    "perl": (
        "main.pl",
        """
        use DynaLoader; use FindBin;
        DynaLoader::dl_load_file("$FindBin::Bin/$ARGV[1].so") or die DynaLoader::dl_error();
        """,
    ),
}
SIBLING = """
    from inferlet import Model, inferlet, receive, send

    @inferlet
    def sibling(model: Model) -> None:
        with model.context("The capital of France is") as held:
            first = "".join(held.generate(4))
            send(first)
            while True:
                prompt = receive().result().decode()
                with model.context(prompt) as context:
                    send(first + "".join(context.generate(8)))
"""


class Programs(NamedTuple):
    """Where what lies. `calls` and `loaders` are by profile."""

    folder: Path
    run_dir: Path  # the server's
    sibling: Path
    calls: dict[str, Path]
    loaders: dict[str, Path]

    def of(self, profile: str) -> list[str]:
        """The attackers there are."""
        return ["call", *LIBRARIES, *["foreign"] * (profile not in self.loaders)]

    def launch(
        self, profile: str, program: str, words: tuple[object, ...]
    ) -> tuple[Path, list[str]]:
        """The program and its arguments."""
        places = {"{place}": str(self.folder / profile), "{run}": str(self.run_dir)}
        said = [str(word) for word in words]
        for name, path in places.items():
            said = [word.replace(name, path) for word in said]
        if said[:1] == ["open"]:
            assert Path(said[1]).exists(), f"there is nothing to open at {said[1]}"
        if program == "call":
            return self.calls[profile], said
        if program == "foreign":
            return self.folder / profile / program, said
        if profile in self.loaders:
            return self.loaders[profile], ["attack", program, *said]
        return self.folder / profile / program, ["attack", program, *said]


def build(folder: Path, run_dir: Path, profiles: list[str]) -> Programs:
    folder.chmod(0o755)
    calls: dict[str, Path] = {}
    for profile, options in (("native", ["-static"]), ("dynamic", [])):
        place = folder / profile
        place.mkdir()
        for name in ("call", "foreign", *LIBRARIES):
            _gcc(place / name, f"{name}.c", *options)
        calls[profile] = place / "call"
    libraries = folder / "libraries"
    libraries.mkdir()
    for name in LIBRARIES:
        _gcc(libraries / f"{name}.so", f"{name}.c", "-DLIBRARY", "-shared", "-fPIC")
    loaders = {}
    for profile, (entry, source) in LOADERS.items():
        if profile not in profiles:
            continue
        place = loaders[profile] = folder / profile
        shutil.copytree(libraries, place)
        write_program(place, entry, source)
        (place / "inferlet.toml").write_text(f'entry = "{entry}"\n')
    (folder / "secret").write_text("secret")
    for profile in ("native", "dynamic", *loaders):
        (folder / profile / "own").write_text("own")
        (folder / profile / "symlink").symlink_to(folder / "secret")
        (folder / profile / "folder").symlink_to(folder)
    (folder / "hardlink").hardlink_to(folder / "secret")
    if "python" in profiles:
        calls["python"] = Path(shutil.copy(ATTACKERS / "call.py", folder))
    if "perl" in profiles:
        calls["perl"] = Path(shutil.copy(ATTACKERS / "call.pl", folder))
    if "node" in profiles:
        place = calls["node"] = folder / "node-call"
        place.mkdir()
        _gcc(place / "addon.node", "addon.c", "-D_GNU_SOURCE", "-shared", "-fPIC")
        shutil.copy(ATTACKERS / "addon.js", place)
        (place / "inferlet.toml").write_text('entry = "addon.js"\n')
    return Programs(folder, run_dir, write_program(folder, "sibling.py", SIBLING), calls, loaders)


def _gcc(path: Path, source: str, *options: str) -> None:
    command = ["gcc", "-O1", *options, "-pthread", "-o", str(path), str(ATTACKERS / source)]
    subprocess.run(command, check=True, timeout=90)
