"""Watch what a command and all its processes ask of the network, and which files they leave in a fresh home folder."""
from __future__ import annotations

import ipaddress
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from cvnb.core.telemetry import TELEMETRY_SWITCHES

# The kernel stops a process at these calls alone, so that the others cost nothing.
STRACE = ("strace", "-f", "--seccomp-bpf", "-qq", "-s", "64", "-e", "signal=none", "-e",
          "trace=connect,sendto,sendmsg,sendmmsg")
CALL = re.compile(r"^(?P<pid>\d+) +(?:(?P<call>connect|sendto|sendmsg|sendmmsg)\(|<\.\.\. (?P<rest>\w+) resumed>)")
FAMILY = re.compile(r"sa_family=(\w+)")
INET = re.compile(r'sin6?_port=htons\((\d+)\), .*?(?:inet_addr\("|inet_pton\(AF_INET6, ")([0-9a-fA-F.:]+)"')
# Services on sockets of this machine that resolve names for others.
RESOLVERS = re.compile(r'sun_path="[^"]*(?:/systemd/resolve/|/avahi-daemon/)')
# nscd is asked for users too. Requests for hosts have the types 4 to 7, 13 and 14, behind version 2 of its protocol.
# Where nscd does not run, glibc asks a name server itself.
NSCD_HOSTS = re.compile(r'"\\2\\0\\0\\0(?:\\[4-7]|\\r|\\16)\\0\\0\\0')
# A process that has ended, or was killed before strace could read which call it was about to make.
ENDED = re.compile(r"^\d+ +(?:\+\+\+ .* \+\+\+|\?+\( <(?:detached|unfinished) \.\.\.>)$")
LOCAL_FAMILIES = {"AF_UNSPEC", "AF_UNIX", "AF_NETLINK"}   # AF_UNSPEC ends a connection


def _fault(line: str) -> str:   # "" for a call that stays on this machine
    "Say what is wrong with a line of a trace."
    if ENDED.match(line): return ""
    call = CALL.match(line)
    if not call: return "not understood"
    if RESOLVERS.search(line) or NSCD_HOSTS.search(line): return "resolves a name"
    families = set(FAMILY.findall(line))
    if call["call"] == "connect" and not families: return "not understood"
    places = INET.findall(line)
    if families & {"AF_INET", "AF_INET6"} and not places: return "not understood"
    if any(port == "53" for port, _ in places): return "resolves a name"
    if not all(_is_loopback(address) for _, address in places): return "leaves the machine"
    return "" if families <= LOCAL_FAMILIES | {"AF_INET", "AF_INET6"} else "not understood"


def _is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def attempts(
    trace: str,     # what strace wrote
) -> list[str]:     # "leaves the machine: 123 connect(…", none if all is well
    "Find each attempt to resolve a name or to reach another machine, and each line that was not understood."
    return [f"{fault}: {line}" for line in trace.splitlines() if (fault := _fault(line))]


def places(
    trace: str,              # what strace wrote
) -> dict[str, int]:         # such as "connect AF_INET 127.0.0.1" -> how often; Unix sockets without their paths
    "Count the calls that name an address, by family and address."
    found: dict[str, int] = {}
    for line in trace.splitlines():
        for family in FAMILY.findall(line)[:1]:
            inet = INET.search(line)
            at = f" {inet[2]}" + " port 53" * (inet[1] == "53") if inet else ""
            call = CALL.match(line)
            key = f"{(call and (call['call'] or call['rest'])) or '?'} {family}{at}"
            found[key] = found.get(key, 0) + 1
    return dict(sorted(found.items()))


def fresh_environment(
    home: Path,             # the home folder; empty
    **variables: str,       # added to the environment
) -> dict[str, str]:
    "Make the environment of a user who has set nothing: no switch, no cache, no server to share, and no CI."
    # OpenVINO reports nothing where CI, TF_BUILD or JENKINS_URL is set.
    gone = {*TELEMETRY_SWITCHES, "CI", "TF_BUILD", "JENKINS_URL", "CVNB_FORK_SERVER", "CVNB_CACHE", "NO_PROXY",
            "DO_NOT_TRACK", "DISABLE_TELEMETRY"}
    tools = ("XDG_", "FIFTYONE_", "WANDB_", "HF_", "RAY_", "JUPYTER_", "IPYTHON", "MPL", "TORCH_HOME", "PYTEST_")
    kept = {k: v for k, v in os.environ.items() if k not in gone and not k.startswith(tools)}
    return kept | dict(HOME=str(home)) | variables


@dataclass
class Watched:
    "A command that has run under watch."
    out: str             # what it printed
    trace: str           # what strace wrote
    home: Path           # the home folder

    def files(self) -> list[str]:   # paths in the home folder
        "List what the command left in its home folder."
        return sorted(p.relative_to(self.home).as_posix() for p in self.home.rglob("*") if not p.is_dir())

    def unexpected_files(self,
        allowed: Iterable[str],   # patterns as of `fnmatch`; "*" takes in slashes
    ) -> list[str]:
        "List the files in the home folder that no pattern allows."
        return [name for name in self.files() if not any(fnmatch(name, pattern) for pattern in allowed)]


def watch(
    folder: Path,           # gets the home folder, which a second call finds as the first has left it, and the trace
    *command: object,       # program and arguments
    cwd: Path | None = None,
    use: Callable[[subprocess.Popen], None] | None = None,   # uses a server, which Ctrl-C ends afterwards
    traced: bool = True,    # by strace; otherwise the command runs the same, and the trace is empty
    **variables: str,       # added to the environment
) -> Watched:
    "Run a command, which has to succeed, with a home folder of its own; watch it and all processes that it starts."
    home, trace = folder/"home", folder/"trace"
    home.mkdir(parents=True, exist_ok=True)
    pipe = subprocess.PIPE
    trace.write_text("")
    tracer = [*STRACE, "-o", str(trace)] if traced else []
    process = subprocess.Popen([*tracer, *map(str, command)], stdout=pipe, stderr=pipe, text=True,
                               cwd=cwd, env=fresh_environment(home, **variables), start_new_session=True)
    try:
        if use:
            use(process)
            os.killpg(process.pid, signal.SIGINT)   # strace itself ignores it
        out, err = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)   # what the command has started ends with it
        raise
    assert process.returncode == 0, err[-3000:]
    return Watched(out, trace.read_text(errors="replace"), home)
