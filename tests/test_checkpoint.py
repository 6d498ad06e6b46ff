"""A checkpoint counts only when it is whole: every byte is checked, nothing good is lost."""

import collections
import errno
import hashlib
import json
import math
import os
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import identity_of, make_strange

from llm.config import MeshConfig
from llm.errors import CheckpointError, UsageError
from llm.model.sharding import make_mesh, sharding_of
from llm.run.arrays import describe_file, element_sums, identity, own_pieces
from llm.run.checkpoint import (
    Checkpoints,
    DamageError,
    read_receipt,
    read_step,
    restore,
    saved_steps,
    verify_files,
)
from llm.run.hosts import Hosts


def groups(seed=0):
    random = np.random.default_rng(seed)
    return {
        "params": {f"w{i}": jnp.asarray(random.normal(size=(8, 4)), jnp.float32) for i in range(3)},
        "training": {"step": jnp.int32(seed), "moment": jnp.ones((8, 4))},
    }


def receipt():
    return {"tokens": [[1, 2]], "logprobs": [[-1.0]], "tokenizer_sha256": "t"}


def save(checkpoints, step):
    checkpoints.save(step, groups(step), receipt)
    checkpoints.wait()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(root, keep=2)
    checkpoints.clean()
    save(checkpoints, 5)
    checkpoints.close()
    return root / "5"


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "5")
    return tmp_path / "5"


def abstract(arrays, mesh, axes):
    sharding = sharding_of(mesh, axes)
    return {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for n, a in arrays.items()}


def opened(groups_=("params",)):
    """What whoever opens a model asks for."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return {group: abstract(groups(5)[group], mesh, ()) for group in groups_}


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_a_checkpoint_opens_on_another_mesh_bit_for_bit(saved, fsdp):
    mesh = make_mesh(MeshConfig(data=1, fsdp=fsdp), jax.devices()[:fsdp])
    params = groups(5)["params"]
    wanted = {"params": abstract(params, mesh, ("embed", None))}
    restored = read_step(saved, wanted).groups["params"]
    assert restored["w0"].addressable_shards[0].data.shape == (8 // fsdp, 4)
    for name, array in params.items():
        np.testing.assert_array_equal(restored[name], array)
    assert identity_of(restored) == read_receipt(saved)["params_sha256"]


def test_a_byte_flipped_in_any_file_is_found(copy):
    verify_files(copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    names = [str(path.relative_to(copy)) for path in files]
    assert {name.split("/")[0] for name in names} == {
        "manifest.json", "params", "receipt.json", "training"
    }  # fmt: skip
    for path in files:
        content = path.read_bytes()
        for place in {*range(0, len(content), 7), len(content) - 1}:
            flipped = bytearray(content)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError):
                verify_files(copy)
        path.write_bytes(content)
    verify_files(copy)


def test_a_file_truncated_or_missing_is_found_and_named(copy):
    for path in sorted(path for path in copy.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if content:
            path.write_bytes(content[:-1])
            with pytest.raises(CheckpointError, match=path.name):
                verify_files(copy)
        path.unlink()
        with pytest.raises(CheckpointError, match=path.name):
            verify_files(copy)
        path.write_bytes(content)


@pytest.mark.parametrize("stray", [".DS_Store", ".nfs000000000f3e2a", "manifest.json~", "0.1", "7"])
def test_a_file_that_the_manifest_does_not_list_is_nobodys_damage(copy, stray):
    """An indexer's file, what NFS leaves of an open file, an editor's backup; in every folder."""
    for folder in [copy.parent, *(path for path in [copy, *copy.rglob("*")] if path.is_dir())]:
        (folder / stray).write_text("x")
    verify_files(copy)
    assert read_step(copy, opened(("params", "training"))).step == 5
    assert restore(copy.parent, opened(), "set aside", say=pytest.fail).step == 5
    assert saved_steps(copy.parent) == [5] and (copy.parent / stray).exists()


def write_manifest(folder, groups_):
    """A manifest that agrees with itself, as somebody can write who gives a run."""
    sha256 = hashlib.sha256(json.dumps(groups_, sort_keys=True).encode()).hexdigest()
    manifest = {"schema": 3, "groups": groups_, "sha256": sha256}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "loop", "huge"])
@pytest.mark.parametrize(
    "part",
    ["manifest.json", "receipt.json", "params/w0/.zarray", "params/w1/0.0", "training/step/0"],
)
def test_a_part_that_is_not_a_file_is_damage_and_is_not_waited_for(copy, part, kind):
    make_strange(kind, copy / part)
    wanted = opened(("params", "training"))
    for look in (lambda: verify_files(copy), lambda: read_step(copy, wanted)):
        with pytest.raises(DamageError, match=re.escape(str(copy / part))):
            look()


@pytest.mark.parametrize(
    "name",
    ["/dev/zero", "params/../../secret", "../5/receipt.json", "params/w0/\0", "params/w0/x/y"],
)
def test_a_manifest_that_names_what_lies_elsewhere_is_refused(copy, name):
    listed = json.loads((copy / "manifest.json").read_text())["groups"]
    listed["params"][name] = {"bytes": 1, "sha256": ""}
    write_manifest(copy, listed)
    with pytest.raises(DamageError, match=r"manifest.json is not the manifest that was saved"):
        verify_files(copy)


def test_an_array_whose_pieces_are_listed_in_another_group_is_not_read(copy):
    listed = json.loads((copy / "manifest.json").read_text())["groups"]
    for piece in ("0.0", ".zarray"):
        listed["params"][f"training/moment/{piece}"] = listed["training"][
            f"training/moment/{piece}"
        ]
    write_manifest(copy, listed)
    make_strange("pipe", copy / "params" / "moment")
    with pytest.raises(CheckpointError, match=r"moment/0.0 is not what was saved"):
        read_step(copy, opened())


@pytest.mark.parametrize(
    "content", ["[" * 10_000, "[" * 900 + "]" * 900, "null", '{"schema": 3}', "9" * 5000, "\0" * 9]
)
@pytest.mark.parametrize(
    ("name", "look"), [("manifest.json", verify_files), ("receipt.json", read_receipt)]
)
def test_json_that_is_not_what_was_saved_is_damage(copy, name, look, content):
    (copy / name).write_text(content)
    with pytest.raises(DamageError, match=f"{name} is"):
        look(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"chunks": [4, 4]},  # tensorstore would look for files that are not listed
        {"chunks": [8, 1 << 40]},
        {"shape": [1 << 40, 1 << 20], "chunks": [1, 1]},
        {"dimension_separator": "/"},
        {"compressor": {"id": "zlib", "level": 1}},
        {"attributes": [*range(20_000)]},
    ],
)
def test_an_array_of_other_pieces_than_are_listed_is_not_read(copy, change):
    """A forged description, with a manifest that agrees."""
    described = copy / "params" / "w0" / ".zarray"
    described.write_text(json.dumps(json.loads(described.read_text()) | change))
    listed = json.loads((copy / "manifest.json").read_text())["groups"]
    listed["params"]["params/w0/.zarray"] = describe_file(described)
    write_manifest(copy, listed)
    os.mkfifo(copy / "params" / "w0" / "0.1")
    with pytest.raises(CheckpointError, match="cannot be read: "):
        read_step(copy, opened())


def test_a_flipped_byte_is_named_or_changes_nothing_that_is_read(copy):
    """Parameters are verified as they are placed, without a pass over their files."""
    files = [path for path in sorted((copy / "params").rglob("*")) if path.is_file()]
    assert {"0.0", ".zarray"} == {path.name for path in files}
    for path in files:
        content, found = path.read_bytes(), 0
        for place in range(0, len(content), 11):
            flipped = bytearray(content)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            try:
                read = read_step(copy, opened()).groups["params"]
            except DamageError as error:
                assert f"{path.relative_to(copy)} has changed" in str(error)
                found += 1
                continue
            for name, array in groups(5)["params"].items():
                np.testing.assert_array_equal(read[name], array)
        path.write_bytes(content)
        assert found or path.name != "0.0"


def test_a_model_opens_without_a_byte_of_the_optimizer(copy):
    shutil.rmtree(copy / "training")
    restored = read_step(copy, opened())
    np.testing.assert_array_equal(restored.groups["params"]["w0"], groups(5)["params"]["w0"])
    with pytest.raises(CheckpointError, match=r"training/\S+ is missing"):
        verify_files(copy)
    with pytest.raises(CheckpointError, match=r"training/\S+ is missing"):
        read_step(copy, opened(("params", "training")))


def test_who_trains_sets_a_bad_step_aside_and_who_reads_leaves_it(copy):
    root = copy.parent
    shutil.copytree(copy, root / "7")
    (root / "7" / "params" / "w0" / "0.0").write_bytes(b"short")
    with pytest.warns(UserWarning, match="step 7 is passed over: .*expected .* bytes, found 5"):
        assert restore(root, opened(), "pass over").step == 5
    assert saved_steps(root) == [5, 7]
    with pytest.raises(CheckpointError, match=r"step 7 cannot be trusted"):
        restore(root, opened(), "pass over", step=7)
    said = []
    assert restore(root, opened(), "set aside", say=said.append).step == 5
    assert saved_steps(root) == [5] and "set aside as" in said[0]
    (root / "5" / "receipt.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint can be trusted.*5.damaged"):
        restore(root, opened(), "set aside", say=said.append)


@pytest.mark.parametrize("schema", [1, 2])
def test_a_checkpoint_of_an_earlier_version_is_named_and_left_alone(copy, schema):
    (copy / "manifest.json").write_text(json.dumps({"schema": schema, "sha256": ""}))
    with pytest.raises(UsageError, match="saved by an earlier version"):
        restore(copy.parent, opened(), "set aside")
    assert saved_steps(copy.parent) == [5]


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}])
def test_the_hash_of_the_parameters_does_not_depend_on_how_they_are_cut(axes):
    """By the shards that several processes would hold, in whatever order they are counted."""
    count = math.prod(axes.values())
    mesh = make_mesh(MeshConfig(**{"data": 1, **axes}), jax.devices()[:count])
    random = np.random.default_rng(0)
    arrays = {
        "matrix": random.normal(size=(16, 24)).astype("f4"),
        "vector": random.normal(size=(8,)).astype("f4"),
        "scalar": np.float32(3),
        "experts": random.normal(size=(2, 8, 12)).astype("f4"),
    }
    sums = []
    axes_of = {"matrix": ("embed", "mlp"), "vector": ("embed",), "experts": (None, "embed", "mlp")}
    for name, array in arrays.items():
        placed = jax.device_put(array, sharding_of(mesh, axes_of.get(name, ())))
        sums += reversed(element_sums(own_pieces({name: placed})))
    assert identity(sums) == identity_of(arrays)


def test_the_hash_of_the_parameters_tells_small_changes():
    array = np.random.default_rng(0).normal(size=(32, 16)).astype("f4")
    array[0, :4] = 1.0
    changed = [array.copy() for _ in range(6)]
    changed[0][3, 4] = -changed[0][3, 4]
    changed[1][0, [0, 1]] = -1.0  # two signs, which a plain sum would not see
    changed[2][[4, 5]] = changed[2][[5, 4]]
    changed[3][:, [4, 5]] = changed[3][:, [5, 4]]
    changed[4] = array.reshape(16, 32)
    changed[5].view(np.uint32)[9, 9] ^= 1
    hashes = {identity_of({"w": one}) for one in [array, *changed]}
    assert len(hashes) == 7
    assert identity_of({"v": array}) not in hashes


class Store:
    """The key-value store of JAX's coordination service, for two processes in one."""

    def __init__(self):
        self.said, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            self.said[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, _milliseconds):
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.said, timeout=60)
            return self.said[key]

    def key_value_delete(self, key):
        del self.said[key]


def half(array, process):
    """An array spread over two processes, as one of them sees it."""
    rows = slice(4 * process, 4 * process + 4)
    shard = SimpleNamespace(replica_id=0, index=(rows, slice(None)), data=array[rows])
    copy = SimpleNamespace(replica_id=1, index=(slice(0, 4), slice(None)), data=array[:4])
    return SimpleNamespace(
        is_fully_addressable=False, addressable_shards=[shard, copy], shape=array.shape,
        nbytes=array.nbytes,
    )  # fmt: skip


def test_each_process_hashes_what_it_writes_once_and_no_other_file(tmp_path, monkeypatch):
    whole = {"params": groups(3)["params"], "training": {"moment": jnp.ones((8, 4))}}
    hashed, digest = collections.defaultdict(list), hashlib.file_digest

    def counted(file, name):
        hashed[threading.get_ident()].append(Path(file.name).relative_to(tmp_path / "3.partial"))
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    store, processes = Store(), []
    for index in range(2):
        process = Checkpoints(tmp_path, keep=1, hosts=Hosts(index, 2, store))
        mine = {g: {n: half(a, index) for n, a in whole[g].items()} for g in whole}
        process.save(3, mine, receipt)
        processes.append(process._writer)
    for process in processes:
        process.join()
    monkeypatch.undo()
    files = json.loads((tmp_path / "3" / "manifest.json").read_text())["groups"]
    names = {name for group in files.values() for name in group}
    first = {name for name in names if name.endswith(("/0.0", "/.zarray", "receipt.json"))}
    for process, own in zip(processes, (first, names - first), strict=True):
        assert sorted(map(str, hashed[process.ident])) == sorted(own) and own
    assert read_receipt(tmp_path / "3")["params_sha256"] == identity_of(whole["params"])
    restored = read_step(tmp_path / "3", opened()).groups["params"]
    for name, array in whole["params"].items():
        np.testing.assert_array_equal(restored[name], array)
    assert not [key for key in store.said if "written" in key]


def test_arrays_of_another_model_are_refused_by_name(saved):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    wanted = abstract(groups(5)["params"], mesh, (None, None))
    wanted["w1"] = jax.ShapeDtypeStruct((8, 5), jnp.float32, sharding=wanted["w1"].sharding)
    shapes = r"w1 has shape \(8, 4\) of float32, expected \(8, 5\) of float32"
    with pytest.raises(CheckpointError, match=shapes):
        read_step(saved, {"params": wanted})
    assert saved.exists()


def test_the_best_stays_until_a_better_one_is_on_disk(tmp_path):
    """An evaluation names the next best while an older step is still being saved."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.clean()
    save(checkpoints, 1)
    checkpoints.best = 1
    checkpoints.best = 3
    save(checkpoints, 2)
    assert saved_steps(tmp_path) == [1, 2]
    save(checkpoints, 3)
    save(checkpoints, 4)
    assert saved_steps(tmp_path) == [3, 4]
    checkpoints.close()


def test_the_newest_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.clean()
    for step in (1, 2, 10):
        if step == 2:
            checkpoints.best = 1
        save(checkpoints, step)
    assert saved_steps(tmp_path) == [1, 2, 10]
    save(checkpoints, 11)
    assert saved_steps(tmp_path) == [1, 10, 11]
    checkpoints.best = None
    save(checkpoints, 12)
    assert saved_steps(tmp_path) == [11, 12]
    checkpoints.close()


def test_a_save_is_a_copy_that_the_next_steps_donation_cannot_reach(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.clean()
    state = groups(7)
    expected = identity_of({n: np.array(a) for n, a in state["params"].items()})
    checkpoints.save(7, state, receipt)
    overwrite = jax.jit(lambda params: jax.tree.map(lambda a: a * 0 - 1, params), donate_argnums=0)
    for _ in range(3):
        state["params"] = overwrite(state["params"])
    checkpoints.wait()
    assert read_receipt(tmp_path / "7")["params_sha256"] == expected
    checkpoints.close()


@pytest.mark.parametrize(
    "place", ["checkpoint.after_write", "checkpoint.before_manifest", "checkpoint.before_commit"]
)
def test_a_failed_background_save_is_noticed_and_leaves_the_steps_before_it(
    tmp_path, monkeypatch, place
):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.clean()
    save(checkpoints, 1)
    monkeypatch.setenv("LLM_FAULT", f"{place}:raise")
    checkpoints.save(2, groups(2), receipt)
    checkpoints._writer.join()
    with pytest.raises(CheckpointError, match="step 2 could not be saved"):
        checkpoints.check_for_errors()
    monkeypatch.delenv("LLM_FAULT")
    verify_files(tmp_path / "1")
    assert saved_steps(tmp_path) == [1]
    save(checkpoints, 3)
    assert saved_steps(tmp_path) == [3]
    checkpoints.close()


def test_a_full_disk_says_what_is_needed_and_what_there_is(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.clean()
    save(checkpoints, 1)
    monkeypatch.setenv("LLM_FAULT", "checkpoint.before_manifest:enospc")
    checkpoints.save(2, groups(2), receipt)
    with pytest.raises(CheckpointError, match=r"it needs .*\(\d+ bytes\), .* are free"):
        checkpoints.wait()
    verify_files(tmp_path / "1")
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    checkpoints.close()


def test_what_a_dead_process_left_is_removed(saved, tmp_path):
    for name in ("7.partial", "3.deleting", "5"):
        shutil.copytree(saved, tmp_path / name)
    Checkpoints(tmp_path, keep=1).clean()
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


def test_a_file_that_nfs_keeps_ends_no_run(tmp_path, monkeypatch):
    """Where a folder is removed, NFS leaves a file for each one that somebody has open."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.clean()
    for name in ("1.deleting", "2.partial", "3.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".nfs0001").write_text("open")
    remove = shutil.rmtree

    def leaving(path, **options):
        if not (path / ".nfs0001").exists():
            remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", leaving)
    for step in (1, 2, 3):
        save(checkpoints, step)
    checkpoints.close()
    monkeypatch.undo()
    assert saved_steps(tmp_path)[-1] == 3
    verify_files(tmp_path / "3")
    checkpoints.clean()
    assert not list(tmp_path.glob("*.deleting"))


def test_disk_errors_are_told_from_others():
    from llm.files import is_disk_full

    assert is_disk_full(OSError(errno.ENOSPC, "x"))
    assert is_disk_full(ValueError("Error writing: No space left on device [tensorstore]"))
    assert not is_disk_full(OSError(errno.EACCES, "x"))


def test_the_receipt_is_strict_json(saved):
    json.loads((saved / "receipt.json").read_text(), parse_constant=pytest.fail)


def test_every_file_and_folder_is_flushed_before_a_step_counts(tmp_path, monkeypatch):
    """What the system was asked, in order: a rename that comes first may outlive its files."""
    done = []
    fsync, rename = os.fsync, Path.rename

    def recording_fsync(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def recording_rename(self, target):
        done.append((str(self), str(target)))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.clean()
    save(checkpoints, 3)
    checkpoints.close()
    partial, step = tmp_path / "3.partial", tmp_path / "3"
    commit = done.index((str(partial), str(step)))
    inside = [partial, *(partial / path.relative_to(step) for path in step.rglob("*"))]
    assert {str(path) for path in inside} <= set(done[:commit])
    assert str(tmp_path) in done[commit:]


def test_the_writer_waits_for_no_lock(tmp_path):
    """Tensorstore would await it by a clock that may jump, and some file systems have none."""
    from llm.run.arrays import Piece, write_pieces

    lock = tmp_path / "params" / "w" / "0.0.__lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    write_pieces(tmp_path, "params", [Piece("w", (4, 4), (0, 0), np.ones((4, 4), np.float32))])
    assert lock.exists()
