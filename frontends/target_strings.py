"""Targets as people type them: checked before TVM sees them, because LLVM ends the process at an unknown triple."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    from tvm.target import Target

# First part of a triple -> LLVM's name of the back end, where the two differ.
_ARCHITECTURES = {
    "amd64": "x86_64",
    "arm64": "aarch64",
    "armv6l": "arm",
    "armv7": "arm",
    "armv7a": "arm",
    "armv7l": "arm",
    "armv8l": "arm",
    "i486": "i386",
    "i586": "i386",
    "i686": "i386",
}


_CROSS_COMPILERS = {
    "aarch64": "aarch64-linux-gnu-g++",
    "arm": "arm-linux-gnueabihf-g++",
    "x86_64": "x86_64-linux-gnu-g++",
}


def host_target() -> str:
    """The target string of the CPU this runs on, as LLVM names it."""
    from tvm.target import codegen

    return f"llvm -mcpu={codegen.llvm_get_system_cpu()}"


def parse_target(text: str) -> Target:
    """A TVM target from a string, from inline JSON or from the path of a JSON file, as tvmc takes it.

    Raises:
        InputError: if it does not parse, its architecture or CPU is unknown to LLVM, or this TVM cannot generate code
            for it.
    """
    from tvm.target import Target

    spec = _spec(text)
    if not spec.strip():
        raise InputError("the target is empty: give one such as 'llvm -mcpu=cortex-a72 -mtriple=aarch64-linux-gnu'")
    _check(text, *_named(spec))
    try:
        return Target(spec)
    except Exception as error:  # TVM raises several kinds, all with a C++ trace in the message
        raise InputError(f"target {text!r}: {_last_sentence(error)}") from error


def architecture(target: Target) -> str:
    """LLVM's name of the architecture of a CPU target; the host's where the target names none."""
    from tvm.target import codegen

    triple = str(target.attrs.get("mtriple", codegen.llvm_get_system_triple()))
    first = triple.partition("-")[0]
    return _ARCHITECTURES.get(first, first)


def find_compiler(target: Target, cross_compiler: str | None) -> str | None:
    """The C++ compiler that links for `target`: the one asked for, or None for TVM's own choice on this host.

    Raises:
        InputError: if it is missing, or the target is foreign and none was given.
    """
    from tvm.contrib import cc
    from tvm.target import codegen

    if cross_compiler:
        if shutil.which(cross_compiler) is None:
            raise InputError(f"--cross-compiler {cross_compiler}: no such program; install it or give its path")
        return cross_compiler
    wanted, host = architecture(target), codegen.llvm_get_system_triple().partition("-")[0]
    if target.kind.name == "llvm" and wanted != _ARCHITECTURES.get(host, host):
        raise InputError(
            f"target '{target}' is {wanted} and this machine is {host}: "
            f"give --cross-compiler, such as {_CROSS_COMPILERS.get(wanted, 'clang++')}"
        )
    if cc.get_cc() is None:
        raise InputError("no C++ compiler to link the library with: install g++ or clang++")
    return None


def _spec(text: str) -> str:
    # Path.is_file raises for a string longer than a file name may be, and many -mattr make one.
    if not os.path.isfile(text):
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"target file {text}: not readable as text; it must hold one JSON object") from error


def _named(spec: str) -> tuple[str, str, str]:
    """Kind, -mtriple and -mcpu of a target string or JSON object; empty where not given."""
    try:
        fields = json.loads(spec)
    except ValueError:
        kind, *options = spec.split()
        pairs = [option.lstrip("-").partition("=") for option in options]
        fields = {"kind": kind} | {key: value if equals else "1" for key, equals, value in pairs}
    if not isinstance(fields, dict):
        return "", "", ""
    return str(fields.get("kind", "")), str(fields.get("mtriple", "")), str(fields.get("mcpu", ""))


def _check(text: str, kind: str, triple: str, cpu: str) -> None:
    """Refuse what TVM or LLVM would answer with noise on standard error or with the end of the process."""
    import tvm
    from tvm.target import Target, codegen

    kinds = [str(known) for known in Target.list_kinds()]
    if kind in kinds and tvm.get_global_func(f"target.build.{kind}", True) is None:
        built = ", ".join(sorted(known for known in kinds if tvm.get_global_func(f"target.build.{known}", True)))
        raise InputError(f"target {text!r}: this TVM was built without {kind}; it has {built}")
    if kind != "llvm":
        return
    triple = triple or str(codegen.llvm_get_system_triple())
    first = triple.partition("-")[0]
    architectures = [str(known) for known in codegen.llvm_get_targets()]
    if _ARCHITECTURES.get(first, first) not in architectures:
        raise InputError(f"target {text!r}: LLVM here knows no -mtriple={triple}; it has {', '.join(architectures)}")
    cpus = [str(known) for known in codegen.llvm_get_cpu_archlist(Target(f"llvm -mtriple={triple}"))]
    if cpu and cpu not in cpus:
        host = codegen.llvm_get_system_cpu()
        raise InputError(
            f"target {text!r}: LLVM knows no {first} called -mcpu={cpu}; the CPU of this machine is {host}"
        )


def _last_sentence(error: Exception) -> str:
    line = str(error).strip().splitlines()[-1]
    return line.removeprefix("ValueError: ").partition(" Target creation from string failed")[0]
