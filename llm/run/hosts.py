"""The processes that train one run: they begin together, agree, and end together.

    decide, gather  process 0 looks at the disk (or decides anything else), the others are told
    failure         the first process to fail says why; the others end with its exit code, silently
    watch           a process that dies, stops or hangs is named, and the others leave
    SharedStop      whichever process is asked to stop, all of them stop at one step

All but the last goes through the key-value store of JAX's coordination service, which process 0
serves, so that it works while devices are busy or wait for a process that is gone. A run of one
process passes through here without a thread or a wait.

What it is not: no array passes here; collectives are XLA's. Finding the others: cluster.py.
"""

import contextlib
import ctypes
import dataclasses
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
from llm.errors import LLMError, LostProcessError, SaidElsewhereError, UsageError
from llm.run.cluster import Cluster, find_cluster
from llm.run.stop import StopRequest, write_stderr

if TYPE_CHECKING:
    from jax.sharding import Mesh

T = TypeVar("T")

# Between two signs of life. One costs process 0 less than a millisecond.
BEAT_SECONDS = 1.0
# How long every living process has, once a collective failed, to show that it lives.
PATIENCE_SECONDS = 6.0
# How long processes that all leave wait for each other, and process 0 for all.
FAREWELL_SECONDS = 10
# JAX ends a process whose heartbeat stops with a trace; later than we do it with a message.
HEARTBEAT_MARGIN_SECONDS = 15
# Settings that may differ between the processes of one run.
OWN_SETTINGS = ("distributed.process_id", "data.cache_dir", "data.workers", "logging.progress")


@contextlib.contextmanager
def joined(settings: DistributedConfig) -> Iterator["Hosts"]:
    """The processes of this run, from before JAX looks for devices until all have ended.

    Raises:
      UsageError: settings by half, or processes that cannot be found.
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
        self._moves, self._marks, self._place, self._suspicious = 0, 0, "the beginning", False
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="hosts", daemon=True)

    def decide(self, what: str, make: Callable[[], T]) -> T:
        """What `make` gives on process 0, on all of them; it must be JSON.

        Every process calls this with the same `what`, in the same order. What process 0 raises ends
        them all.
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
        """What each process says, in the order of the processes, on all of them; it must be JSON.

        Called as `decide` is. A process gets its own value back as it is.
        """
        if self.alone:
            return [value]
        name = f"gathered/{self._decisions + 1}"
        self.tell(f"{name}/{self.index}", value)
        said = self.decide(
            what, lambda: [self.hear(f"{name}/{i}", forget=True) for i in range(self.count)]
        )
        return [value if index == self.index else other for index, other in enumerate(said)]

    def tell(self, name: str, value: Any) -> None:
        """Leave a JSON value for the others, once for each name. From any thread."""
        if not self.alone:
            self._store.key_value_set(f"llm/{name}", json.dumps(value))

    def hear(self, name: str, forget: bool = False) -> Any:
        """Wait for what another process tells, for as long as none of them fails.

        Args:
          forget: nobody else will ask, so that the store need not keep it.
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
        """The main thread lives. Called wherever it may be for long."""
        self._moves += 1

    def mark(self, place: str) -> None:
        """A place that every process passes, in the same order: one that stays behind hangs."""
        self._place = place
        self._marks += 1
        self._moves += 1

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Around what fails here when another process dies: name that one, instead of a trace."""
        try:
            yield
        except LLMError:
            raise
        except Exception:
            if not self.alone:
                # Process 0 now ends us as soon as one stays silent; if none does, it is a bug here.
                self._suspicious = True
                time.sleep(2 * PATIENCE_SECONDS)
            raise

    def start(self) -> None:
        """Begin to watch the others, and to be watched."""
        first = self.decide("who coordinates", lambda: _process_name(0))
        _say_on_abort(f"{first}, which coordinates the others, is gone or does not answer")
        self._watcher.start()

    def end(self) -> None:
        """All have done their work; wait for each other, so that none is taken for dead."""
        self.gather("the end", True)
        self._shutdown()

    def fail(self, error: BaseException) -> None:
        """End the others as this process ends; raises SaidElsewhereError if one failed first."""
        code = error.exit_code if isinstance(error, LLMError) else 1
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            code = error.code
        failure = {"process": self.index, "exit_code": code, "lost": None}
        if not self.is_first:
            # If all fail alike, process 0 says it.
            _until(lambda: self._failure() is not None, 2 * BEAT_SECONDS)
        first = self._post(failure)
        self._shutdown()
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
        signs = {i: Sign(now, now, Said(name=f"process {i}")) for i in range(self.count)}
        beats = 0
        while not self._over.wait(BEAT_SECONDS):
            beats += 1
            own = Said(beats, self._moves, self._marks, self._place, self._suspicious, name)
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

    def _judge(self, signs: dict[int, "Sign"]) -> None:
        """Name the process that is lost, if one is. In process 0, for all."""
        now = time.monotonic()
        for key, value in self._store.key_value_dir_get("llm/sign/"):
            index = int(key.rpartition("/")[2])
            signs[index] = signs[index].after(Said(*json.loads(value)), now)
        lost = find_lost(signs, now, self.timeout, min(PATIENCE_SECONDS, self.timeout))
        if lost is None:
            return
        failure = {"process": 0, "exit_code": LostProcessError.exit_code, "lost": lost.process}
        if self._post(failure) == failure:
            write_stderr(
                f"error: {signs[lost.process].said.name} {lost.why}; all processes of the run end. "
                "What was saved is whole: the same command resumes from the newest checkpoint"
            )
        self._linger(expected=self.count - lost.silent)

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

    def _shutdown(self) -> None:
        self._over.set()
        self._watcher.join()
        self._leave_jax()

    def _leave_jax(self) -> None:
        import jax

        with contextlib.suppress(_timed_out()):
            jax.distributed.shutdown()


class Said(NamedTuple):
    """What a process says of itself, about once a second.

    beats: rises while the process runs at all. moves: rises while its main thread does anything.
    marks: rises at places that all processes pass in the same order; place: the newest of them.
    suspicious: a collective failed here, so that another process may be gone.
    """

    beats: int = -1
    moves: int = -1
    marks: int = 0
    place: str = "the beginning"
    suspicious: bool = False
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Sign:
    """The newest that a process said, and since when (monotonic seconds) it says the same."""

    beaten_at: float
    moved_at: float
    said: Said = dataclasses.field(default_factory=Said)

    def after(self, said: Said, now: float) -> "Sign":
        """This sign, once the process has said something at `now`."""
        beaten = self.beaten_at if said.beats == self.said.beats else now
        moved = self.moved_at if said.moves == self.said.moves else now
        return Sign(beaten, moved, said)


class Lost(NamedTuple):
    """A process, whether it is silent altogether (and not only its main thread), and the words."""

    process: int
    silent: bool
    why: str


def find_lost(
    signs: Mapping[int, Sign], now: float, timeout: float, patience: float
) -> Lost | None:
    """The first process that is lost, or None.

    Args:
      timeout: seconds without a beat after which a process is dead or stopped, and without a move
        after which one that is behind the others hangs. One that is not behind may compile, or wait
        for the one that is.
      patience: in place of it, without a beat, once a collective has failed.
    """
    suspicious = any(sign.said.suspicious for sign in signs.values())
    silence = patience if suspicious else timeout
    furthest = max(sign.said.marks for sign in signs.values())
    for index, sign in sorted(signs.items()):
        beaten, moved, place = now - sign.beaten_at, now - sign.moved_at, sign.said.place
        if beaten >= silence:
            return Lost(index, True, f"gave no sign of life for {beaten:.0f} s, after {place}")
        if sign.said.marks < furthest and moved >= timeout:
            return Lost(index, False, f"hangs: it did nothing for {moved:.0f} s, after {place}")
    return None


class SharedStop:
    """A request to stop, agreed on: whichever process was asked, all of them stop at one step.

    Of one process it is its own `StopRequest`. With several, each step carries a flag for every
    device, and their maximum is read together with what that step measured: one step late, as all
    metrics are, so that no device waits for a host.

    Every process calls `ask` and `read` in the same order as it dispatches computations.
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
            """int32 [devices]: this process's word, one copy on each device."""
            every_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            return jax.make_array_from_callback(
                (mesh.devices.size,), every_device, lambda _: np.full(1, raised, np.int32)
            )

        self._flags = [flag(False), flag(True)]
        self._any = jax.jit(jax.numpy.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    @property
    def requested(self) -> bool:
        """The same answer in every process."""
        return self._request.requested if self._alone else self._agreed

    def ask(self) -> None:
        """Dispatch the question whether a stop was requested by now, anywhere."""
        if not self._alone:
            self._asked.append(self._any(self._flags[self._request.requested]))

    def read(self, leave: int = 0) -> None:
        """Wait for the answers, but for the newest `leave`."""
        while len(self._asked) > leave:
            self._agreed |= bool(self._asked.popleft())


_kept_alive: list[Any] = []


def _say_on_abort(text: str) -> None:
    """Set what this process says, instead of a signal's number, if JAX aborts it.

    JAX's coordination client calls abort() when process 0 goes or does not answer. It cannot call a
    Python callback instead (it dies of std::bad_cast). The handler runs in the thread that aborts,
    which holds no lock of Python's.
    """

    def say_and_end(_number: int) -> None:
        write_stderr(
            f"error: {text} (see above); the same command resumes from the newest checkpoint"
        )
        os._exit(LostProcessError.exit_code)

    _kept_alive.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(say_and_end))
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _kept_alive[-1])


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
