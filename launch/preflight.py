"""What must be true before a rank starts. Every failed check names the host and the remedy, and nothing is started.

The checks of many hosts are one table: a row a host, a column a check. What hosts say of themselves comes from
`launch.agent`; here it is compared.
"""

from __future__ import annotations

import json
import re
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avatars.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from launch.hosts import Fleet

__all__ = [
    "CHECKS",
    "Finding",
    "Report",
    "check_hosts",
    "chosen_hosts",
    "compare",
    "free_port",
    "inspect_hosts",
    "read_hostfile",
]

CHECKS = {
    "reached": "a command can be run on it",
    "code": "same commit and same source files as here",
    "versions": "same Python, torch, CUDA, DeepSpeed, numpy and gsplat as here",
    "driver": "same NVIDIA driver as the first host",
    "devices": "as many visible devices as the hostfile's slots",
    "disk": "room for checkpoints and for compiled extensions",
    "locks": "no lock file of a killed extension build",
    "network": "an interface carries the address that it was reached by",
    "data": "the manifest is the same as here and every shard is there",
    "run": "the run's folder is shared and can be written",
    "tracking": "the tracking store is reached (first host only: its first rank writes)",
    "rendezvous": "a connection to the first host's port can be opened",
}

CACHE_BYTES = 512 * 2**20  # DeepSpeed's and gsplat's compiled extensions together


@dataclass(frozen=True)
class Finding:
    """One check of one host.

    Attributes:
        host: its name in the hostfile.
        check: a key of `CHECKS`.
        problem: empty when all is well; otherwise what is wrong and the remedy.
    """

    host: str
    check: str
    problem: str


@dataclass(frozen=True)
class Report:
    """All findings, and where the ranks will meet.

    Attributes:
        findings: a finding for every host and every check that could be made.
        addresses: of every host, in the network that the launcher reaches them by.
        port: of the rendezvous on the first host.
    """

    findings: tuple[Finding, ...]
    addresses: tuple[str, ...]
    port: int

    @property
    def problems(self) -> list[Finding]:
        """What is wrong."""
        return [finding for finding in self.findings if finding.problem]

    def table(self) -> Table:
        """A row a host, a column a check."""
        from rich import box
        from rich.table import Table

        table = Table("host", *CHECKS, box=box.SIMPLE, pad_edge=False, padding=(0, 1))
        by_host: dict[str, dict[str, str]] = {}
        for finding in self.findings:
            by_host.setdefault(finding.host, {})[finding.check] = finding.problem
        for host, checks in by_host.items():
            # A check that could not be made because the host was not reached has no mark at all.
            table.add_row(
                host,
                *("" if c not in checks else "[red]FAILED[/red]" if checks[c] else "ok" for c in CHECKS),
            )
        return table

    def to_json(self) -> dict[str, Any]:
        """For scripts: every check of every host, with its problem or null."""
        hosts: dict[str, dict[str, str | None]] = {}
        for finding in self.findings:
            hosts.setdefault(finding.host, {})[finding.check] = finding.problem or None
        return {"ok": not self.problems, "hosts": hosts, "port": self.port}

    def require(self) -> None:
        """Stops when anything is wrong.

        Raises:
            UserError: every problem, a line each.
        """
        if self.problems:
            lines = [f"  {finding.host}: {finding.problem}" for finding in self.problems]
            raise UserError("No rank was started, because the preflight found\n" + "\n".join(lines))


def read_hostfile(path: Path) -> dict[str, int]:
    """Hosts and their slots, in the order of the file.

    Raises:
        UserError: the file is missing, or a line is not `host slots=n`, or a host is named twice.
    """
    if not path.is_file():
        raise UserError(f"HOSTFILE={path} is not there. Write one line a host into it: `hostname slots=8`.")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if match is None:
            raise UserError(f"{path}, line {number}: {text!r} is not of the form `hostname slots=8`.")
        if match[1].startswith("-"):
            raise UserError(f"{path}, line {number}: {match[1]!r} is no host name; it starts with a dash.")
        if match[1] in hosts:
            raise UserError(f"{path}, line {number}: host {match[1]} stands there twice.")
        hosts[match[1]] = int(match[2])
    return hosts


def check_hosts(nodes: int, hostfile: Path | None) -> None:
    """Refuses what DeepSpeed would pass over in silence: more nodes asked for than the hostfile has.

    Raises:
        UserError: NODES and HOSTFILE do not agree.
    """
    if nodes < 1:
        raise UserError(f"NODES={nodes} must be at least 1.")
    if hostfile is None:
        if nodes > 1:
            raise UserError(
                f"NODES={nodes} needs HOSTFILE=: a file with one line a host, `hostname slots=8`."
            )
        return
    chosen_hosts(nodes, hostfile)


def chosen_hosts(nodes: int, hostfile: Path) -> dict[str, int]:
    """The first `nodes` hosts of the hostfile with their slots, as DeepSpeed chooses them.

    Raises:
        UserError: it has fewer.
    """
    hosts = read_hostfile(hostfile)
    if len(hosts) < nodes:
        raise UserError(
            f"NODES={nodes} but {hostfile} names {len(hosts)} host{'s' if len(hosts) != 1 else ''}; "
            "add hosts or lower NODES."
        )
    return dict(list(hosts.items())[:nodes])


def free_port(asked: int | None) -> int:
    """The port for the ranks' rendezvous on this host.

    Args:
        asked: the user's PORT, or None for any free one.

    Raises:
        UserError: the port asked for is in use.
    """
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", asked or 0))
        except OSError as error:
            raise UserError(
                f"PORT={asked} cannot be used ({error.strerror}); choose another or leave PORT out."
            ) from error
        return probe.getsockname()[1]


def inspect_hosts(fleet: Fleet, data: Path, run: Path, tracking: str, port: int | None, need: int) -> Report:
    """Asks all hosts at once and compares what they say.

    Args:
        fleet: the connections.
        data: folder of packed shards.
        run: folder of the run, on a disk that all hosts share.
        tracking: MLflow's tracking URI.
        port: the user's PORT, or None for any that is free on the first host.
        need: bytes that the checkpoints will take.
    """
    from launch.agent import code, data_seen, package_versions

    names = list(fleet.hosts)
    run.mkdir(parents=True, exist_ok=True)
    token = run / f".seen-by-all-{secrets.token_hex(4)}"
    token.touch()
    try:
        asked = {
            index: {
                "name": name,
                "data": str(data.resolve()),
                "token": str(token.resolve()),
                "tracking": tracking,
                "want_tracking": index == 0,
            }
            for index, name in enumerate(names)
        }
        # Looked at in the same moment as by the hosts, as somebody may be editing.
        here = {**code(), "versions": package_versions(), "data": data_seen(data)}
        told = fleet.ask("probe", asked)
    finally:
        token.unlink()
    findings = list(compare(fleet.hosts, {names[i]: v for i, v in told.items()}, here, need))
    for agent in fleet.agents:
        if agent.lost is not None:
            findings.insert(0, Finding(agent.name, "reached", unreached(agent.name, agent.lost)))
    addresses = [told[i].get("address") or "" if i in told else "" for i in range(len(names))]
    meeting = 0
    if addresses[0]:
        meeting, met = rendezvous(fleet, addresses, port)
        findings += met
    order = {name: number for number, name in enumerate(names)}
    findings.sort(key=lambda finding: (order[finding.host], list(CHECKS).index(finding.check)))
    return Report(tuple(findings), tuple(addresses), meeting)


def unreached(host: str, said: str) -> str:
    """Why a command could not be run on a host, and what to do."""
    if "No module named" in said or "not found" in said or "No such file" in said or "cd:" in said:
        return (
            f"headsplat cannot be started there ({said}). Install it in the same folder as here: make setup."
        )
    if "Permission denied" in said:
        return (
            f"ssh refuses the key ({said}). Put this user's public key into ~/.ssh/authorized_keys on {host}."
        )
    return f"it is not reached ({said}). Start it, take it out of the hostfile, or try `ssh {host} true`."


def compare(
    hosts: dict[str, int], told: dict[str, dict[str, Any]], here: dict[str, Any], need: int
) -> Iterator[Finding]:
    """Findings of all checks but the rendezvous, from what the hosts told.

    Args:
        hosts: names and slots.
        told: what `launch.agent.probe` returned on each host that answered.
        here: code, versions and data as this machine sees them.
        need: bytes that the checkpoints will take.
    """
    first = next((told[name] for name in hosts if name in told and "error" not in told[name]), None)
    for number, (name, slots) in enumerate(hosts.items()):
        if name not in told:
            continue
        probe = told[name]
        if "error" in probe:
            yield Finding(name, "reached", f"the preflight fails there: {probe['error']}.")
            continue
        assert first is not None
        checks = {
            "reached": "",
            "code": code_problem(probe, here),
            "versions": version_problem(probe["versions"], here["versions"]),
            "driver": ""
            if probe["driver"] == first["driver"]
            else f"NVIDIA driver {probe['driver']}, but {first['driver']} on {next(iter(told))}; install the same one.",
            "devices": device_problem(probe, first, slots),
            "disk": disk_problem(probe, need),
            "locks": ""
            if not probe["locks"]
            else f"{probe['locks'][0]} is left from a killed build, and builds would wait for it for ever; delete it.",
            "network": "" if probe["interface"] else address_problem(name, len(hosts)),
            "data": data_problem(probe["data"], here["data"]),
            "run": run_problem(probe),
        }
        if probe["interface"] == "lo" and len(hosts) > 1:
            checks["network"] = address_problem(name, len(hosts))
        if number == 0:
            checks["tracking"] = (
                "" if not probe["tracking"] else f"the tracking store cannot be used: {probe['tracking']}."
            )
        for check, problem in checks.items():
            yield Finding(name, check, problem)


def code_problem(probe: dict[str, Any], here: dict[str, Any]) -> str:
    """Whether a host runs the code that this machine runs."""
    if probe["commit"] != here["commit"]:
        return f"its headsplat is at commit {probe['commit']}, here it is {here['commit']}; check out the same there."
    if probe["sources"] != here["sources"]:
        return "its headsplat has other source files than here, at the same commit; copy the changes there."
    return ""


def version_problem(theirs: dict[str, str], ours: dict[str, str]) -> str:
    """Which packages differ."""
    different = [
        f"{name} {theirs.get(name)} (here {ours[name]})" for name in ours if theirs.get(name) != ours[name]
    ]
    if not different:
        return ""
    return f"other versions: {', '.join(different)}; run `make setup` there with the same constraints.txt."


def device_problem(probe: dict[str, Any], first: dict[str, Any], slots: int) -> str:
    """Whether a host has the devices that the hostfile promises."""
    if bool(probe["devices"]) != bool(first["devices"]):
        return (
            f"it has {probe['devices']} CUDA devices and the first host {first['devices']}; do not mix them."
        )
    if probe["devices"] and probe["devices"] != slots:
        return (
            f"{probe['devices']} CUDA devices are visible and the hostfile says slots={slots}; correct the hostfile "
            "or CUDA_VISIBLE_DEVICES there."
        )
    if not probe["devices"] and slots > probe["cores"]:
        return (
            f"slots={slots}, but it has no CUDA device and {probe['cores']} processor cores; lower its slots."
        )
    return ""


def disk_problem(probe: dict[str, Any], need: int) -> str:
    """Whether checkpoints and compiled extensions have room."""
    if probe["run_free"] < need:
        return (
            f"{probe['run_free'] / 2**30:.1f} GiB are free for the run and checkpoints take {need / 2**30:.1f} GiB; "
            "free space or choose another OUT=."
        )
    if probe["cache_free"] < CACHE_BYTES:
        return (
            f"{probe['cache_free'] / 2**20:.0f} MiB are free for {probe['cache']}; free space or set "
            "TORCH_EXTENSIONS_DIR there."
        )
    return ""


def address_problem(name: str, hosts: int) -> str:
    """A host whose own address cannot be told, or is of use on that host alone."""
    if hosts > 1 and (name == "localhost" or name.startswith("127.")):
        return f"{name} means another machine on every host; write its name or address into the hostfile."
    return f"no network interface there carries an address of {name}; write the address into the hostfile."


def data_problem(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Whether a host sees the shards that this machine sees."""
    if not theirs["manifest"]:
        return f"the data are not there ({theirs['problem']}); mount them in the same folder as here."
    if theirs["manifest"] != ours["manifest"]:
        return "the manifest is another one than here; copy the same shards there."
    if theirs["problem"]:
        return f"the data are not whole: {theirs['problem']}; copy the shards again."
    return ""


def run_problem(probe: dict[str, Any]) -> str:
    """Whether all hosts share the folder that checkpoints are written to."""
    if not probe["run_shared"]:
        return "it does not see the run's folder; choose an OUT= on a disk that all hosts share."
    if not probe["run_writable"]:
        return "it cannot write the run's folder; give this user the right to."
    return ""


def rendezvous(fleet: Fleet, addresses: list[str], port: int | None) -> tuple[int, list[Finding]]:
    """Opens the ranks' meeting point on the first host and has every other host connect to it."""
    names = list(fleet.hosts)
    answer = fleet.ask("listen", {0: {"address": addresses[0], "port": port or 0}}, 30.0).get(0)
    if not isinstance(answer, int):
        said = answer or fleet.agents[0].lost
        problem = f"{said}; choose another PORT= or leave it out."
        return 0, [Finding(names[0], "rendezvous", problem)]
    others = {i: {"address": addresses[0], "port": answer} for i in range(1, len(names)) if addresses[i]}
    findings = [Finding(names[0], "rendezvous", "")]
    for index, problem in fleet.ask("connect", others, 30.0).items():
        if problem:
            problem = (
                f"it cannot connect to {addresses[0]} port {answer} on {names[0]} ({problem}); open the ports "
                "between the hosts, or name one that is open with PORT=."
            )
        findings.append(Finding(names[index], "rendezvous", problem))
    return answer, findings


def as_json(report: Report) -> str:
    """The report as text for `--json`."""
    return json.dumps(report.to_json(), indent=1)
