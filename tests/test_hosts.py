"""Several processes train one run: they give what one gives, and begin, stop and end together.

Real processes on this machine, each with one CPU device, that reduce through gloo.
"""

import json
import os
import socket
import time
import tomllib

import jax
import numpy as np
import pytest
import tomli_w
from runs import (
    copied,
    free_port,
    identity_of,
    losses,
    params_sha256,
    run_process,
    saved_arrays,
    train,
    train_process,
    write_config,
)

from llm.config import DistributedConfig
from llm.errors import UsageError
from llm.pages.report import gather
from llm.run.cluster import find_cluster
from llm.run.directory import RunDirectory
from llm.run.hosts import Hosts, Sign, check_port_is_free, find_lost
from llm.text.batches import RingWindows, TrainingBatches

STEPS = 6
CHANGES = {
    "model": {"n_layer": 1},
    "training": {"steps": STEPS, "batch_size": 8, "eval_every": 0, "eval_batch_size": 64},
    "checkpoint": {"every": 2, "keep": 9, "keep_best": False},
    "sample": {"max_new_tokens": 0},
}


def together(config, count, *flags, faults=(), last=()) -> list[tuple[int, str]]:
    """(exit code, what it printed) of each of `count` processes.

    Args:
      faults: of process 0, 1, ...
      last: flags that only the last process is given.
    """
    port = free_port()
    started = []
    for index in range(count):
        distributed = [
            "--distributed.coordinator", f"127.0.0.1:{port}",
            "--distributed.num-processes", str(count), "--distributed.process-id", str(index),
        ]  # fmt: skip
        own = last if index == count - 1 else ()
        fault = faults[index] if index < len(faults) else ""
        started.append(train_process(config, *distributed, *flags, *own, fault=fault))
    try:
        outputs = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, out) for process, out in zip(started, outputs, strict=True)]


def codes(results):
    return [code for code, _ in results]


def said(output: str) -> list[str]:
    """Lines of ours, without what gloo prints of its connections."""
    return [line for line in output.splitlines() if line and not line.startswith("[Gloo]")]


def same_losses(run, other):
    pairs = list(zip(losses(run), losses(other), strict=True))
    for one, two in pairs:
        assert one[:2] == two[:2]
        assert one[2] == pytest.approx(two[2], rel=1e-5)
    assert [step for kind, step, _ in losses(run) if kind == "train"] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of a single process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("one")
    code, output = run_process(write_config(folder, **CHANGES))
    assert code == 0, output
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same run by two processes, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    results = together(write_config(folder, **CHANGES), 2)
    assert codes(results) == [0, 0], results
    (folder / "printed.json").write_text(json.dumps([said(output) for _, output in results]))
    return folder


@pytest.fixture(scope="module")
def two_killed(tmp_path_factory):
    """Two processes killed in step 5; one may first notice that the other is gone, and leave."""
    folder = tmp_path_factory.mktemp("two-killed")
    fault = "step:step=5:kill"
    results = together(write_config(folder, **CHANGES), 2, faults=[fault, fault])
    assert sorted(codes(results)) in ([-9, -9], [-9, 7]), results
    return folder


def test_two_processes_give_the_losses_of_one(one, two):
    same_losses(two / "run", one / "run")
    records = [json.loads(line) for line in (two / "run" / "metrics.jsonl").open()]
    expected = [json.loads(line) for line in (one / "run" / "metrics.jsonl").open()]
    assert [row["tokens"] for row in records] == [row["tokens"] for row in expected]
    bits = [row["bits_per_byte"] for row in records if row["kind"] == "eval"]
    assert bits == pytest.approx([r["bits_per_byte"] for r in expected if r["kind"] == "eval"])


def test_two_processes_score_the_probes_that_one_scores_and_write_them_once(one, two):
    rows = [
        [json.loads(line) for line in (folder / "run" / "probes.jsonl").read_text().splitlines()]
        for folder in (one, two)
    ]
    assert len(rows[0]) == len(rows[1]) == 2 and (two / "run" / "report.html").exists()
    for alone, shared in zip(*rows, strict=True):
        assert [alone[name] for name in ("step", "name", "ids")] == [
            shared[name] for name in ("step", "name", "ids")
        ]
        logprobs = [[said[0] for said in row["said"][1:]] for row in (alone, shared)]
        np.testing.assert_allclose(*logprobs, rtol=0, atol=1e-4)


def test_only_process_0_prints_and_the_start_counts_the_processes(two):
    first, second = json.loads((two / "printed.json").read_text())
    assert any("finished 6 steps" in line for line in first)
    assert second == []
    (start,) = json.loads((two / "run" / "run.json").read_text())["starts"]
    assert start["processes"] == 2
    assert start["devices"]["count"] == 2


def test_what_two_processes_saved_opens_in_one(two, capsys):
    from llm.commands.verify import main

    assert main([str(two / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["manifest_ok"] and found["step"] == STEPS
    assert found["receipt_max_abs_diff"] < 1e-4


def check_saved(run, pieces):
    """The processes wrote each array once, in so many pieces; one hash is that of the whole."""
    step = run / "checkpoints" / str(STEPS)
    groups = json.loads((step / "manifest.json").read_text())["groups"]
    for group in ("params", "training"):
        on_disk = [path for path in (step / group).rglob("*") if path.is_file()]
        assert {str(path.relative_to(step)) for path in on_disk} == set(groups[group])
    found = [name for name in groups["params"] if "/blocks.0.mlp.up.weight/" in name]
    assert len(found) == pieces + 1  # and .zarray
    assert identity_of(saved_arrays(step / "params")) == params_sha256(run, STEPS)


def test_what_both_processes_hold_is_written_once_and_one_hash_stands_for_it(one, two):
    check_saved(one / "run", pieces=1)
    check_saved(two / "run", pieces=1)


@pytest.mark.thorough
def test_killed_and_resumed_by_two_is_bitwise_the_unbroken_run(two, two_killed, tmp_path):
    config = copied(two_killed, tmp_path)
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert "2" in steps and "6" not in steps
    assert codes(together(config, 2)) == [0, 0]
    assert losses(tmp_path / "run") == losses(two / "run")
    assert params_sha256(tmp_path / "run", STEPS) == params_sha256(two / "run", STEPS)


OVER_FOUR = ("--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.tensor", "2")


@pytest.mark.thorough
def test_a_run_of_two_is_resumed_by_four_that_share_each_matrix(one, two_killed, tmp_path):
    """With fsdp and tensor over the processes, each of which then holds a quarter."""
    config = copied(two_killed, tmp_path)
    results = together(config, 4, *OVER_FOUR)
    assert codes(results) == [0] * 4, results
    same_losses(tmp_path / "run", one / "run")
    check_saved(tmp_path / "run", pieces=4)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["starts"][-1]["from_step"] > 0
    # Its report, written by one of the four, and the probes that they scored together.
    assert (tmp_path / "run" / "report.html").read_text().count("<!doctype html>") == 1
    (run,), (of_one,) = (
        gather([RunDirectory(folder / "run")])["runs"] for folder in (tmp_path, one)
    )
    assert dict(run["facts"])["devices"].endswith(", 4 processes")
    assert run["state"] == of_one["state"] and len(run["marks"]) == 1
    for text, alone_ in zip(run["texts"], of_one["texts"], strict=True):
        assert text["steps"] == alone_["steps"]
        found, expected = (
            [[said[0] for said in of if said] for of in each["said"]] for each in (text, alone_)
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.thorough
def test_a_run_of_four_names_the_one_it_lost_and_is_resumed_by_one(one, tmp_path):
    config = write_config(tmp_path, **CHANGES)
    results = together(config, 4, *OVER_FOUR, faults=["", "", "", "step:step=5:kill"])
    assert codes(results) == [7, 7, 7, -9], results
    output = results[0][1]
    assert output.count("error: process 3 (") == 1 and "gave no sign of life" in output
    assert "Traceback" not in output
    code, output = run_process(config)
    assert code == 0, output
    same_losses(tmp_path / "run", one / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["starts"][-1]["from_step"] > 0


@pytest.mark.thorough
def test_a_run_of_one_is_resumed_by_two_that_share_each_sequence(one, tmp_path):
    config = write_config(tmp_path, **CHANGES)
    code, output = run_process(config, fault="step:step=5:kill")
    assert code == -9, output
    results = together(config, 2, "--mesh.data", "1", "--mesh.context", "2")
    assert codes(results) == [0, 0], results
    same_losses(tmp_path / "run", one / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["starts"][-1]["from_step"] > 0


@pytest.mark.thorough
def test_a_signal_to_one_process_stops_all_at_one_step_with_one_checkpoint(tmp_path):
    config = write_config(tmp_path, **{**CHANGES, "checkpoint": {"every": 100}})
    results = together(config, 2, faults=["", "step:step=3:term"])
    assert codes(results) == [75, 75], results
    (step,) = (path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"stopped on request at step {step} of 6" in results[0][1]
    assert "stopped on request" not in results[1][1]
    assert [number for _, number, _ in losses(tmp_path / "run")] == list(range(1, int(step) + 1))
    assert int(step) < STEPS


@pytest.mark.thorough
def test_a_process_that_hangs_is_named_and_all_leave(tmp_path):
    config = write_config(tmp_path, **CHANGES)
    results = together(config, 2, "--distributed.timeout", "8", faults=["", "step:step=3:hang"])
    assert codes(results) == [7, 7], results
    assert results[0][1].count("error: process 1 (") == 1
    assert "hangs: it did nothing for" in results[0][1]
    assert said(results[1][1]) == []


@pytest.mark.thorough
def test_the_death_of_process_0_is_named_by_the_other(tmp_path):
    config = write_config(tmp_path, **CHANGES)
    (first, _), (second, output) = together(config, 2, faults=["step:step=3:kill"])
    assert (first, second) == (-9, 7)
    assert output.count("error: process 0 (") == 1
    assert "the same command resumes" in output


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--data.source", "/no/such/file"], 3, ["/no/such/file"]),
        (["--training.batch-size", "9"], 2, ["batch_size) = 9", "2 devices", "8 or 10"]),
    ],
)
def test_an_error_ends_all_with_its_code_and_is_said_once(tmp_path, flags, code, words):
    config = write_config(tmp_path, **CHANGES)
    results = together(config, 2, *flags)
    assert codes(results) == [code, code], results
    assert all(word in results[0][1] for word in words), results
    assert sum(output.count("error: ") for _, output in results) == 1, results


def test_processes_with_other_settings_are_refused_by_name(tmp_path):
    config = write_config(tmp_path, **CHANGES)
    results = together(config, 2, last=["--run.seed", "5", "--data.workers", "1"])
    assert codes(results) == [2, 2], results
    message = "".join(output for _, output in results)
    assert "run.seed: process 0 has 1337, process 1 has 5" in message
    assert "workers" not in message


def test_a_port_that_is_taken_is_named_before_jax_dies_of_it():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(UsageError, match="cannot listen on that port"):
            check_port_is_free(f"localhost:{taken.getsockname()[1]}")
    check_port_is_free(f"localhost:{free_port()}")


def find(environment, installed=(), **settings):
    return find_cluster(
        DistributedConfig(**settings), environment, installed=lambda name: name in installed
    )


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "installed", "launcher"),
    [
        ({}, (), None),
        (SLURM, (), "SLURM"),
        ({**SLURM, "SLURM_NTASKS": "1"}, (), None),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, (), None),  # the batch script itself
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, (), None),  # a shell of salloc
        ({"OMPI_COMM_WORLD_SIZE": "2"}, (), "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, (), None),
        ({"PMI_SIZE": "2"}, ("mpi4py",), "MPI"),
        ({}, ("libtpu",), "the TPU's metadata"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, ("libtpu",), None),
        ({"JAX_PLATFORMS": "cpu"}, ("libtpu",), None),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},
            ("kubernetes",),
            "Kubernetes",
        ),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, (), None),
    ],
)
def test_a_cluster_is_looked_for_only_on_evidence(environment, installed, launcher):
    cluster = find(environment, installed)
    assert (cluster and cluster.launcher) == launcher


def test_settings_count_more_than_the_launcher():
    given = {"coordinator": "n1:1234", "num_processes": 3, "process_id": 2}
    cluster = find(SLURM, **given)
    assert cluster.arguments == {
        "coordinator_address": "n1:1234",
        "num_processes": 3,
        "process_id": 2,
        "cluster_detection_method": "deactivate",
    }
    assert find(SLURM, num_processes=1) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"coordinator": "n1:1234"}, ["num_processes = 0", "process_id = -1"]),
        ({"num_processes": 2, "process_id": 0}, ["coordinator = ''"]),
        ({"coordinator": "n1", "num_processes": 2, "process_id": 0}, ["HOST:PORT", "'n1'"]),
        ({"coordinator": "n1:1", "num_processes": 2, "process_id": 2}, ["0 to 1"]),
    ],
)
def test_settings_given_by_half_are_refused_with_what_was_found(settings, words):
    with pytest.raises(UsageError) as error:
        find({}, **settings)
    assert all(word in str(error.value) for word in words), error.value


def test_a_launcher_that_needs_a_package_says_so():
    with pytest.raises(UsageError, match=r"package mpi4py.*not installed"):
        find({"PMI_SIZE": "2"})


def test_a_run_of_one_decides_for_itself_without_a_store():
    hosts = Hosts()
    assert hosts.alone and hosts.is_first
    assert hosts.decide("anything", lambda: {"a": (1,)}) == {"a": (1,)}
    with pytest.raises(ZeroDivisionError), hosts.collective():
        raise ZeroDivisionError


def test_a_process_that_failed_first_stays_to_say_why(monkeypatch):
    """Its own watcher reads the failure too, and must not take it for another's."""

    class Store(dict):
        def key_value_set(self, name, value, allow_overwrite=False):
            self[name] = value
            time.sleep(0.05)  # longer than the watcher rests

        def key_value_try_get(self, name):
            if name not in self:
                raise jax.errors.JaxRuntimeError("not found")
            return self[name]

        def key_value_dir_get(self, name):
            return [item for item in self.items() if item[0].startswith(name)]

    left = []
    monkeypatch.setattr("llm.run.hosts.BEAT_SECONDS", 0.01)
    monkeypatch.setattr(os, "_exit", left.append)
    hosts = Hosts(1, 2, Store({"llm/name/0": '"process 0"'}))
    hosts._watcher.start()
    hosts.fail(UsageError("the only one who knows"))
    assert left == []


def sign(age=0.0, idle=0.0, marks=5, suspicious=False):
    return age, Sign(9, idle, marks, "step 5", suspicious)


@pytest.mark.parametrize(
    ("signs", "lost"),
    [
        ([sign(), sign()], None),
        ([sign(), sign(age=31)], "no sign of life for 31 s"),
        ([sign(), sign(age=8)], None),
        ([sign(suspicious=True), sign(age=8)], "no sign of life for 8 s"),
        ([sign(idle=50, marks=6), sign(idle=40)], "did nothing for 40 s, after step 5"),
        ([sign(idle=50, marks=6), sign(idle=2)], None),  # slow, but it moves
        ([sign(idle=50), sign(idle=40)], None),  # side by side: they compile
    ],
)
def test_a_process_is_lost_when_it_is_silent_or_stays_behind(signs, lost):
    found = find_lost(dict(enumerate(signs)), timeout=30.0, patience=6.0)
    assert (found is None) if lost is None else (found[0] == 1 and lost in found[2])


def test_rows_by_number_are_those_of_the_whole_batch(one):
    class Tokens:
        def __len__(self):
            return 500

        def windows(self, starts, length):
            return starts[:, None] + np.arange(length)

    def batches(rows):
        return TrainingBatches(RingWindows(Tokens(), 8), batch_size=6, seed=1, rows=rows)

    rows = np.array([1, 4, 5])
    np.testing.assert_array_equal(batches(rows)[3].tokens, batches(None)[3].tokens[rows])


@pytest.mark.thorough
def test_hosts_hear_of_no_place_until_the_step_was_compiled_by_all(tmp_path, monkeypatch):
    """Else one that compiles a little faster would find the others hanging."""
    places = []
    monkeypatch.setattr(Hosts, "mark", lambda self, place: places.append(place))
    settings = ("--training.steps=5", "--training.eval-every=0", "--checkpoint.every=0")
    assert train(write_config(tmp_path), *settings) == 0
    assert [one for one in places if "," not in one] == ["step 2", "step 3", "step 4"]


@pytest.mark.thorough
def test_two_processes_read_the_windows_of_a_mixture_that_one_reads(tmp_path):
    tables = []
    for name, weight in (("one", 3), ("other", 1)):
        (tmp_path / f"{name}.txt").write_text(f"{name} red deer ran to the door. " * 60)
        source = str(tmp_path / f"{name}.txt")
        tables.append({"name": name, "source": source, "weight": float(weight)})
    config = write_config(tmp_path, **CHANGES, data={"mixture": tables})
    settings = tomllib.loads(config.read_text())
    del settings["data"]["source"]
    config.write_text(tomli_w.dumps(settings))
    results = together(config, 2, "--run.dir", str(tmp_path / "two"))
    assert codes(results) == [0, 0], results
    assert run_process(config, "--run.dir", str(tmp_path / "one"))[0] == 0
    same_losses(tmp_path / "two", tmp_path / "one")
