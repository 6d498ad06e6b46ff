"""What a step needs, by compiler and by arithmetic, against closed forms; and what `plan` says."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from llm.commands import run_command
from llm.commands.flags import parse
from llm.commands.plan import Options, find_vocab_size, main
from llm.config import Config, load_config, to_toml, validate
from llm.errors import UsageError
from llm.model.devices import GIB, SHEETS, compute_capability, find_kind
from llm.model.flops import flops_per_token, parameter_count
from llm.model.gpt import ModelSpec, abstract_params
from llm.model.sharding import MESH_AXES, make_mesh
from llm.planning import plan as plan_module
from llm.planning import search as search_module
from llm.planning import targets
from llm.planning.collectives import Collective
from llm.planning.cost import Cost, read_cost
from llm.planning.estimate import Arithmetic
from llm.planning.plan import available_memory, describe, plan_step, program_text
from llm.planning.roofline import link_seconds, roofline
from llm.planning.search import find_candidates, meshes, search

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


def test_flops_are_those_counted_by_hand_with_the_scan_multiplied(on_one):
    """Forward, and twice that backward; every key, without a kernel; the padded head."""
    blocks = L * (4 * D * D + 2 * D * F)
    attention = 12 * L * B * T * T * D
    assert on_one.cost.flops == 6 * B * T * (blocks + D * V) + attention
    facts = describe(on_one)
    model = 6 * B * T * (blocks + D * 257) + attention / 2
    assert facts["flops"]["model_per_step"] == model == B * T * flops_per_token(on_one.spec)
    assert facts["parameters"] == parameter_count(on_one.spec)
    assert facts["tokens_per_step"] == B * T


def test_a_recomputed_block_costs_its_forward_pass_again(on_one):
    """But for its last product, which no gradient reads."""
    settings = {"remat": "block", "attention": "plain"}
    again = planned(targets.simulated(H100, 1), training=settings)
    blocks = L * (4 * D * D + D * F)
    extra = again.cost.flops - on_one.cost.flops
    assert extra == 2 * B * T * blocks + 4 * L * B * T * T * D


def test_a_gpu_that_is_not_here_computes_attention_by_its_kernel(on_one):
    """cuDNN's: two products forward and five backward, of half the keys; two more where a block is
    computed again, none where products are kept. The program's other FLOPs stay."""
    product = B * T * L * 2 * D * T / 2
    others = on_one.cost.flops - 12 * L * B * T * T * D
    for remat, products in (("none", 7), ("block", 9)):
        plan = planned(targets.simulated(H100, 1), training={"remat": remat})
        assert plan.spec.attention == "cudnn"
        recomputed = 2 * B * T * L * (4 * D * D + D * F) if remat == "block" else 0
        assert plan.cost.flops == others + recomputed + products * product
    arithmetic = Arithmetic(plan.spec, config_of().optimizer, config_of().training, {"data": 1})
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


def test_the_compiled_program_takes_the_state_and_a_batch(sharded):
    memory = sharded.memory
    arguments = memory.needed - memory.temporaries
    key, rows = 8, 4 * B // 8 * (T + 1)
    assert arguments == pytest.approx(memory.state.total + key + rows, abs=600)
    assert memory.source == "arithmetic" and memory.compiler_temporaries > 0
    assert memory.available == 0.75 * 80 * GIB and memory.fits


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
    kernel = dataclasses.replace(one, spec=dataclasses.replace(spec, attention="splash"))
    dots = config.training.model_copy(update={"remat": "dots"})
    kernel = dataclasses.replace(kernel, training=dots)
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
        (MOE, {"data": 2, "expert": 8}, {"capacity_factor": 1.25} | AUTO, 8.51, 45.2),
        (MOE, {"expert": 8}, {"capacity_factor": 0.0} | AUTO, 17.03, 84.1),
    ],
    ids=str,
)  # fmt: skip
def test_arithmetic_is_near_what_the_tpu_compiler_counts(path, sizes, settings, temporaries, tera):
    """GiB of temporaries and TFLOPs of a device as libtpu 0.0.52's programs have them, for v5p and
    v6e, with splash. Both kinds of mixture, which plain counts of a dense MLP miss by far."""
    config = load_config(path).resolved()
    vocab = {LLAMA: 100277, MOE: 50257}[path]
    training = config.training.model_copy(update=settings)
    spec = ModelSpec(config.model, vocab, "bfloat16", "splash")
    mesh = dict.fromkeys(MESH_AXES, 1) | sizes
    one = Arithmetic(spec, config.optimizer, training, mesh)
    assert one.temporaries() / GIB == pytest.approx(temporaries, rel=0.15)
    assert one.flops_per_token() * one.tokens / 1e12 == pytest.approx(tera, rel=0.05)


def test_experts_are_gathered_or_rows_are_sent_to_them():
    """Over expert 8: dropless, weights of the experts in bfloat16, forward, again and gradients;
    with a capacity, rows in bfloat16 there and back, forward and backward, each once a layer."""
    config = load_config(MOE).resolved()
    spec = ModelSpec(config.model, 50257, "bfloat16", "splash")
    mesh = dict.fromkeys(MESH_AXES, 1) | {"expert": 8}
    experts, others = 12 * 8 * 3 * 768 * 2048, 519986688 - 12 * 8 * 3 * 768 * 2048
    shared = 8 * others * 7 / 8

    def sent(factor):
        settings = {"capacity_factor": factor, "micro_batch_size": 512}
        training = config.training.model_copy(update=settings)
        return Arithmetic(spec, config.optimizer, training, mesh).sent()

    assert sent(0.0)["expert"] == pytest.approx(6 * experts * 7 / 8 + shared, rel=1e-3)
    rows = 512 / 8 * 8 * 320
    assert sent(1.25)["expert"] == pytest.approx(12 * 4 * rows * 768 * 2 * 7 / 8 + shared, rel=1e-3)
    assert sent(0.0)["fsdp"] == sent(1.25)["data"] == 0


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


# Each shape of instruction that cost.py reads, as compilers write it.
HLO = """HloModule jit_step

%fused (p0: f32[8,4], p1: s32[]) -> f32[4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %cut = f32[1,4]{1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,4}
}

%body (t: (s32[], f32[2,4])) -> (s32[], f32[2,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %w = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %row = f32[1,4]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"100"}}
  %d = f32[1,8]{1,0:T(8,128)S(1)} dot(%row, %w), lhs_contracting_dims={1}, rhs_contracting_dims={1}, backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  ROOT %r = (s32[], f32[8,4]{1,0}) tuple(%i, %w)
}

%never (t: (s32[], f32[2,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %j), direction=LT
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = bf16[3,5,16]{2,1,0} parameter(1)
  %z = bf16[3,16,7]{2,1,0} parameter(2)
  %s = (s32[], f32[8,4]{1,0}) tuple(%c, %x)
  %l = (s32[], f32[8,4]{1,0}) while(%s), condition=%never, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  %b = bf16[3,5,7]{2,1,0} convolution(%y, %z), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf
  %k = f32[8,4]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","transcendentals":"5"}}}
  ROOT %o = f32[8,4]{1,0} get-tuple-element(%l), index=1
}
"""  # noqa: E501 (as compilers write it)


def test_costs_are_read_with_turns_slices_windows_kernels_and_what_stays_on_the_chip():
    """A fusion that cuts a row out of [8, 4] reads a row, not the stack; a dilated window with one
    place that meets a number is a batch dimension; an estimate of 2^63 - 1 cycles is none."""
    loop = 2 * 8 * 4
    batched = 2 * 3 * 5 * 7 * 16
    row, index, whole = 4 * 4, 4, 8 * 4 * 4
    in_loop = (row + index + row) + (row + whole)
    entry = 2 * (3 * 5 * 16 + 3 * 16 * 7 + 3 * 5 * 7) + 2 * whole
    assert read_cost(HLO) == Cost(6 * loop + batched + 1000, 6 * in_loop + entry, 600.0, 1000.0)


# A layer's part of a stack, cut out in a fusion inside a fusion; and a part added to in its place.
NESTED = """HloModule jit_step

%cut (p0: f32[8,4], p1: s32[]) -> f32[1,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %row = f32[1,4]{1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,4}
}

%add (q0: f32[8,4], q1: s32[], q2: f32[4,8]) -> f32[8,4] {
  %q0 = f32[8,4]{1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %q2 = f32[4,8]{1,0} parameter(2)
  %other = f32[8,4]{1,0} bitcast(%q2)
  %inner = f32[1,4]{1,0} fusion(%other, %q1), kind=kLoop, calls=%cut
  %old = f32[1,4]{1,0} dynamic-slice(%q0, %q1), dynamic_slice_sizes={1,4}
  %sum = f32[1,4]{1,0} add(%old, %inner)
  ROOT %new = f32[8,4]{1,0} dynamic-update-slice(%q0, %sum, %q1)
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[4,8]{1,0} parameter(2)
  ROOT %f = f32[8,4]{1,0} fusion(%x, %i, %y), kind=kLoop, calls=%add
}
"""


def test_of_a_stack_only_the_parts_count_that_are_cut_out_or_replaced():
    """The row that is read, the index, the other row, and the row that is written."""
    row, index = 4 * 4, 4
    assert read_cost(NESTED).bytes == row + index + row + row
    whole = NESTED.replace("%new = f32[8,4]{1,0} dynamic-update-slice(%q0, %sum, %q1)",
                           "%new = f32[8,4]{1,0} multiply(%q0, %q0)")  # fmt: skip
    assert read_cost(whole).bytes == 2 * 8 * row + index + row


@pytest.mark.parametrize("rows", ["", "2,"])
def test_splash_costs_the_products_of_the_blocks_that_the_mask_leaves(rows):
    """Of 4 x 4 blocks of 256 positions, 10 are computed: forward 2 products, dq 3, dkv 4."""
    heads, size = 8, 64
    q, k = f"bf16[{rows}8,1024,64]{{2,1,0}}", f"bf16[{rows}2,1024,64]{{2,1,0}}"
    products = {"fwd_residuals.1": 2, "dq_no_residuals": 3, "dkv_no_residuals.clone": 4}
    for name, count in products.items():
        text = f"""ENTRY %main (x: f32[8]) -> f32[8] {{
  %next = s8[1,4,4]{{2,1,0}} parameter(0)
  %mask = s8[1,4,4]{{2,1,0}} parameter(1)
  %q = {q} parameter(2)
  %k = {k} parameter(3)
  %v = {k} parameter(4)
  %order = s32[1024,128]{{1,0}} parameter(5)
  %splash_mha_{name} = {q} custom-call(%next, %mask, %q, %k, %v, /*index=5*/%order), custom_call_target="tpu_custom_call", backend_config={{"custom_call_config":{{}}}}
}}
"""  # noqa: E501 (as compilers write it)
        pairs = (2 if rows else 1) * heads * 10 * 256 * 256
        cost = read_cost(text)
        assert cost.flops == cost.kernel_flops == count * 2 * size * pairs


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


def test_the_longest_of_three_binds():
    sheet = SHEETS[H100]
    found = roofline(Cost(989e12, 3.35e12 / 2, None), [], sheet, [])
    assert (found.compute, found.memory, found.links, found.binds) == (1.0, 0.5, 0.0, "compute")
    assert roofline(Cost(989e12, 3 * 3.35e12, None), [], sheet, []).binds == "memory"


def test_mfu_and_days_follow_from_the_step(sharded):
    seconds = sharded.step_seconds
    work = B * T * flops_per_token(sharded.spec)
    assert sharded.mfu == pytest.approx(work / (seconds * 8 * 989e12))
    facts = describe(sharded)
    assert facts["days"] == pytest.approx(seconds * 100 / 86400)
    assert facts["device_hours"] == pytest.approx(8 * 24 * facts["days"])
    assert {row["kind"] for row in facts["collectives"]} >= {"all-gather"}


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (43.99G) exceeds available HBM (15.75G).", 43.99),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
         "hbm. Used 20.11G of 15.75G hbm. Exceeded hbm capacity by 4.36G.", 20.11),
    ],
)  # fmt: skip
def test_a_program_that_the_compiler_refuses_does_not_fit(message, needed, sharded):
    memory = plan_module._refused(message, sharded.memory.state, 16.0 * GIB)
    assert (memory.needed, memory.available) == (needed * GIB, 15.75 * GIB)
    assert memory.fits is False
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
        plan_module._refused("INTERNAL: another error", sharded.memory.state, None)


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
        memory = types.SimpleNamespace(fits=len(asked) != 1, needed=1.0)
        return types.SimpleNamespace(
            memory=memory, step_seconds=[1.0, 4.0, 3.0, 2.0][len(asked) - 1]
        )

    monkeypatch.setattr(search_module, "plan_step", fake)
    told = []
    plans, considered = search(
        load_config(LLAMA).resolved(), 100277, targets.simulated(H100, 8), 0.75, 4,
        lambda number, total, candidate: told.append((number, total)),
    )  # fmt: skip
    assert len(asked) == 4 < considered
    assert told == [(n, 4) for n in (1, 2, 3, 4)]
    assert [plan.step_seconds for plan in plans] == [2.0, 3.0, 4.0, 1.0]
    assert not plans[-1].memory.fits


def test_a_program_that_does_not_give_its_text_is_dumped():
    def train_step(x):
        return x @ x

    class Silent:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("UNIMPLEMENTED")

    lowered = jax.jit(train_step).lower(jax.ShapeDtypeStruct((8, 8), "float32"))
    assert read_cost(program_text(lowered, Silent())).flops == 2 * 8**3


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
        ("h100:8", "expected one of v2, v3, v4, v5e, v5p, v6e, tpu7x"),
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
    kinds = [kind for kind in SHEETS if kind.startswith("NVIDIA")]
    assert all(float(compute_capability(kind)) >= 8.0 for kind in kinds)
    assert compute_capability("NVIDIA A100-SXM4-80GB") == "8.0"
    assert compute_capability("NVIDIA H100 80GB HBM3") == "9.0"
    assert compute_capability("TPU v5p") == compute_capability("NVIDIA L400") == ""


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
    memory = plan.memory
    assert memory.source == "compiler" and memory.fits
    assert memory.available == 16 * GIB
    assert plan.compiler_seconds > 0 and plan.roofline.links > 0
    assert {one.group for one in plan.collectives} == {4}
    with pytest.raises(UsageError, match="made of hosts"):
        targets.topology("v5e:3x5")
    one_chip = load_config(LLAMA).resolved()
    refused = plan_step(one_chip, 100277, targets.topology("v5e:1x1"), 1.0).memory
    assert refused.fits is False
    assert refused.needed > refused.state.total > refused.available == 15.75 * GIB


def test_plans_beside_the_configurations_are_of_commands_that_work():
    """Each opens with its command, which the command line understands, and shows that model."""
    texts = sorted((ROOT / "configs" / "plans").glob("*.txt"))
    assert {"llama3_8b.v5p-4x4x4", "llama3_8b.h100-8", "llama3_8b.v5e-1x1"} <= {
        text.stem for text in texts
    }
    for text in texts:
        head = text.read_text().splitlines()[0]
        words = head.removeprefix("$ python -m llm plan ").split()
        chosen = parse(Options, [str(ROOT / words[0]), *words[1:]])
        config = chosen.settings.resolved()
        assert text.name.startswith(Path(words[0]).stem)
        spec = ModelSpec(config.model, find_vocab_size(config, None))
        assert f"{parameter_count(spec):,}" in text.read_text()
        assert chosen.topology is None or chosen.topology.replace(":", "-") in text.stem


def test_mesh_of_the_large_configurations_takes_any_number_of_devices():
    mesh = make_mesh(load_config(LLAMA).mesh, jax.devices())
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1, "context": 1}
