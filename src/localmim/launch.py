"""Starts a script on one device, or on many through MindSpore's msrun: the body of every launcher in scripts/.

    python -m localmim.launch [--device D] [--devices N] [--dry-run] SCRIPT [ARGUMENTS]

Without --device (CPU, GPU or Ascend) the script chooses. Without --devices it runs alone, on one device. With it, N
devices of this machine share the work; several machines do when NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT are set
and this is started on each. What is wrong with the arguments, or missing on the machine, is said before anything
starts, so MindSpore is not imported here.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

from localmim import cli, worker
from localmim.config import load_config
from localmim.doctor import require
from localmim.errors import UserError
from localmim.worker import LOCAL_DEVICES

DEVICES = ("CPU", "GPU", "Ascend")
CLUSTER_TIME_OUT_S = 600  # how long the processes wait for each other at the start, on all machines


class Machines(NamedTuple):
    """The machines of a job: how many, which of them this one is, and where they meet."""

    count: int
    rank: int
    address: str
    port: int


class Plan(NamedTuple):
    """What will be started.

    Attributes:
        command: The process to start.
        variables: What its environment has besides this one's.
        folder: For the logs of a job of many processes; None: the script runs alone.
        ranks: The ranks of this machine.
    """

    command: list[str]
    variables: dict[str, str]
    folder: Path | None = None
    ranks: range = range(1)

    def text(self) -> str:
        """The same as shell commands."""
        exports = [f"export {key}={shlex.quote(value)}" for key, value in self.variables.items()]
        return "\n".join([*exports, shlex.join(self.command)])


def main(argv: list[str]) -> int:
    """Plans, then starts, and returns the exit code.

    Raises:
        UserError: Wrong arguments, or a device that cannot be used.
    """
    parser = _Parser(prog="python -m localmim.launch", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, help="without it, the script chooses")
    parser.add_argument("--devices", metavar="N", help="devices of this machine; without it, the script runs alone")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS")
    options = parser.parse_args(argv)
    devices = None if options.devices is None else number("DEVICE_NUM", options.devices, 1)
    machines = Machines(1, 0, "", 0) if devices is None else find_machines(os.environ)
    arguments, output = check_arguments(options.script, options.arguments, options.device)
    variables = device_variables(options.device, devices or 1, options.dry_run)
    plan = make_plan([options.script, *arguments], output, devices or 1, machines, variables)
    if options.dry_run:
        print(plan.text())
        return 0
    environment = {**os.environ, **plan.variables}
    if plan.folder is None:
        sys.stdout.flush()
        os.execve(plan.command[0], plan.command, environment)
    return start(plan, machines, environment)


def start(plan: Plan, machines: Machines, environment: dict[str, str]) -> int:
    """Runs a job of many processes to its end."""
    from localmim.job import Job

    folder = plan.folder
    try:
        folder.mkdir(parents=True)
        (folder / "command.txt").write_text(plan.text() + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write logs to {folder}: {error.strerror}") from error
    first = machines.rank == 0
    where = f"machine {machines.rank} of {machines.count}, " if machines.count > 1 else ""
    print(f"{where}{len(plan.ranks)} devices; logs in {folder}", flush=True)
    return Job(plan.command, environment, folder, plan.ranks, scheduler=first, follow=0 if first else None).run()


def check_arguments(script: str, arguments: list[str], device: str | None) -> tuple[list[str], Path]:
    """The script's arguments with the device among them, and the folder under which its logs go.

    Raises:
        UserError: No such script; for train.py, anything that `load_config` finds wrong.
    """
    if not Path(script).is_file():
        raise UserError(f"{script} is no file: expected a Python script")
    if device is not None:
        if any(word.partition("=")[0] == "--device" for word in arguments):
            raise UserError(f"--device: this launcher is for {device}, start the one of the other device")
        arguments = [*arguments, "--device", device]
    if Path(script).name == "train.py":
        return arguments, Path(load_config(arguments).output_dir)
    return arguments, Path("outputs")


def find_machines(variables: dict[str, str]) -> Machines:
    """What NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT say; on one machine none of them is needed.

    Raises:
        UserError: One is missing or out of range, or the port is in use.
    """
    count = number("NNODES", variables.get("NNODES") or "1", 1)
    if count > 1:
        for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not variables.get(name):
                raise UserError(f"{name} is not set: NNODES is {count}, so every machine needs it")
    rank = number("NODE_RANK", variables.get("NODE_RANK") or "0", 0, count - 1)
    address = variables.get("MASTER_ADDR") or "127.0.0.1"
    given = variables.get("MASTER_PORT")
    port = number("MASTER_PORT", given, 1024, 65535) if given else free_port()
    if rank == 0 and given and not is_free(port):
        raise UserError(f"MASTER_PORT is {port}, which another process of this machine uses: expected a free port")
    return Machines(count, rank, address, port)


def device_variables(device: str | None, count: int, dry_run: bool) -> dict[str, str]:
    """What the environment needs for the device.

    Raises:
        UserError: The device cannot be used here; a dry run only says so on stderr.
    """
    if device is None:
        return {}
    try:
        return require(device, count)
    except UserError as error:
        if not dry_run:
            raise
        print(f"it would not start here: {error}", file=sys.stderr)
        return {}


def make_plan(task: list[str], output: Path, devices: int, machines: Machines, variables: dict[str, str]) -> Plan:
    """The command for `task`, a script and its arguments, on `devices` devices of each machine."""
    world = devices * machines.count
    if world == 1:
        return Plan([sys.executable, *task], variables)
    folder = new_folder(output / "logs", f"-node{machines.rank}" if machines.count > 1 else "")
    command = [sys.executable, "-m", "mindspore.parallel.cluster.run"]
    command += [f"--worker_num={world}", f"--local_worker_num={devices}", f"--node_rank={machines.rank}"]
    command += [f"--master_addr={machines.address}", f"--master_port={machines.port}"]
    command += [f"--cluster_time_out={CLUSTER_TIME_OUT_S}", "--join=True", f"--log_dir={folder}"]
    command += [f"--tail_worker_log={world}"]  # no rank has this number: the launcher itself follows a log
    command += [str(Path(worker.__file__).resolve()), str(folder), *task]
    path = variables.get("PATH", os.environ.get("PATH", os.defpath))
    variables = variables | {
        LOCAL_DEVICES: str(devices),
        "PATH": f"{python_folder()}{os.pathsep}{path}",
        "PYTHONUNBUFFERED": "1",
    }
    return Plan(command, variables, folder, range(machines.rank * devices, (machines.rank + 1) * devices))


def python_folder() -> Path:
    """The folder of this Python. msrun starts its processes as `python`, found on the PATH.

    Raises:
        UserError: There is no `python` in it, or that is another one.
    """
    folder = Path(sys.executable).parent
    python = folder / "python"
    if not python.exists() or not python.samefile(sys.executable):
        raise UserError(f"{python} is not {sys.executable}: msrun starts `python`, so use a virtual environment's")
    return folder


def new_folder(above: Path, suffix: str) -> Path:
    """A name below `above` that is not taken: the time, and a number where one second sees several runs."""
    name = time.strftime("%Y%m%d-%H%M%S") + suffix
    names = [name] + [f"{name}-{i}" for i in range(2, 1000)]
    return next(folder for n in names if not (folder := above.resolve() / n).exists())


def number(name: str, text: str, least: int, most: int | None = None) -> int:
    """A whole number from text.

    Raises:
        UserError: It is none, or outside the range.
    """
    value = int(text) if text.isascii() and text.isdigit() else least - 1
    if value < least or (most is not None and value > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{name} is {text!r}, expected a whole number {wanted}")
    return value


def free_port() -> int:
    """A port that no process of this machine uses."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def is_free(port: int) -> bool:
    """Whether no process of this machine listens on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


if __name__ == "__main__":
    sys.exit(cli.run(lambda argv: sys.exit(main(argv))))
