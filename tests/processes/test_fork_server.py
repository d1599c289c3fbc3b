"""A fork behaves like a new process, and a killed server costs only speed."""

import json
import os
import pwd
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from launcher.processes.fork_client import process_began, send

_ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is for Linux alone")

# A server in a separate process, which runs until its standard input is closed.
_SERVE = """
import os, sys
from launcher.processes import fork_server, preload
preload.SHARED, preload.SERVER = {shared!r}, ()
fork_server.start_beside(sys.argv[1], os.getpid())
print("ready", flush=True)
sys.stdin.read()
"""
_ASK = "import sys; from launcher.processes.fork_client import run_in_fork; print(run_in_fork({path!r}, sys.argv[1:]))"


@dataclass
class Server:
    """A running fork server.

    Args:
        parent: Process that it was forked off, and with which it ends.
        socket: Path of its socket.
    """

    parent: "subprocess.Popen[str]"
    socket: Path

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.parent.pid).children()[0]

    def start(self, script: Path, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        """Start a script in a fork and return the client process."""
        return subprocess.Popen(
            [sys.executable, "-c", _ASK.format(path=str(self.socket)), str(script), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=script.parent,
            env=_environment() | environment,
        )  # fmt: skip

    def run(self, script: Path, *arguments: str, **environment: str) -> tuple[int, str]:
        """Run a script in a fork and return exit code and output."""
        client = self.start(script, *arguments, **environment)
        output, errors = client.communicate(timeout=60)
        return client.returncode, output + errors


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(_ROOT)}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    parents = []

    def start(shared: tuple[str, ...] = ("numpy",), **environment: str) -> Server:
        path = tmp_path / f"{len(parents)}.sock"
        parent = subprocess.Popen(
            [sys.executable, "-c", _SERVE.format(shared=shared), str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=_environment() | environment,
        )  # fmt: skip
        parents.append(parent)
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        return Server(parent, path)

    yield start
    for parent in parents:
        parent.kill()
        parent.wait()


@pytest.fixture
def server(serve: Callable[..., Server]) -> Server:
    return serve()


def _write(folder: Path, text: str) -> Path:
    script = folder / "script.py"
    script.write_text(text)
    return script


def _wait(happened: Callable[[], object], limit_s: float = 20) -> None:
    until = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.02)


_DESCRIBE = """
import json, os, resource, sys, signal, random, warnings
descriptors = len(os.listdir("/proc/self/fd"))  # before popen, whose pipe stays open until its child is reaped
print(json.dumps({
    "descriptors": descriptors,
    "argv": sys.argv[1:], "name": __name__, "directory": os.getcwd(), "path": sys.path, "umask": os.umask(0),
    "value": os.environ.get("VALUE"), "c_value": os.popen("echo $VALUE").read().strip(), "niceness": os.nice(0),
    "open_files": resource.getrlimit(resource.RLIMIT_NOFILE), "affinity": sorted(os.sched_getaffinity(0)),
    "oom": open("/proc/self/oom_score_adj").read(), "interrupt": str(signal.getsignal(signal.SIGINT)),
    "child": str(signal.getsignal(signal.SIGCHLD)), "filters": len(warnings.filters),
    "stdin": sys.stdin.read(),
}))
print("to stderr", file=sys.stderr)
sys.exit(7)
"""


def test_fork_behaves_like_a_new_process(server: Server, tmp_path: Path) -> None:
    script = _write(tmp_path, _DESCRIBE)
    prepare = f"ulimit -n 123; umask 026; echo 500 > /proc/self/oom_score_adj; cd {tmp_path}; exec nice -n 3 "
    ask = [sys.executable, "-c", _ASK.format(path=str(server.socket)), str(script), "a", "b c"]
    plain = [sys.executable, str(script), "a", "b c"]
    environment = _environment() | {"VALUE": "ü x"}
    descriptions = []
    for command in (plain, ask):
        done = subprocess.run(
            ["bash", "-c", prepare + shlex.join(command)], input="hello", capture_output=True, text=True,
            env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 7 and done.stderr.endswith("to stderr\n"), done.stderr
        descriptions.append(json.loads(done.stdout))
    assert descriptions[0] == descriptions[1]


def test_forks_draw_different_random_numbers(server: Server, tmp_path: Path) -> None:
    script = _write(
        tmp_path,
        "import numpy, random, tempfile, uuid, sys\nassert 'numpy' in sys.modules\n"
        "print(numpy.random.rand(), random.random(), next(tempfile._get_candidate_names()), uuid.uuid4())",
    )
    drawn = [server.run(script)[1].split() for _ in range(3)]
    for each in zip(*drawn, strict=True):
        assert len(set(each)) == 3


@pytest.mark.parametrize(
    ("text", "code", "printed"),
    [
        ("import sys; sys.exit('a reason')", 1, "a reason"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import os; os.abort()", -signal.SIGABRT, ""),
        ("import atexit; atexit.register(print, 'at the end')", 0, "at the end"),
        ("import threading as t, time\nt.Thread(target=lambda: [time.sleep(0.3), print('late')]).start()", 0, "late"),
    ],
)  # fmt: skip
def test_client_exits_as_its_fork_exits(server: Server, tmp_path: Path, text: str, code: int, printed: str) -> None:
    returned, output = server.run(_write(tmp_path, text))
    assert returned == code and printed in output


def test_signals_reach_the_fork_and_a_killed_client_ends_it(server: Server, tmp_path: Path) -> None:
    script = _write(
        tmp_path,
        "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print(os.getpid(), flush=True)\ntime.sleep(60)",
    )
    asked = server.start(script)
    assert asked.stdout is not None
    asked.stdout.readline()
    asked.terminate()
    assert asked.wait(20) == 5
    killed = server.start(script)
    assert killed.stdout is not None
    fork = int(killed.stdout.readline())
    killed.kill()
    _wait(lambda: not psutil.pid_exists(fork))


def test_forks_outlive_a_killed_server(server: Server, tmp_path: Path) -> None:
    release = tmp_path / "release"
    os.mkfifo(release)
    script = _write(tmp_path, f"print('begun', flush=True)\nopen({str(release)!r}).read()\nprint('done')")
    client = server.start(script)
    assert client.stdout is not None and client.stdout.readline() == "begun\n"
    server.process.kill()
    code, output = server.run(script)
    assert code == 0 and ("refused" in output.lower() or "reset" in output.lower() or "ended" in output.lower())
    assert client.poll() is None
    release.write_text("")
    output, _ = client.communicate(timeout=20)
    assert output == "done\n"


# The server of a node, whose raylet is the first argument.
_SERVE_NODE = """
from launcher.processes import fork_server, preload
preload.SHARED, preload.SERVER = ("numpy",), ()
fork_server.main()
"""


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "of another installation"])
def test_node_gets_another_server_while_forks_of_the_last_one_run(tmp_path: Path, is_killed: bool) -> None:
    site, release, raylet = tmp_path / "site", tmp_path / "release", os.getpid()
    site.mkdir()
    os.mkfifo(release)
    paths = {"XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": f"{_ROOT}:{site}", "RAY_RAYLET_PID": str(raylet)}
    path = tmp_path / "launcher" / f"node-{raylet}-{process_began(raylet)}.sock"
    servers: list[subprocess.Popen[str]] = []

    def start() -> Server:
        command = [sys.executable, "-c", _SERVE_NODE, str(raylet)]
        servers.append(subprocess.Popen(command, text=True, cwd=tmp_path, env=_environment() | paths))
        return Server(servers[-1], path)

    try:
        first = start()
        _wait(path.exists)
        assert start().parent.wait(20) == 0, "two servers at once"
        slow = _write(tmp_path, f"print('begun', flush=True)\nopen({str(release)!r}).read()")
        client = first.start(slow, **paths)
        assert client.stdout is not None and client.stdout.readline() == "begun\n"
        quick = tmp_path / "quick.py"
        quick.write_text("print('ran')")
        if is_killed:
            first.parent.kill()
        else:
            (site / "package-2.0.dist-info").mkdir()
            assert "have changed" in first.run(quick, **paths)[1]
        second = start()
        _wait(lambda: second.run(quick, **paths) == (0, "ran\n"))
        assert client.poll() is None
        release.write_text("")
        assert client.wait(20) == (1 if is_killed else 0) and first.parent.wait(20) == (-9 if is_killed else 0)
        assert second.run(quick, **paths) == (0, "ran\n")
    finally:
        for server in servers:
            server.kill()
            server.wait()


def test_server_and_forks_end_with_the_watched_process(server: Server, tmp_path: Path) -> None:
    script = _write(tmp_path, "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    client = server.start(script)
    assert client.stdout is not None
    fork, process = int(client.stdout.readline()), server.process
    server.parent.kill()
    _wait(lambda: not psutil.pid_exists(fork))
    _wait(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    client.wait(20)


def test_changed_variable_that_imports_read_is_refused(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "reads_it.py").write_text(
        "import os\nHOME = os.environ.get('MY_HOME', '/default')\nos.environ['SET'] = '1'"
    )
    server = serve(("reads_it",), PYTHONPATH=f"{_ROOT}:{tmp_path}")
    script = _write(tmp_path, "import os, reads_it\nprint(reads_it.HOME, os.environ['SET'], os.environ.get('OTHER'))")
    path = {"PYTHONPATH": f"{_ROOT}:{tmp_path}"}
    assert server.run(script, OTHER="x", **path) == (0, "/default 1 x\n")
    output = server.run(script, MY_HOME="/mine", **path)[1]
    assert "MY_HOME" in output and "/default" not in output
    assert "LD_LIBRARY_PATH" in server.run(script, LD_LIBRARY_PATH="/lib2", **path)[1]


def test_package_of_the_user_is_never_shadowed(server: Server, tmp_path: Path) -> None:
    own = tmp_path / "own" / "numpy"
    own.mkdir(parents=True)
    (own / "__init__.py").write_text("MINE = True")
    script = _write(tmp_path, "import numpy; print(numpy.__file__)")
    assert "numpy of its own" in server.run(script, PYTHONPATH=f"{_ROOT}:{own.parent}")[1]


def test_changed_installation_ends_the_server(serve: Callable[..., Server], tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    environment = {"PYTHONPATH": f"{_ROOT}:{site}"}
    server, script = serve(**environment), _write(tmp_path, "print('ran')")
    assert server.run(script, **environment) == (0, "ran\n")
    process = server.process
    (site / "package-2.0.dist-info").mkdir()
    assert "have changed" in server.run(script, **environment)[1]
    _wait(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    assert not server.socket.exists()


def test_removed_socket_is_reported(server: Server, tmp_path: Path) -> None:
    script = _write(tmp_path, "print('ran')")
    server.socket.unlink()
    assert "FileNotFoundError" in server.run(script)[1]


def test_malformed_request_does_not_end_the_server(server: Server, tmp_path: Path) -> None:
    for body in (b"{", b"[]", b'{"arguments": []}'):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(server.socket))
            send(connection, body, [0, 1, 2])
            assert connection.recv(64) == b""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(server.socket))  # and sends nothing
    assert server.run(_write(tmp_path, "print('ran')")) == (0, "ran\n")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to ask as another user")
def test_another_user_is_refused(server: Server, tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody").pw_uid
    server.socket.chmod(0o777)  # so that only the check of the peer stands in the way
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    process = server.process
    pid = os.fork()
    if pid == 0:
        os.setuid(nobody)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(server.socket))
            os._exit(0 if connection.recv(64) == b"" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert process.is_running() and not process.children()
    assert server.run(_write(tmp_path, "print('ran')")) == (0, "ran\n")


def test_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "launcher").mkdir(mode=0o777)
    (tmp_path / "launcher").chmod(0o777)
    code = "from launcher.processes import fork_client; print(fork_client.socket_dir())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment() | {"XDG_RUNTIME_DIR": str(tmp_path)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "chmod 700" in done.stderr
    client = _ROOT / "launcher" / "processes" / "fork_client.py"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-E", str(client), str(_write(tmp_path, "print('ran all the same')"))],
        env=_environment() | {"XDG_RUNTIME_DIR": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "ran all the same\n" and "chmod 700" in done.stderr


def test_process_with_threads_or_with_ray_is_not_forked() -> None:
    from launcher.processes import fork_server

    code = (
        "import threading, time, sys, types\nfrom launcher.processes import fork_server\n"
        "fork_server.check_forkable()\n"
        "sys.modules['ray'] = types.ModuleType('ray')\n"
        "try: fork_server.check_forkable()\nexcept fork_server.ForkServerError as error: print(error)\n"
        "del sys.modules['ray']\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "try: fork_server.check_forkable()\nexcept fork_server.ForkServerError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, check=True)
    assert fork_server.ForkServerError.__name__ not in done.stderr
    ray, threads = done.stdout.splitlines()
    assert "ray is imported" in ray and "threads are running" in threads


def test_hundreds_of_forks_leak_no_memory_and_no_files(server: Server, tmp_path: Path) -> None:
    script = _write(tmp_path, "pass")
    process = server.process

    def run(count: int) -> None:
        for _ in range(count // 25):
            clients = [server.start(script) for _ in range(25)]
            for client in clients:
                assert client.wait(60) == 0
                client.communicate()

    run(50)
    before = process.memory_full_info().uss, process.num_fds()
    run(200)
    after = process.memory_full_info().uss, process.num_fds()
    assert after[1] == before[1] and after[0] - before[0] < 1 << 20
    assert process.children() == []
