"""The processes that train one run: they begin together, agree, and end together.

    decide, gather  process 0 decides, for example by what is on the disk, and tells the others
    fail            the first process to fail says why; the others end silently with its exit code
    watch           a process that dies, stops or hangs is named, and the others leave
    SharedStop      if any process is asked to stop, all of them stop at the same step

All of this, except SharedStop, uses the key-value store of JAX's coordination service. Process 0
serves the store, so it works while devices are busy, or wait for a process that is gone. A run of
one process starts no thread here and waits for nothing.

What it is not: arrays do not pass through here, but through XLA's collectives. cluster.py finds the
other processes.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from llm.config import Config, DistributedConfig, differences, validate
from llm.console import write_stderr
from llm.errors import LLMError, LostProcessError, SaidElsewhereError, UsageError
from llm.run.cluster import Cluster, find_cluster
from llm.run.stop import StopRequest, end_on

if TYPE_CHECKING:
    from jax.sharding import Mesh

T = TypeVar("T")

# Between two signs of life. Reading them costs process 0 less than a millisecond.
BEAT_SECONDS = 1.0
# How long a process may be silent, once a collective has failed, before it is taken for dead.
PATIENCE_SECONDS = 6.0
# How long processes that all leave wait for each other, and process 0 for all.
FAREWELL_SECONDS = 10
# If a heartbeat stops, JAX ends processes with a trace; this much later than we do, with a message.
HEARTBEAT_MARGIN_SECONDS = 15
# Settings that may differ between the processes of one run.
OWN_SETTINGS = ("distributed.process_id", "data.cache_dir", "data.workers", "logging.progress")


@contextlib.contextmanager
def joined(settings: DistributedConfig) -> Iterator["Hosts"]:
    """The processes of this run, from before JAX looks for devices until all have ended.

    Raises:
      UsageError: some of the settings are missing, or the processes cannot be found.
      SaidElsewhereError: another process failed and has said why.
    """
    import jax  # noqa: F401  tells find_cluster whether there are TPU chips

    cluster = find_cluster(settings, os.environ)
    hosts = Hosts() if cluster is None else _initialize(cluster, settings.timeout)
    if hosts.alone:  # so is the one host of a small TPU
        yield hosts
        return
    hosts.start()
    try:
        yield hosts
    except BaseException as error:
        hosts.fail(error)
        raise
    hosts.end()


def _initialize(cluster: Cluster, timeout: int) -> "Hosts":
    import jax
    from jax._src.distributed import global_state  # the store has no public name

    coordinator = cluster.arguments.get("coordinator_address", "")
    if coordinator and cluster.arguments["process_id"] == 0:
        check_port_is_free(coordinator)
    # JAX's handler of SIGTERM and ours would replace each other: llm/run/stop.py is enough.
    jax.config.update("jax_enable_preemption_service", False)
    _say_on_abort(
        f"not all processes came together at {coordinator or cluster.launcher}: is each of "
        "them started, with the same coordinator and number, and can they reach process 0?"
    )
    try:
        jax.distributed.initialize(
            **cluster.arguments,
            heartbeat_timeout_seconds=timeout + HEARTBEAT_MARGIN_SECONDS,
            shutdown_timeout_seconds=FAREWELL_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the processes of this run cannot be found through {cluster.launcher}: "
            f"{str(error).splitlines()[0]}; set distributed.coordinator, num_processes and "
            "process_id (docs/clusters.md)"
        ) from None
    return Hosts(jax.process_index(), jax.process_count(), global_state.client, timeout)


def check_port_is_free(coordinator: str) -> None:
    """Raise a UsageError if the port is taken: JAX would die of it without a word."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(coordinator.rpartition(":")[2])))
        except OSError as error:
            raise UsageError(
                f"distributed.coordinator = {coordinator!r}: process 0 cannot listen on that port "
                f"({error.strerror}); choose another one, the same for all processes"
            ) from None


class Hosts:
    """This process among `count`; alone by default."""

    def __init__(self, index: int = 0, count: int = 1, store: Any = None, timeout: float = 0.0):
        self.index, self.count, self.timeout = index, count, timeout
        # Process 0 writes, prints and decides.
        self.is_first, self.alone = index == 0, count == 1
        self._store, self._decisions = store, 0
        self._moved_at, self._marks, self._place = time.monotonic(), 0, "the beginning"
        self._suspicious = False
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="hosts", daemon=True)

    def decide(self, what: str, make: Callable[[], T]) -> T:
        """Return what `make` returns in process 0, in every process; it must be JSON.

        Every process makes the same calls of `decide` and `gather`, in the same order. An error
        that `make` raises in process 0 ends all processes.
        """
        if self.alone:
            return make()
        self._decisions += 1
        name = f"decision/{self._decisions}"
        if self.is_first:
            self.tell(name, [what, make()])
        said, value = self.hear(name)
        assert said == what, f"process {self.index} asks for {what!r}, process 0 told {said!r}"
        return value

    def gather(self, what: str, value: T) -> list[T]:
        """Return the values of all processes, in their order, in every process; they must be JSON.

        Called as `decide` is.
        """
        if self.alone:
            return [value]
        name = f"gathered/{self._decisions + 1}"
        self.tell(f"{name}/{self.index}", value)
        return self.decide(
            what, lambda: [self.hear(f"{name}/{i}", forget=True) for i in range(self.count)]
        )

    def tell(self, name: str, value: Any) -> None:
        """Leave a JSON value for the others, once for each name. Any thread may call this."""
        if not self.alone:
            self._store.key_value_set(f"llm/{name}", json.dumps(value))

    def hear(self, name: str, forget: bool = False) -> Any:
        """Wait for what another process tells, for as long as none of them fails.

        Args:
          forget: remove it from the store, because no other process will ask for it.
        """
        while True:
            if threading.current_thread() is threading.main_thread():
                self.moved()
            with contextlib.suppress(_timed_out()):
                said = json.loads(self._store.blocking_key_value_get(f"llm/{name}", 1000))
                if forget:
                    self._store.key_value_delete(f"llm/{name}")
                return said

    def check_same(self, config: Config) -> None:
        """Raise a UsageError if this process was started with other settings than process 0."""
        first = self.decide("settings", lambda: config.model_dump(mode="json"))
        wrong = [
            f"  {name}: process 0 has {theirs!r}, process {self.index} has {ours!r}"
            for name, (theirs, ours) in differences(
                validate(first, where="process 0"), config
            ).items()
            if name not in OWN_SETTINGS
        ]
        if wrong:
            raise UsageError(
                "\n".join(["the processes of one run were started with other settings:", *wrong])
            )

    def moved(self) -> None:
        """Tell that the main thread lives. Called wherever it may be for long."""
        self._moved_at = time.monotonic()

    def mark(self, place: str) -> None:
        """Tell that this process is at a place that all processes pass, in the same order."""
        self._place = place
        self._marks += 1
        self.moved()

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Wrap code that fails here when another process dies, so that the other one is named."""
        try:
            yield
        except LLMError:
            raise
        except Exception:
            if not self.alone:
                # Process 0 ends us if another process stays silent. Otherwise this is a bug here.
                self._suspicious = True
                time.sleep(2 * PATIENCE_SECONDS)
            raise

    def start(self) -> None:
        """Begin to watch the others, and to be watched."""
        first = self.decide("who coordinates", lambda: _process_name(0))
        _say_on_abort(f"{first}, which coordinates the others, is gone or does not answer")
        self._watcher.start()

    def end(self) -> None:
        """Wait until all processes have done their work, so that none is taken for dead."""
        self.gather("the end", True)
        self._stop_watching()
        self._leave_jax()

    def fail(self, error: BaseException) -> None:
        """End the others as this process ends; raises SaidElsewhereError if one failed first."""
        code = error.exit_code if isinstance(error, LLMError) else 1
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            code = error.code
        failure = {"process": self.index, "exit_code": code, "lost": None}
        if not self.is_first:
            # If all fail alike, process 0 says it.
            _until(lambda: self._failure() is not None, 2 * BEAT_SECONDS)
        # This process's own watcher would follow the failure, and end it before it has said why.
        self._stop_watching()
        first = self._post(failure)
        self._leave_jax()
        if first != failure and isinstance(error, LLMError):
            raise SaidElsewhereError(first["exit_code"]) from None

    def _post(self, failure: dict[str, Any]) -> dict[str, Any]:
        """The first failure of all, which may be this one."""
        with contextlib.suppress(_timed_out()):
            self._store.key_value_set("llm/failed", json.dumps(failure))
        return self._failure() or failure

    def _failure(self) -> dict[str, Any] | None:
        with contextlib.suppress(_timed_out()):
            return json.loads(self._store.key_value_try_get("llm/failed"))
        return None

    def _watch(self) -> None:
        """In its own thread: signs of life, the failures of others, and who has gone silent."""
        now, name = time.monotonic(), _process_name(self.index)
        signs = {i: (now, Sign(name=f"process {i}")) for i in range(self.count)}
        beats = 0
        while not self._over.wait(BEAT_SECONDS):
            beats += 1
            idle = time.monotonic() - self._moved_at
            own = Sign(beats, idle, self._marks, self._place, self._suspicious, name)
            # The store fails when process 0 is going; JAX ends us when it is gone.
            with contextlib.suppress(_timed_out()):
                self._store.key_value_set(
                    f"llm/sign/{self.index}", json.dumps(own), allow_overwrite=True
                )
                failure = self._failure()
                if failure is not None:
                    if failure["lost"] is not None:
                        self._linger(self.count)
                    self._leave_jax()
                    os._exit(failure["exit_code"])
                if self.is_first:
                    self._judge(signs)

    def _judge(self, signs: dict[int, tuple[float, "Sign"]]) -> None:
        """Name the process that is lost, if one is. In process 0, for all.

        Args:
          signs: the newest sign of each process, and when it came; brought up to date here.
        """
        now = time.monotonic()
        for key, value in self._store.key_value_dir_get("llm/sign/"):
            index, sign = int(key.rpartition("/")[2]), Sign(*json.loads(value))
            if sign != signs[index][1]:
                signs[index] = now, sign
        ages = {index: (now - came, sign) for index, (came, sign) in signs.items()}
        lost = find_lost(ages, self.timeout, min(PATIENCE_SECONDS, self.timeout))
        if lost is None:
            return
        process, silent, why = lost
        failure = {"process": 0, "exit_code": LostProcessError.exit_code, "lost": process}
        if self._post(failure) == failure:
            write_stderr(
                f"error: {signs[process][1].name} {why}; all processes of the run end. "
                "What was saved is whole: the same command resumes from the newest checkpoint"
            )
        self._linger(expected=self.count - silent)

    def _linger(self, expected: int) -> NoReturn:
        """End although a process cannot take part. Process 0 goes last, after `expected` have said
        that they go: JAX aborts the processes that it leaves behind."""
        self._store.key_value_set(f"llm/left/{self.index}", "1", allow_overwrite=True)
        if self.is_first:
            _until(
                lambda: len(self._store.key_value_dir_get("llm/left/")) >= expected,
                FAREWELL_SECONDS,
            )
            time.sleep(BEAT_SECONDS / 4)  # they have said so, and are about to go
        os._exit(LostProcessError.exit_code)

    def _stop_watching(self) -> None:
        self._over.set()
        self._watcher.join()

    def _leave_jax(self) -> None:
        import jax

        with contextlib.suppress(_timed_out()):
            jax.distributed.shutdown()


# The default of functions that several processes may call together.
ALONE = Hosts()


class Sign(NamedTuple):
    """What a process says of itself, about once a second.

    Attributes:
      beats: how many signs it has given.
      idle: seconds since its main thread did anything.
      marks: how many places it has passed that all processes pass in the same order.
      place: the newest of these places.
      suspicious: a collective failed in it, so that another process may be gone.
      name: for people.
    """

    beats: int = 0
    idle: float = 0.0
    marks: int = 0
    place: str = "the beginning"
    suspicious: bool = False
    name: str = ""


def find_lost(
    signs: Mapping[int, tuple[float, Sign]], timeout: float, patience: float
) -> tuple[int, bool, str] | None:
    """The first process that is lost: its index, whether it is silent altogether, and why.

    Args:
      signs: the newest sign of each process, with its age in seconds.
      timeout: a process is dead or stopped if its newest sign is this old. It hangs if it is behind
        the others and its main thread was idle for this long: a process that is not behind may
        compile, or wait for the one that is.
      patience: replaces timeout for the age of signs, once a collective has failed.
    """
    suspicious = any(sign.suspicious for _, sign in signs.values())
    furthest = max(sign.marks for _, sign in signs.values())
    for index, (age, sign) in sorted(signs.items()):
        if age >= (patience if suspicious else timeout):
            return index, True, f"gave no sign of life for {age:.0f} s, after {sign.place}"
        if sign.marks < furthest and sign.idle >= timeout:
            return index, False, f"hangs: it did nothing for {sign.idle:.0f} s, after {sign.place}"
    return None


class SharedStop:
    """A request to stop on which all processes agree, so that all of them stop at one step.

    A run of one process uses its own `StopRequest`. With several processes, each step carries a
    flag for every device. The maximum of the flags is read together with the metrics of that step,
    which is one step late, so that no device waits for a host.

    Every process calls `ask` and `read` at the same places between the computations it dispatches.
    """

    def __init__(self, request: StopRequest, hosts: Hosts, mesh: "Mesh"):
        self._request, self._alone = request, hosts.alone
        self._agreed = False
        self._asked: deque[Any] = deque()
        if self._alone:
            return
        import jax
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec

        def flag(raised: bool) -> Any:
            """int32 [devices]: what this process says, once on each of its devices."""
            every_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            return jax.make_array_from_callback(
                (mesh.devices.size,), every_device, lambda _: np.full(1, raised, np.int32)
            )

        self._flags = [flag(False), flag(True)]
        self._any = jax.jit(jax.numpy.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    @property
    def requested(self) -> bool:
        """Whether to stop: the same answer in every process."""
        return self._request.requested if self._alone else self._agreed

    def ask(self) -> None:
        """Dispatch the question whether a stop was requested in any process by now."""
        if not self._alone:
            self._asked.append(self._any(self._flags[self._request.requested]))

    def read(self, leave: int = 0) -> None:
        """Wait for all answers except the newest `leave`."""
        while len(self._asked) > leave:
            self._agreed |= bool(self._asked.popleft())


def _say_on_abort(text: str) -> None:
    """Set what this process says, instead of a signal's number, if JAX aborts it.

    JAX's coordination client calls abort() when process 0 goes or does not answer. It cannot call a
    Python callback instead (it dies of std::bad_cast).
    """
    said = f"{text} (see above); the same command resumes from the newest checkpoint"
    end_on(signal.SIGABRT, lambda: said, LostProcessError.exit_code)


def _process_name(index: int) -> str:
    return f"process {index} ({os.getpid()} on {socket.gethostname()})"


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _timed_out() -> type[Exception]:
    """What the store raises: nothing there yet, or no longer a store."""
    from jax.errors import JaxRuntimeError

    return JaxRuntimeError
