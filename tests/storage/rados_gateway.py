"""A real S3 server on loopback: Ceph's RADOS Gateway with one monitor and one store in memory.

It needs the Debian packages radosgw, ceph-mon, ceph-osd and ceph-common, but no root rights and
no running service.
"""

import os
import shutil
import socket
import subprocess
import time
import uuid
from pathlib import Path

PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "monmaptool")
KEY, SECRET = "test", "testtest"

MISSING = "radosgw is not installed: apt-get install radosgw ceph-mon ceph-osd ceph-common"

_CONFIGURATION = """
[global]
fsid = {fsid}
mon initial members = a
mon host = {monitors}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {folder}/keyring
run dir = {folder}
log file = {folder}/$name.log
admin socket = {folder}/$name.asok
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
# One store with one copy and few placement groups
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
osd objectstore = memstore
memstore device bytes = {bytes}
# A single monitor does not need to wait for others
paxos propose interval = 0.05
paxos min wait = 0.02
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw enable usage log = false
debug ms = 0/0
debug rgw = 0/0
"""

_CAPABILITIES = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
    "client.rgw.a": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *", "mgr": "allow profile osd"},
}


def installed() -> bool:
    return all(shutil.which(program) for program in PROGRAMS)


class RadosGateway:
    """A server that runs during a ``with`` block. ``url`` accepts ``KEY`` and ``SECRET``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._conf = folder / "ceph.conf"
        port, first, second = _free_ports(3)
        self._monitors = f"[v2:127.0.0.1:{first}/0,v1:127.0.0.1:{second}/0]"
        self._port, self._fsid = port, str(uuid.uuid4())
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self) -> "RadosGateway":
        for name in ("mon", "osd", "rgw"):
            (self._folder / name).mkdir(parents=True)
        self._conf.write_text(
            _CONFIGURATION.format(
                fsid=self._fsid,
                monitors=self._monitors,
                folder=self._folder,
                port=self._port,
                bytes=8 << 30,
            )
        )
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def cpu_seconds(self) -> float:
        """Processor time of all daemons since they were started."""
        ticks = 0
        for daemon in self._daemons:
            # The name of the program, in brackets, may have spaces
            fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(") ")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def collect_garbage(self) -> None:
        """Free the memory of deleted objects at once."""
        self._ceph("radosgw-admin", "gc", "process", "--include-all")

    def _start(self) -> None:
        keyring, monmap = self._folder / "keyring", self._folder / "monmap"
        keyring.touch()
        for name, allowed in _CAPABILITIES.items():
            grants = [part for where, what in allowed.items() for part in ("--cap", where, what)]
            _run("ceph-authtool", str(keyring), "--gen-key", "-n", name, *grants)
        _run("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", self._monitors, monmap)
        self._ceph("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._daemon("ceph-mon", "-i", "a")
        self._ceph("ceph", "--connect-timeout", "30", "osd", "create")
        self._ceph("ceph-osd", "-i", "0", "--mkfs")
        place = ("host=localhost", "root=default")
        self._ceph("ceph", "osd", "crush", "add", "osd.0", "1.0", *place)
        self._daemon("ceph-osd", "-i", "0")
        self._daemon("radosgw", "-n", "client.rgw.a")
        self._wait()
        keys = (f"--access-key={KEY}", f"--secret-key={SECRET}")
        self._ceph("radosgw-admin", "user", "create", "--uid=t", "--display-name=t", *keys)

    def _daemon(self, *command: str) -> None:
        """Start a daemon that is killed when this process ends, however it ends."""
        mortal = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        self._daemons.append(
            subprocess.Popen(
                [*mortal, command[0], "-f", "-c", str(self._conf), *command[1:]],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )

    def _ceph(self, program: str, *arguments: object) -> None:
        _run(program, "-c", self._conf, *arguments)

    def _wait(self, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                return socket.create_connection(("127.0.0.1", self._port), 1).close()
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.decode(errors='replace')[-2000:]}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for own in sockets:
        own.bind(("127.0.0.1", 0))
    ports = [own.getsockname()[1] for own in sockets]
    for own in sockets:
        own.close()
    return ports
