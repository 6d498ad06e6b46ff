"""What a step needs, by compiler and by arithmetic, against closed forms; and what `plan` says."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from llm.commands import run_command
from llm.commands.plan import find_vocab_size, main
from llm.config import Config, load_config, to_toml, validate
from llm.errors import UsageError
from llm.model.flops import PEAKS, flops_per_token, listed_name, parameter_count, peak_flops
from llm.model.gpt import ModelSpec, abstract_params
from llm.model.sharding import MESH_AXES, make_mesh
from llm.planning import search as search_module
from llm.planning import targets
from llm.planning.collectives import Collective
from llm.planning.devices import GIB, SHEETS, find_kind, sheet_of
from llm.planning.estimate import Arithmetic
from llm.planning.hlo import computations, cycles, runs
from llm.planning.plan import available_memory, plan_step, program_text, refused_memory
from llm.planning.roofline import link_seconds
from llm.planning.search import find_candidates, meshes, search
from llm.text.batches import Batch
from llm.training.optimizer import make_optimizer
from llm.training.state import abstract_state
from llm.training.step import make_train_step

ROOT = Path(__file__).resolve().parent.parent
LLAMA = ROOT / "configs" / "llama3_8b.toml"
B, T, L, D, F, V = 8, 16, 3, 32, 128, 320
SIZES = {
    "model": {"n_layer": L, "n_head": 4, "d_model": D, "d_ff": F, "context_length": T,
              "norm": "rmsnorm", "bias": False, "positions": "rotary", "tie_embeddings": False},
    "training": {"batch_size": B, "scan_layers": True, "steps": 100},
}  # fmt: skip
H100 = "NVIDIA H100"


def config_of(**sections) -> Config:
    merged = {
        name: {**SIZES.get(name, {}), **sections.get(name, {})} for name in {*SIZES, *sections}
    }
    return validate(merged, "test").resolved()


def planned(target=None, fraction=0.75, **sections):
    return plan_step(config_of(**sections), 257, target or targets.simulated(H100, 8), fraction)


@pytest.fixture(scope="module")
def on_one():
    """With the attention that the CPU in the GPU's place compiles."""
    return planned(targets.simulated(H100, 1), training={"attention": "plain"})


@pytest.fixture(scope="module")
def sharded():
    return planned(mesh={"data": 1, "fsdp": 8})


def executed(plan):
    return plan["flops"]["executed_per_device_and_step"]


def test_flops_are_those_counted_by_hand(on_one):
    """Forward, and twice that backward; every key, without a kernel; the padded head."""
    blocks = L * (4 * D * D + 2 * D * F)
    attention = 12 * L * B * T * T * D
    assert executed(on_one) == 6 * B * T * (blocks + D * V) + attention
    spec = ModelSpec(config_of().model, 257)
    model = 6 * B * T * (blocks + D * 257) + attention / 2
    assert on_one["flops"]["model_per_step"] == model == B * T * flops_per_token(spec)
    assert on_one["parameters"] == parameter_count(spec)
    assert on_one["tokens_per_step"] == B * T


def matrix_products(hlo):
    """FLOPs of a program's dots, each as often as it runs: 2 x result x length of the sums."""
    program = computations(hlo)
    total = 0
    for name, times in runs(program).items():
        sizes = {}
        for line in program[name]:
            if made := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]", line):
                sizes[made[1]] = [int(size) for size in made[2].split(",") if size]
            if dot := re.search(r" dot\(%?([\w.\-]+), .*lhs_contracting_dims=\{(\d+)\}", line):
                total += times * 2 * math.prod(sizes[made[1]]) * sizes[dot[1]][int(dot[2])]
    return total


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_executed_flops_are_those_of_the_compiled_program(remat):
    config = config_of(training={"remat": remat})
    spec, mesh = ModelSpec(config.model, 257), make_mesh(config.mesh, jax.devices()[:1])
    state = abstract_state(spec, make_optimizer(config.optimizer), mesh, stacked=True)
    step = make_train_step(spec, config.optimizer, config.training, mesh)
    lowered = step.lower(state, Batch(jax.ShapeDtypeStruct((B, T + 1), "int32")))
    one = Arithmetic(spec, config.optimizer, config.training, dict.fromkeys(MESH_AXES, 1))
    counted = matrix_products(lowered.compile().as_text())
    assert one.tokens * one.flops_per_token() == counted


@pytest.mark.thorough
def test_a_recomputed_block_costs_its_forward_pass_again(on_one):
    """But for its last product, which no gradient reads."""
    settings = {"remat": "block", "attention": "plain"}
    again = planned(targets.simulated(H100, 1), training=settings)
    blocks = L * (4 * D * D + D * F)
    extra = executed(again) - executed(on_one)
    assert extra == 2 * B * T * blocks + 4 * L * B * T * T * D


def test_a_gpu_that_is_not_here_computes_attention_by_its_kernel(on_one):
    """cuDNN's: two products forward and five backward, of half the keys; two more where a block is
    computed again, none where products are kept. The program's other FLOPs stay."""
    product = B * T * L * 2 * D * T / 2
    others = executed(on_one) - 12 * L * B * T * T * D
    for remat, products in (("none", 7), ("block", 9)):
        plan = planned(targets.simulated(H100, 1), training={"remat": remat})
        assert plan["attention"] == "cudnn"
        recomputed = 2 * B * T * L * (4 * D * D + D * F) if remat == "block" else 0
        assert executed(plan) == others + recomputed + products * product
    spec = ModelSpec(config_of().model, 257, "bfloat16", "cudnn")
    arithmetic = Arithmetic(spec, config_of().optimizer, config_of().training, {"data": 1})
    assert arithmetic.scores() == 0


def test_state_falls_as_one_over_the_devices_of_fsdp():
    """float32 weights, twice that for adamw; the gains of norms lie whole on each."""
    spec = ModelSpec(config_of().model, 257)
    vectors = (2 * L + 1) * D
    matrices = sum(math.prod(leaf.shape) for leaf in abstract_params(spec).values()) - vectors
    for shares in (1, 2, 4, 8):
        sizes = {"data": 8 // shares, "fsdp": shares, "tensor": 1, "context": 1}
        state = Arithmetic(spec, config_of().optimizer, config_of().training, sizes).state
        assert state.weights == 4 * (matrices // shares + vectors)
        assert state.optimizer == 2 * state.weights + 4


def state_of(memory):
    return sum(memory[f"{part}_bytes"] for part in ("weights", "optimizer", "other_state"))


@pytest.mark.thorough
def test_the_compiled_program_takes_the_state_and_a_batch(sharded):
    memory = sharded["memory"]
    arguments = memory["needed_bytes"] - memory["temporaries_bytes"]
    key, rows = 8, 4 * B // 8 * (T + 1)
    assert arguments == pytest.approx(state_of(memory) + key + rows, abs=600)
    assert memory["temporaries_from"] == "arithmetic"
    assert memory["available_bytes"] == 0.75 * 80 * GIB and memory["fits"]


def test_arithmetic_counts_what_the_policies_keep():
    """Inputs alone; with products; everything: in [R, T] of one device, bfloat16."""
    config = load_config(LLAMA).resolved()
    spec = ModelSpec(config.model, 100277, "bfloat16")
    kept = {}
    for remat in ("none", "dots", "block", "offload"):
        training = config.training.model_copy(update={"remat": remat})
        one = Arithmetic(spec, config.optimizer, training, {"data": 1, "fsdp": 8})
        kept[remat] = one.kept_per_layer()
    stream = 8192 * 4096 * 2
    assert kept["block"] == stream and kept["offload"] == 0
    assert kept["dots"] == 3 * stream + 8192 * 2 * (6144 + 2 * 14336)
    with_kernel = dataclasses.replace(spec, attention="splash")
    dots = config.training.model_copy(update={"remat": "dots"})
    kernel = Arithmetic(with_kernel, config.optimizer, dots, {"data": 1, "fsdp": 8})
    # The mixture of each query's values, and a float32 for each query and head.
    assert kernel.kept_per_layer() == kept["dots"] + stream + 4 * 8192 * 32
    assert kept["none"] > kept["dots"] + 32 * 8192 * 8192 * 6


MOE = ROOT / "configs" / "moe_8x124m.toml"
CHUNK, AUTO = {"loss_chunk": 2048}, {"loss_chunk": 0}


@pytest.mark.parametrize(
    ("path", "sizes", "settings", "temporaries", "tera"),
    [
        (LLAMA, {"fsdp": 8}, {"micro_batch_size": 8, "remat": "block"} | CHUNK, 13.24, 35176),
        (LLAMA, {"fsdp": 64}, {"micro_batch_size": 64, "remat": "block"} | CHUNK, 7.28, 4397),
        (LLAMA, {"data": 4, "fsdp": 16}, {"micro_batch_size": 64, "remat": "dots"} | CHUNK, 30.78,
         3579),
        (LLAMA, {"fsdp": 256}, {"micro_batch_size": 512, "remat": "block"} | CHUNK, 9.24, 1099),
        (MOE, {"expert": 8}, AUTO, 17.03, 84.1),
    ],
    ids=str,
)  # fmt: skip
def test_arithmetic_is_near_what_the_tpu_compiler_counts(path, sizes, settings, temporaries, tera):
    """GiB of temporaries and TFLOPs of a device as libtpu 0.0.52's programs have them, for v5p and
    v6e, with splash. A mixture too, which plain counts of a dense MLP miss by far."""
    config = load_config(path).resolved()
    vocab = {LLAMA: 100277, MOE: 50257}[path]
    training = config.training.model_copy(update=settings)
    spec = ModelSpec(config.model, vocab, "bfloat16", "splash")
    mesh = dict.fromkeys(MESH_AXES, 1) | sizes
    one = Arithmetic(spec, config.optimizer, training, mesh)
    assert one.temporaries() / GIB == pytest.approx(temporaries, rel=0.15)
    assert one.flops_per_token() * one.tokens / 1e12 == pytest.approx(tera, rel=0.05)


def test_experts_are_gathered():
    """Over expert 8: weights of the experts in bfloat16, forward, again and gradients."""
    config = load_config(MOE).resolved()
    spec = ModelSpec(config.model, 50257, "bfloat16", "splash")
    mesh = dict.fromkeys(MESH_AXES, 1) | {"expert": 8}
    experts, others = 12 * 8 * 3 * 768 * 2048, 519986688 - 12 * 8 * 3 * 768 * 2048
    training = config.training.model_copy(update={"micro_batch_size": 512})
    sent = Arithmetic(spec, config.optimizer, training, mesh).sent()
    expected = 6 * experts * 7 / 8 + 8 * others * 7 / 8
    assert sent["expert"] == pytest.approx(expected, rel=1e-3)
    assert sent["fsdp"] == sent["data"] == 0


def test_arithmetic_sends_what_each_axis_has_to():
    """In bfloat16 weights are gathered twice and gradients scattered; copies all-reduce float32."""
    config = load_config(LLAMA).resolved()
    spec = ModelSpec(config.model, 100277, "bfloat16")
    training = config.training.model_copy(update={"micro_batch_size": 512})

    def on(**sizes):
        mesh = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1, **sizes}
        return Arithmetic(spec, config.optimizer, training, mesh)

    numbers = on().state.weights / 4
    matrices = numbers - (2 * 32 + 1) * 4096
    assert on(fsdp=8).sent()["fsdp"] == pytest.approx(6 * matrices * 7 / 8, rel=1e-3)
    assert on(data=8).sent()["data"] == 8 * numbers * 7 / 8
    assert on(tensor=8).sent()["tensor"] == 32 * 12 * 512 * 8192 * 4096 * 2 * 7 / 8
    one_machine, eight = on(data=8).link_seconds(SHEETS[H100]), on(data=8, fsdp=8)
    assert one_machine == on(data=8).sent()["data"] / 450e9
    sent = eight.sent()
    assert eight.link_seconds(SHEETS[H100]) == sent["fsdp"] / 450e9 + sent["data"] / 50e9


HLO = """HloModule jit_step

%body (t: (s32[], f32[2,4])) -> (s32[], f32[2,4]) {
  %d = f32[1,8]{1,0} dot(%x, %w), backend_config={"window_config":{"estimated_cycles":"100"}}
  %u = f32[1,8]{1,0} add(%d, %d), backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
}

%never (t: (s32[], f32[2,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %j), direction=LT
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %e = f32[8,4]{1,0} copy(%x), backend_config={"window_config":{"estimated_cycles":"7"}}
  %l = (s32[], f32[8,4]{1,0}) while(%s), condition=%never, body=%body, backend_config={"known_trip_count":{"n":"6"}}
}
"""  # noqa: E501 (as compilers write it)


def test_cycles_count_as_often_as_their_loop_runs():
    """An estimate of 2^63 - 1 is none."""
    assert cycles(HLO) == 6 * 100 + 7


def test_links_take_what_the_best_algorithm_sends():
    gpu = SHEETS[H100]
    eight, strided = tuple(range(8)), tuple(range(0, 64, 8))
    gathered = Collective("all-gather", 800, 3, 8, "", eight)
    assert link_seconds(gathered, gpu, []) == 3 * 700 / 450e9
    assert link_seconds(Collective("all-reduce", 800, 1, 8, "", eight), gpu, []) == 1400 / 450e9
    # One of eight in each machine: its own network card; all of eight machines: eight cards.
    assert link_seconds(Collective("all-gather", 800, 1, 8, "", strided), gpu, []) == 700 / 50e9
    all_ = Collective("all-gather", 6400, 1, 64, "", tuple(range(64)))
    assert link_seconds(all_, gpu, []) == 6300 / 400e9
    tpu = SHEETS["TPU v5p"]
    cube = [types.SimpleNamespace(coords=(i // 16, i // 4 % 4, i % 4)) for i in range(64)]
    assert link_seconds(all_, tpu, cube) == 6300 / (6 * 90e9)
    ring = Collective("reduce-scatter", 400, 1, 4, "", (0, 1, 2, 3))
    assert link_seconds(ring, tpu, cube) == 300 / (2 * 90e9)


def test_the_longest_of_three_binds(sharded):
    config = load_config(LLAMA).resolved()
    spec, sizes = ModelSpec(config.model, 100277, "bfloat16"), dict.fromkeys(MESH_AXES, 1)
    one = Arithmetic(spec, config.optimizer, config.training, sizes, H100)
    bound = one.roofline(SHEETS[H100])
    assert bound["compute"] == one.tokens * one.flops_per_token() / 989e12
    assert bound["memory"] == one.traffic() / 3.35e12
    time = sharded["time"]
    three = {name: time[f"{name.rstrip('s')}_seconds"] for name in ("compute", "memory", "links")}
    assert time["roofline_seconds"] == max(three.values()) == three[time["binds"]] > 0


def test_mfu_and_days_follow_from_the_step(sharded):
    seconds = sharded["time"]["step_seconds"]
    work = B * T * flops_per_token(ModelSpec(config_of().model, 257))
    assert sharded["mfu"] == pytest.approx(work / (seconds * 8 * 989e12))
    assert sharded["days"] == pytest.approx(seconds * 100 / 86400)
    assert sharded["device_hours"] == pytest.approx(8 * 24 * sharded["days"])
    assert {row["kind"] for row in sharded["collectives"]} >= {"all-gather"}


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (43.99G) exceeds available HBM (15.75G).", 43.99),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
         "hbm. Used 20.11G of 15.75G hbm. Exceeded hbm capacity by 4.36G.", 20.11),
    ],
)  # fmt: skip
def test_a_program_that_the_compiler_refuses_needs_what_it_says(message, needed):
    memory, available = refused_memory(message)
    assert (memory, available) == (needed * GIB, 15.75 * GIB)
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
        refused_memory("INTERNAL: another error")


def test_a_program_that_the_compiler_refuses_does_not_fit(monkeypatch):
    """It has neither a time nor collectives; its FLOPs are arithmetic."""

    def refuses(self):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm."
        )

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuses)
    plan = planned()
    memory = plan["memory"]
    assert (memory["fits"], memory["spare_bytes"]) == (False, (15.75 - 20.0) * GIB)
    assert memory["temporaries_bytes"] is None and state_of(memory) > 0
    assert plan["collectives"] is plan["mfu"] is plan["time"]["step_seconds"] is None
    assert executed(plan) > 0


def test_a_search_sees_every_mesh_once():
    """As many as there are ways to put three factors 2 on the axes."""
    found = [tuple(sizes.values()) for sizes in meshes(8)]
    assert len(found) == len(set(found)) == math.comb(3 + len(MESH_AXES) - 1, 3)
    assert all(math.prod(sizes) == 8 for sizes in found)


def test_candidates_are_divisible_and_within_reach_of_the_memory():
    config, target = load_config(LLAMA).resolved(), targets.simulated(H100, 8)
    candidates = list(find_candidates(config, 100277, target, 0.75))
    limit = search_module.SLACK * available_memory(target, 0.75)
    assert len(candidates) > 20
    for one in candidates:
        sizes, training = one.config.mesh, one.config.training
        assert one.memory <= limit
        assert training.batch_size % training.micro_batch_size == 0
        assert training.micro_batch_size % (sizes.data * sizes.fsdp) == 0
        assert 8 % sizes.tensor == 0
    # 12 bytes a parameter, whole on each device, are more than there is.
    assert not any(one.config.mesh.data == 8 for one in candidates)


def test_a_search_ranks_what_fits_by_time_and_compiles_no_more_than_told(monkeypatch):
    asked = []

    def fake(config, vocab_size, target, fraction):
        asked.append(config)
        memory = {"fits": len(asked) != 1, "needed_bytes": 1.0}
        return {"memory": memory, "time": {"step_seconds": [1.0, 4.0, 3.0, 2.0][len(asked) - 1]}}

    monkeypatch.setattr(search_module, "plan_step", fake)
    told = []
    plans, considered = search(
        load_config(LLAMA).resolved(), 100277, targets.simulated(H100, 8), 0.75, 4,
        lambda number, total, candidate: told.append((number, total)),
    )  # fmt: skip
    assert len(asked) == 4 < considered
    assert told == [(n, 4) for n in (1, 2, 3, 4)]
    assert [plan["time"]["step_seconds"] for plan in plans] == [2.0, 3.0, 4.0, 1.0]
    assert not plans[-1]["memory"]["fits"]


def test_a_program_that_does_not_give_its_text_is_dumped():
    def train_step(x):
        return x @ x

    class Silent:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("UNIMPLEMENTED")

    lowered = jax.jit(train_step).lower(jax.ShapeDtypeStruct((8, 8), "float32"))
    assert " dot(" in program_text(lowered, Silent())


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A configuration file in an empty folder, which is where the command runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(to_toml(config_of(mesh={"data": 1, "fsdp": 8})))
    return tmp_path


def strict(text: str) -> dict:
    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_command_prints_one_strict_json_object_and_makes_nothing(written, capsys):
    command = ["tiny.toml", "--devices", "8", "--device", "h100", "--json"]
    assert run_command(main, command) == 0
    facts = strict(capsys.readouterr().out)
    assert facts["estimate"] is True and facts["memory"]["fits"] is True
    assert facts["mesh"] == {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1, "context": 1}
    assert [path.name for path in written.iterdir()] == ["tiny.toml"]


def test_what_does_not_fit_is_no_error_and_says_by_how_much(written, capsys):
    command = ["tiny.toml", "--devices", "8", "--device", "h100", "--memory-fraction", "1e-9"]
    assert run_command(main, command) == 0
    assert "no: does not fit, by" in capsys.readouterr().out
    assert run_command(main, [*command, "--json"]) == 0
    memory = strict(capsys.readouterr().out)["memory"]
    assert memory["fits"] is False and memory["spare_bytes"] < 0


def test_a_search_shows_its_ranking_and_the_best_plan(written, capsys, monkeypatch, sharded):
    monkeypatch.setattr(search_module, "plan_step", lambda *arguments: sharded)
    command = ["tiny.toml", "--devices", "8", "--device", "h100", "--search", "--tries", "2"]
    assert run_command(main, command) == 0
    said = capsys.readouterr()
    assert "2 compiled of" in said.out and "Bytes on one device" in said.out
    assert "compiling 2 of 2: " in said.err and "remat" in said.err
    assert run_command(main, [*command, "--json"]) == 0
    found = strict(capsys.readouterr().out)
    assert len(found["ranked"]) == 2 < found["considered"]
    assert found["ranked"][0]["mesh"]["fsdp"] == 8


def test_a_device_without_a_data_sheet_has_no_time(written, capsys):
    command = ["tiny.toml", "--device", "cpu", "--mesh.fsdp", "1"]
    assert run_command(main, [*command, "--json"]) == 0
    facts = strict(capsys.readouterr().out)
    assert (facts["mfu"], facts["memory"]["fits"], facts["compiled_for"]) == (None, None, "cpu")
    assert run_command(main, command) == 0
    assert "not known: no data sheet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--device h10", "no such device; did you mean h100"),
        ("--device h100 --devices 0", "--devices 0: expected a number greater than 0"),
        ("--devices 8", "of what? add --device"),
        ("--topology v5p:4x4x4 --device h100", "leave out --devices"),
        ("--device h100 --devices 3 --mesh.fsdp 3", "nearest that can: 6 or 9"),
        ("--device h100 --devices 8 --mesh.fsdp 3", "does not fit 8 devices"),
        ("--device h100 --devices 512", "this process has 8 CPU devices"),
        ("--device h100 --vocab-size 12", "has 257 tokens; leave it out"),
        ("--device h100 --tokenizer.kind characters", "give the number, as --vocab-size 65"),
        ("--device h100 --memory-fraction 1.5", "at most 1"),
        ("--device h100 --model.n-laye 3", "did you mean --model.n-layer"),
        ("--device cpu --search", "needs a device that has a data sheet"),
    ],
)
def test_what_cannot_be_planned_is_answered_in_a_sentence(words, said, written, capsys):
    assert run_command(main, ["tiny.toml", *words.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5q:4x4x4", "there is no TPU 'v5q'; did you mean v5"),
        ("v5p:4xfour", "'4xfour' is no shape; expected the chips along each side, such as v5p"),
        ("v5p", "such as v5p:4x4x4"),
        ("h100:8", "expected one of tpu7x, v2, v3, v4, v5e, v5p, v6e"),
    ],
)
def test_a_topology_that_does_not_exist_is_answered_with_the_nearest(name, said):
    with pytest.raises(UsageError) as raised:
        targets.topology(name)
    assert said in str(raised.value)


def test_a_missing_compiler_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install '\.\[plan\]'"):
        targets.prepare_environment("v5e:2x2", None, {})


def test_the_environment_can_still_be_prepared_when_the_targets_are_known():
    """JAX reads it when it is imported: nothing before may do that."""
    code = "import sys, llm.commands.plan, llm.planning.targets; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_devices_are_found_by_their_short_names():
    assert find_kind("H100") == H100 and find_kind("v5p") == "TPU v5p"
    assert find_kind("NVIDIA GeForce RTX 4090") == find_kind("rtx-4090")


def test_every_nvidia_gpu_with_a_sheet_has_a_compute_capability():
    sheets = [sheet for kind, sheet in SHEETS.items() if kind.startswith("NVIDIA")]
    assert all(float(sheet.capability) >= 8.0 for sheet in sheets)
    assert sheet_of("NVIDIA A100-SXM4-80GB").capability == "8.0"
    assert sheet_of("NVIDIA H100 80GB HBM3").capability == "9.0"
    assert sheet_of("TPU v5p").capability == "" and sheet_of("NVIDIA L400") is None


def test_every_sheet_has_a_peak_and_every_peak_a_sheet():
    assert all(peak_flops(kind) for kind in SHEETS)
    assert all(listed_name(kind, SHEETS) == kind for kind in PEAKS)


def test_vocabularies_are_known_without_a_corpus():
    import tiktoken

    from llm.text.tokenizer import _ENCODING_SIZES, ByteTokenizer

    assert set(_ENCODING_SIZES) <= set(tiktoken.list_encoding_names())
    assert find_vocab_size(config_of(), None) == ByteTokenizer().vocab_size
    trained = config_of(tokenizer={"kind": "bpe", "vocab_size": 300})
    assert (find_vocab_size(trained, None), find_vocab_size(trained, 290)) == (300, 290)
    assert find_vocab_size(config_of(tokenizer={"kind": "characters"}), 65) == 65


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu, extra 'plan'")
def test_a_slice_of_tpus_is_planned_by_their_own_compiler(monkeypatch):
    """And 8 billion parameters are refused by one chip, in seconds, with the compiler's figures."""
    environment = dict(os.environ)
    targets.prepare_environment("v5e:2x2", None, environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plan = planned(targets.topology("v5e:2x2"), mesh={"data": 1, "fsdp": 4})
    memory = plan["memory"]
    assert memory["temporaries_from"] == "compiler" and memory["fits"]
    assert memory["available_bytes"] == 16 * GIB
    assert plan["time"]["compiler_seconds"] > 0 and plan["time"]["link_seconds"] > 0
    assert {one["devices"] for one in plan["collectives"]} == {4}
    with pytest.raises(UsageError, match="made of hosts"):
        targets.topology("v5e:3x5")
    one_chip = load_config(LLAMA).resolved()
    refused = plan_step(one_chip, 100277, targets.topology("v5e:1x1"), 1.0)["memory"]
    assert refused["fits"] is False
    assert refused["needed_bytes"] > state_of(refused) > refused["available_bytes"] == 15.75 * GIB


def test_mesh_of_the_large_configurations_takes_any_number_of_devices():
    mesh = make_mesh(load_config(LLAMA).mesh, jax.devices())
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1, "context": 1}
