"""No run is lost: 25 seeded kills, and every loss and parameter as if there had been none."""

import pytest
from kills import train_under_kills
from runs import losses, params_sha256, run_process, starts, write_config

KILLS, SEED, STEPS, EVERY = 25, 0, 400, 5

SETTINGS = {
    "training": {"steps": STEPS, "eval_every": 10},
    "checkpoint": {"every": EVERY, "keep": 2},
    "optimizer": {"learning_rate": 1e-3, "min_learning_rate": 1e-4},
    "sample": {"max_new_tokens": 0},
}


@pytest.mark.thorough
def test_a_run_survives_25_kills_bit_for_bit(tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for folder in (unbroken, broken):
        folder.mkdir()
    code, output = run_process(write_config(unbroken, **SETTINGS))
    assert code == 0, output
    hit = train_under_kills(write_config(broken, **SETTINGS), broken / "run", KILLS, SEED)
    assert hit.total() == KILLS
    # Whatever else the seed draws: in a step, and when a save only waits for its name.
    assert hit["step"] and hit["checkpoint.before_commit"], hit
    assert losses(broken / "run") == losses(unbroken / "run")
    assert params_sha256(broken / "run", STEPS) == params_sha256(unbroken / "run", STEPS)
    # The steps since the last save, and those that ran while one was being written.
    assert max(start["redone_steps"] for start in starts(broken / "run")) <= 2 * EVERY
    left = {path.name for path in (broken / "run" / "checkpoints").iterdir()}
    assert all(name.isdecimal() for name in left), left
