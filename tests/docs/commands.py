# SPDX-License-Identifier: Apache-2.0
"""Commands of the text: as a shell reads them, by their programs' own parsers, and to their end."""

from __future__ import annotations

import argparse
import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from prereg_kernels._util.settings_file import override as override_values
from prereg_kernels.cli.commands import main
from prereg_kernels.cli.demo import load_preset, load_sweep
from prereg_kernels.cli.launch import COMMANDS
from prereg_kernels.cli.settings import override
from prereg_kernels.demo.config import RunConfig
from tests.docs.pages import ROOT

PROGRAMS = ("prereg", "make", "pip", "python", "python3", "torchrun", "accelerate")
BEGINNING = re.compile(rf"(?:\w+=\S+ )*(?:{'|'.join(PROGRAMS)})(?: |$)")
# Each program prints what it is given. Nothing else runs, as there is no path to look on.
STUBS = [f"{name}() {{ printf '%s\\0' {name} \"$@\"; echo; }}" for name in PROGRAMS]
STUBS += [
    'timeout() { shift; "$@"; }',
    "git() { :; }",
    "swift() { :; }",
    "llamafactory-cli() { :; }",
]

Command = tuple[str, ...]
REPLACED = {"prereg_kernels": ("prereg",)}
"""{module: the command that it is}"""
OTHERS = {"nemo_automodel.cli.app": "nemo"}
"""{module of a package that is not in the environment: its trainer's name}"""


@contextmanager
def chdir(directory: Path) -> Iterator[None]:
    """Within: there."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def read_shell(text: str) -> list[Command]:
    """The commands of a piece of shell: loops are followed, variables and `[--options]` given.

    `python -m prereg_kernels` is `prereg`.
    """
    script = "\n".join([*STUBS, "set -eu", re.sub(r"\[(--[^\]]*)\]", r"\1", text)])
    environment = {"PATH": "", "OUT": "out"}
    done = subprocess.run(["/bin/bash", "-c", script], env=environment, capture_output=True)
    assert done.returncode == 0, f"{text}\n{done.stderr.decode()}"
    found = [tuple(line.split("\0")[:-1]) for line in done.stdout.decode().splitlines()]
    return [("prereg", *x[3:]) if x[1:3] == ("-m", "prereg_kernels") else x for x in found]


def check(command: Command) -> None:
    """Have a command's arguments read by its program's own parser, and no more.

    A name alone, such as `prereg train`, has to be known.
    """
    program, *arguments = (part for part in command if part != "...")
    if program == "make":
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "prereg" and arguments[0] in COMMANDS:  # whose parser is somebody else's
        assert (ROOT / "tests" / "packages" / f"test_{arguments[0]}.py").is_file()
    elif program in ("torchrun", "accelerate"):
        parser = get_args_parser() if program == "torchrun" else launch_command_parser()
        given = parser.parse_args(arguments[program == "accelerate" :])
        if given.module and given.training_script in OTHERS:
            trainer = OTHERS[given.training_script]
            assert (ROOT / "tests" / "packages" / f"test_{trainer}.py").is_file()
        elif given.module:
            with chdir(ROOT):
                _parse((*REPLACED[given.training_script], *given.training_script_args))
        else:
            assert (ROOT / "examples" / given.training_script).is_file(), given.training_script
    elif program == "pip":
        # pip imports distutils, which setuptools has to have replaced by then
        import_module("setuptools")
        from pip._internal.commands import create_command

        create_command(arguments[0]).parse_args(arguments[1:])
    elif not is_name(command):
        with chdir(ROOT):
            _parse((program, *arguments))


def is_name(command: Command) -> bool:
    """Whether it is no more than the name of a command, such as `prereg train`."""
    program, *arguments = (part for part in command if part != "...")
    if program != "prereg" or len(arguments) > 1:
        return False
    try:
        with redirect_stderr(io.StringIO()):
            _parse((program, *arguments))
    except SystemExit:
        return help_of(command) != ""
    return False


def help_of(command: Command) -> str:
    """What `--help` prints of a command of ours, its subcommand included, or of torchrun; or ""."""
    program, *arguments = (part for part in command if part != "...")
    if program == "torchrun":
        return get_args_parser().format_help()
    if program not in ("prereg", "python", "python3"):
        return ""
    names = 2 if arguments[:1] == ["-m"] else 1
    output = io.StringIO()
    with redirect_stdout(output), suppress(SystemExit):
        _run_here((program, *arguments[:names], "--help"))
    return output.getvalue()


def run(command: Command, directory: Path) -> str:
    """Run a command in a directory to its end, and return what it prints.

    Python runs in this process, as importing everything takes seconds. Of ranks there are two, on
    the CPU, at a free port.
    """
    assert command[0] != "pip", "a test that installs changes what the others run on"
    if command[0] in ("prereg", "python", "python3"):
        output = io.StringIO()
        with redirect_stdout(output), chdir(directory):
            try:
                _run_here(command)
            except SystemExit as stop:
                assert not stop.code, output.getvalue()
        return output.getvalue()
    environment = {
        "MAKEFLAGS": "",
        "MAKELEVEL": "0",  # as by hand, where make runs these tests
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(directory),
        "HF_HOME": str(directory),  # no settings of Accelerate's but its own
        "OMP_NUM_THREADS": "1",
        "PET_STANDALONE": "1",
        "ACCELERATE_TORCH_DEVICE": "cpu",  # a rank's own would be cpu:0, unknown to torch.load
    }
    done = subprocess.run(
        command, cwd=directory, env=os.environ | environment, capture_output=True, text=True,
        timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _run_here(command: Command) -> None:
    """As the program would run: `prereg ...`, `python -m MODULE ...`, `python FILE ...`."""
    program, *arguments = command
    with mock.patch.object(sys, "argv", [program, *arguments]):
        if program == "prereg":
            main()
        elif arguments[0] == "-m":
            sys.argv = [arguments[1], *arguments[2:]]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, script = arguments, Path(arguments[0]).resolve()
            paths = mock.patch.object(sys, "path", [str(script.parent), *sys.path])
            with paths, mock.patch.dict(sys.modules):  # with the modules beside it, for once
                runpy.run_path(str(script), run_name="__main__")


class _ParsedError(BaseException):
    """The arguments have been read."""


def _parse(command: Command) -> None:
    parser = argparse.ArgumentParser
    parse, parse_known = parser.parse_args, parser.parse_known_args

    def parse_args(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        parse(self, *args, **kwargs)
        raise _ParsedError

    def parse_known_args(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        arguments, flags = parse_known(self, *args, **kwargs)
        if self.prog != "prereg":  # but one of its commands
            return arguments, flags
        if flags and arguments.command == "train":
            override_values({}, flags)
        elif flags:
            override(_settings_of(arguments), flags)
        raise _ParsedError

    with (
        mock.patch.object(parser, "parse_args", parse_args),
        mock.patch.object(parser, "parse_known_args", parse_known_args),
    ):
        try:
            _run_here(command)
        except _ParsedError:
            return
    raise AssertionError(f"{command}: nothing was parsed")


def _settings_of(arguments: argparse.Namespace) -> Any:
    """What the flags of a command are of; of a file that the text makes up, the defaults."""
    if arguments.command == "sweep":
        return load_sweep(arguments.preset)
    return RunConfig() if arguments.config else load_preset(arguments.preset)
