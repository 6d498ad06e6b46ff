"""The report of a run: its numbers are those of metrics.jsonl, whatever happened to the run."""

import functools
import json
import operator
import shutil
import socket
import struct
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from runs import free_port

from llm.__main__ import main
from llm.errors import CheckpointError, UsageError
from llm.pages.report_data import MOST_ROWS, Metrics, smoothed, visible


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def reported(capsys, *words):
    assert main(["report", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def write_rows(path, count, losses, **more):
    with open(path, "w") as file:
        for step, loss in zip(range(1, count + 1), losses, strict=True):
            row = {"kind": "train", "step": step, "tokens": 8 * step, "loss": loss,
                   "grad_norm": 1.0, "learning_rate": 0.1, "tokens_per_second": 4.0,
                   "step_seconds": 2.0, "mfu": None}  # fmt: skip
            row |= {name: of[step] for name, of in more.items() if step in of}
            file.write(json.dumps(row) + "\n")


def test_numbers_are_those_of_the_metrics(unbroken, capsys):
    rows = rows_of(unbroken / "run")
    (run,) = reported(capsys, unbroken / "run")["runs"]
    for name in ("step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second"):
        assert run["train"][name] == [row[name] for row in rows if row["kind"] == "train"]
    seconds = np.cumsum([row["step_seconds"] for row in rows if row["kind"] == "train"])
    np.testing.assert_allclose(run["train"]["seconds"], seconds, rtol=1e-12)
    (of,) = run["evaluations"]
    for name in ("step", "loss", "bits_per_byte"):
        assert of[name] == [row[name] for row in rows if row["kind"] == "eval"]
    assert "mfu" not in run["train"]  # null in every row
    assert "optimizer.learning_rate" in run["settings"] and "model.d_ff" not in run["settings"]


def test_thinned_rows_keep_the_extremes_of_every_curve_and_are_rows(tmp_path):
    count = 200_000
    random = np.random.default_rng(0)
    losses = 5 / np.sqrt(np.arange(1, count + 1)) + random.normal(0, 0.01, count) ** 2
    losses[[77_777, 150_001]] = 40.0, 1e-6
    norms = random.exponential(1.0, count)
    norms[123_456] = np.nan
    kept = visible([losses, norms])
    assert len(kept) < MOST_ROWS and set(kept) >= {0, 77_777, 150_001, count - 1}
    for part in np.array_split(np.arange(count), 100):
        seen = kept[(kept >= part[0]) & (kept <= part[-1])]
        assert np.nanmax(norms[seen]) > 0.7 * np.nanmax(norms[part])
    assert list(visible([np.arange(MOST_ROWS)])) == list(range(MOST_ROWS))


def test_a_smoothed_curve_is_the_mean_of_the_finite_numbers_around_each_row():
    column = np.arange(500.0) ** 2
    column[100] = np.nan
    found = smoothed(column)
    for place in (0, 50, 98, 100, 499):
        around = column[max(0, place - 5) : place + 6]
        assert found[place] == pytest.approx(np.nanmean(around), rel=1e-12)
    assert np.isnan(smoothed(np.full(3, np.nan))).all()


def test_rows_that_are_broken_cut_or_not_finite_leave_the_others(copy, capsys):
    metrics = copy / "run" / "metrics.jsonl"
    write_rows(metrics, 5, [3.0, None, 2.0, 1e9, 1.0], finite={2: False}, spike={4: True})
    with open(metrics, "a") as file:
        file.write('{"kind":"train","step":\n[]\n{"kind":"train","step":"x"}\n{"kind":"tra')
    (run,) = reported(capsys, copy / "run")["runs"]
    assert run["train"]["loss"] == [3.0, None, 2.0, 1e9, 1.0]
    assert [(mark["step"], mark["why"]) for mark in run["marks"]] == [
        (2, "not finite"),
        (4, "a spike"),
    ]
    assert run["notes"][0].startswith("3 lines of metrics.jsonl are damaged")
    assert "no validation loss" in run["notes"][1]
    assert run["marks"][1]["tokens"] == 32 and run["marks"][1]["seconds"] == 8.0


@pytest.mark.parametrize(
    "place, value",
    [
        ("model.parameters", "many"),
        ("data.train_tokens", "1"),
        ("starts.0.from_step", "3"),
        ("starts.0.command", [1]),
        ("starts.0.seconds", {"text": float("nan")}),
    ],
)
def test_a_run_json_of_other_kinds_is_refused_by_the_place(copy, place, value):
    path = copy / "run" / "run.json"
    record = json.loads(path.read_text())
    *way, last = [int(part) if part.isdecimal() else part for part in place.split(".")]
    functools.reduce(operator.getitem, way, record)[last] = value
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=rf"run\.json is not what .* writes.*; {place}"):
        main(["report", str(copy / "run")])


def test_a_tokenizer_that_loses_text_is_said_to(copy, capsys):
    config = copy / "run" / "config.toml"
    for lossy in (False, True):
        config.write_text(
            config.read_text().replace("lossy = false", f"lossy = {str(lossy).lower()}")
        )
        (run,) = reported(capsys, copy / "run")["runs"]
        assert dict(run["facts"])["tokenizer"].endswith("which loses text") == lossy


def test_numbers_and_ids_beyond_all_bounds_leave_a_page(copy, capsys):
    for path in (copy / "run" / "checkpoints").glob("*/receipt.json"):
        path.write_text(json.dumps({"tokens": [[10**6, 2]], "logprobs": [[-1.0]]}))
    write_rows(copy / "run" / "metrics.jsonl", 3, [1e308, 1e308, 1.0], step_seconds={2: 1e308})
    path = copy / "run" / "run.json"
    record = json.loads(path.read_text())
    record["starts"][0]["seconds"] = {"text": 1e308, "compiling": 1e308, "total": 1e308}
    path.write_text(json.dumps(record | {"starts": record["starts"] * 2}))
    (run,) = reported(capsys, copy / "run")["runs"]
    assert run["train"]["step"] == [1, 3] and run["notes"][0].startswith("1 lines of metrics")
    assert run["time"]["seconds"]["restarts"] is None
    assert not [text for text in run["samples"] if "receipt" in text["label"]]


@pytest.mark.parametrize("count", [0, 1])
def test_a_run_of_no_or_one_step_has_a_page(copy, capsys, count):
    write_rows(copy / "run" / "metrics.jsonl", count, [1.5] * count)
    shutil.rmtree(copy / "run" / "checkpoints")
    (copy / "run" / "probes.jsonl").unlink()
    assert main(["report", str(copy / "run")]) == 0
    assert (copy / "run" / "report.html").read_text().startswith("<!doctype html>")
    (run,) = reported(capsys, copy / "run")["runs"]
    assert run["train"]["step"] == [1] * count and run["samples"] == []


def test_a_run_that_did_not_say_how_it_ended_is_not_called_finished_or_dead(copy, capsys):
    run = copy / "run"
    record = json.loads((run / "run.json").read_text())
    del record["starts"][0]["ended"]
    (run / "run.json").write_text(json.dumps(record))

    def said():
        (one,) = reported(capsys, run)["runs"]
        return one["state"], "".join(sentence for sentence, _ in one["next"])

    assert said()[0] == "finished, step 12 of 12"
    shutil.rmtree(run / "checkpoints" / "12")
    state, advice = said()
    assert state.startswith("step 12 of 12: it ended without a word") and "Go on from" in advice
    assert "Write text" in advice
    (run / "run.lock").write_text("process 7 on node-12, since 2026-01-01T00:00:00+00:00\n")
    assert "it trains on node-12, or was killed there; this machine cannot tell" in said()[0]
    shutil.rmtree(run / "checkpoints")
    assert "Write text" not in said()[1]


def test_ten_starts_are_nine_restarts_and_their_time_is_counted(copy, capsys):
    path = copy / "run" / "run.json"
    record = json.loads(path.read_text())
    (start,) = record["starts"]
    told = {"text": 1.0, "compiling": 2.0, "evaluation": 0.5, "saves": 0.25, "total": 20.0}
    record["starts"] = [
        start | {"from_step": n, "redone_seconds": 0.5 * (n > 0), "seconds": told}
        for n in range(10)
    ]
    path.write_text(json.dumps(record))
    write_rows(copy / "run" / "metrics.jsonl", 12, [1.0] * 12)
    (run,) = reported(capsys, copy / "run")["runs"]
    assert [mark["step"] for mark in run["marks"]] == list(range(1, 10))
    # Two seconds a step; the first step of each of ten starts is in its compilation.
    assert run["time"]["seconds"] == {
        "text": 1.0, "compiling": 2.0, "steps": 4.0, "evaluation": 5.0, "saves": 2.5,
        "restarts": 9 * 3.5, "other": 200.0 - 46.0,
    }  # fmt: skip


def test_two_runs_show_settings_that_differ_and_where_they_part(unbroken, copy, tmp_path, capsys):
    other = copy / "run"
    text = (other / "config.toml").read_text()
    (other / "config.toml").write_text(text.replace("spike_zscore = 0.0", "spike_zscore = 6.5"))
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    changed = json.loads(lines[7]) | {"loss": 9.0}
    (other / "metrics.jsonl").write_text("".join([*lines[:7], json.dumps(changed) + "\n"]))
    report = reported(capsys, unbroken / "run", other)
    assert report["differences"] == {"training.spike_zscore": [0.0, 6.5]}
    steps = [json.loads(line)["step"] for line in lines[:8] if '"train"' in line]
    assert report["parting"] == [{"common": len(steps), "step": changed["step"]}]
    html = tmp_path / "both.html"
    assert main(["report", str(unbroken / "run"), str(other), "--html", str(html)]) == 0
    with pytest.raises(UsageError, match="several runs have no page of their own"):
        main(["report", str(unbroken / "run"), str(other)])


def test_a_folder_that_is_no_run_and_a_pipe_for_its_metrics_are_refused(tmp_path, copy):
    from runs import make_strange

    with pytest.raises(UsageError, match="is not a run directory"):
        main(["report", str(tmp_path / "nowhere")])
    with pytest.raises(UsageError, match="--serve shows the page until Ctrl-C: leave out --json"):
        main(["report", str(copy / "run"), "--serve", "--json"])
    for kind in ("huge", "pipe"):
        make_strange(kind, copy / "run" / "metrics.jsonl")
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl cannot be read"):
            main(["report", str(copy / "run")])


def test_a_step_counts_once_and_seconds_stand_for_the_steps_between_rows(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", 3, [3.0, 2.0, 1.0])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    later = json.dumps(json.loads(lines[2]) | {"step": 7, "loss": 0.5})
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, lines[1], later]) + "\n")
    metrics = Metrics(tmp_path / "metrics.jsonl")
    assert list(metrics.train["step"]) == [1, 2, 3, 7]
    assert list(metrics.train["seconds"]) == [2.0, 4.0, 6.0, 14.0]


def test_rows_that_are_read_on_are_those_of_the_whole_file(copy):
    """What was read is not read again, unless a resume has cut the file and written on."""
    from llm.pages.report import gather
    from llm.pages.report_data import GrowingRows
    from llm.run.directory import RunDirectory

    run = RunDirectory(copy / "run")
    files = {
        path: path.read_bytes().splitlines(keepends=True) for path in (run.metrics, run.probes)
    }
    for path, lines in files.items():
        path.write_bytes(b"".join(lines[:4]) + lines[4][:9])

    def agree():
        rows.read()
        kept, fresh = gather([run], read=[rows]), gather([run])
        assert kept["runs"] == fresh["runs"]
        return kept["runs"][0]

    rows = GrowingRows(run)
    agree()
    for path, lines in files.items():  # the line that was cut is complete now; an early one is gone
        path.write_bytes(b" " * (len(lines[0]) - 1) + b"\n" + b"".join(lines[1:]))
    rows.read()
    assert rows.metrics.broken == 0 and rows.metrics.train["step"][0] == 1
    assert gather([run], read=[rows])["runs"][0]["texts"][1]["steps"] == [6, 12]
    for path, lines in files.items():
        path.write_bytes(b"".join(lines[:3]).replace(b'"loss": ', b'"loss": 1') + lines[-1])
    assert agree()["train"]["loss"][0] > 10


def probe_rows(run):
    return [json.loads(line) for line in (run / "probes.jsonl").read_text().splitlines()]


def check_probes_of_the_last_step(run):
    """They are what `score` says of its checkpoint; returns how many."""
    from llm.inference.score import Scorer
    from llm.run.open import open_model

    rows = probe_rows(run)
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    opened = open_model(run, last[0]["step"])
    scorer = Scorer(opened.spec, opened.params, opened.tokenizer, top=1)
    for row, records in zip(last, scorer.score([row["ids"] for row in last]), strict=True):
        assert row["said"][0] is None
        said = [[r.logprob, r.rank, r.entropy, r.top[0].id, r.top[0].logprob] for r in records[1:]]
        found = row["said"][1:]
        if "prompt" in row:
            found, said = found[row["prompt"] - 1 :], said[row["prompt"] - 1 :]
        for place in (0, 2, 4):
            got, expected = [one[place] for one in found], [one[place] for one in said]
            np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
        assert [one[1] for one in found] == [one[1] for one in said]
    return len(last)


def test_probes_are_scored_at_each_evaluation_as_score_does(unbroken):
    rows = probe_rows(unbroken / "run")
    evaluated = [row["step"] for row in rows_of(unbroken / "run") if row["kind"] == "eval"]
    fixed = [row for row in rows if "prompt" not in row]
    assert sorted({row["step"] for row in fixed}) == evaluated
    assert [row["step"] for row in rows if row["name"] == "Sample"] == evaluated
    assert check_probes_of_the_last_step(unbroken / "run") == 3


def test_probes_and_receipts_of_a_run_are_computed_by_one_program(tmp_path):
    from runs import train, write_config

    from llm.inference.score import _describe_batch
    from llm.run.receipt import _compute

    for program in (_describe_batch, _compute):
        program.clear_cache()
    config = write_config(tmp_path, training={"steps": 2}, sample={"max_new_tokens": 0})
    config.write_text(config.read_text() + '\n[[probe]]\ntext = "the"\n')
    assert train(config, "--logging.probe-every", "1") == 0
    assert [program._cache_size() for program in (_describe_batch, _compute)] == [1, 0]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "mesh, model, training",
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, {}, {"scan_layers": True}),
        ({"fsdp": 4, "context": 2}, {}, {"micro_batch_size": 4}),
        ({"data": 2, "expert": 4}, {"n_expert": 4, "n_expert_active": 2}, {}),
    ],
)
def test_probes_on_a_mesh_are_what_score_says(tmp_path, mesh, model, training):
    from runs import train, write_config

    training = {"steps": 2, "batch_size": 8, **training}
    config = write_config(tmp_path, mesh=mesh, model=model, training=training)
    assert train(config) == 0
    assert check_probes_of_the_last_step(tmp_path / "run") >= 2


def test_probes_of_the_settings_outlive_a_kill_once_each(tmp_path, capsys):
    from runs import run_process, train, write_config

    config = write_config(
        tmp_path,
        training={"steps": 8, "eval_every": 4},
        logging={"progress": "none", "probe_every": 2},
        sample={"max_new_tokens": 0},
    )
    text = "\n[[probe]]\ntext = 'the teeth'\nname = '<b>名字 \\u202e</b>'\n"
    config.write_text(config.read_text() + text.replace("'", '"'))
    code, output = run_process(config, fault="step:step=7:kill")
    assert code == -9, output
    with open(tmp_path / "run" / "probes.jsonl", "a") as file:
        file.write('{"step":6,"name":"torn')
    assert train(config) == 0
    rows = [row for row in probe_rows(tmp_path / "run") if row["name"].startswith("<b>")]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    (run,) = reported(capsys, tmp_path / "run")["runs"]
    (learnt,) = [text for text in run["texts"] if text["name"].startswith("<b>")]
    assert learnt["steps"] == [2, 4, 6, 8] and learnt["said"][3] == rows[3]["said"]
    assert "".join(token["text"] for token in learnt["tokens"]) == "the teeth"
    assert run["state"] == "finished, step 8 of 8"
    assert set(run["time"]["seconds"]) >= {"text", "compiling", "steps", "evaluation", "saves"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<b>名字" not in page and page.count("<!doctype html>") == 1


def test_probes_change_no_loss_and_none_is_passed_over_by_a_resume(unbroken, copy):
    """The step that the run goes on from is saved, and its probes were not scored any more."""
    from runs import losses, params_sha256, train

    shutil.rmtree(copy / "run" / "checkpoints" / "12")
    config = copy / "config.toml"
    tables = "".join(f'\n[[probe]]\ntext = "{text}"\nname = "one"\n' for text in ("the", "the red"))
    config.write_text(config.read_text() + tables)
    assert train(config, "--logging.probe-every", "4") == 0
    assert losses(copy / "run") == losses(unbroken / "run")
    assert params_sha256(copy / "run") == params_sha256(unbroken / "run")
    rows = [(row["step"], row["name"], len(row["ids"])) for row in probe_rows(copy / "run")]
    for step in (8, 12):
        assert [row[1:] for row in rows if row[0] == step and row[1] == "one"] == [
            ("one", 3),
            ("one", 7),
        ]
    assert len([row for row in rows if row[:2] == (8, "Held-out text 1")]) == 1


def test_a_probe_too_short_or_of_an_unknown_key_is_refused(tmp_path):
    from runs import train, write_config

    config = write_config(tmp_path)
    text = config.read_text()
    for table, message in [
        ('text = "t"', r"the \[\[probe\]\] 't' has 1 tokens; expected 2 to 17"),
        ('text = "the 道"', r"\[\[probe\]\] 'the 道': the character '\\u9053'.* at index 4"),
        ('txt = "the"', "unknown setting probe.0.txt; did you mean probe.0.text"),
        ('name = "n"', "probe.0.text is missing: expected a text of at least two tokens"),
    ]:
        config.write_text(f"{text}\n[[probe]]\n{table}\n")
        with pytest.raises(UsageError, match=message):
            train(config)


def test_a_page_grows_beside_training_and_ends_with_it(copy, capfd):
    from llm.pages.report_writer import Page
    from llm.run.directory import RunDirectory
    from llm.run.display import Display
    from llm.run.start import locked

    record = json.loads((copy / "run" / "run.json").read_text())
    del record["starts"][0]["ended"]
    (copy / "run" / "run.json").write_text(json.dumps(record))
    run, port = RunDirectory(copy / "run"), free_port()
    page = Page(run, Display(), writes=True, port=port)
    url = f"http://127.0.0.1:{port}"
    assert f"the page of this run: {url}\n" in capfd.readouterr().err
    with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1, port {port}"):
        Page(run, Display(), writes=True, port=port)

    def state():
        with urllib.request.urlopen(f"{url}/data.json") as answer:
            return json.load(answer)["runs"][0]["state"]

    with locked(run):
        assert state() == "training, step 12 of 12"
        # The last page of a start that failed before it trained.
        (run.path / "report.html").unlink(missing_ok=True)
        Page(run, Display(), writes=True).close()
        assert "finished, step 12 of 12" in (run.path / "report.html").read_text()
        untrained = json.dumps(record | {"starts": []})
        (copy / "run" / "run.json").write_text(untrained)
        Page(run, Display(), writes=True).close()
        assert "it ended before anything" in (run.path / "report.html").read_text()
        (copy / "run" / "run.json").write_text(json.dumps(record))
    assert state() == "finished, step 12 of 12"  # no file has changed
    for _ in range(3):  # browsers that leave before they are answered
        with socket.create_connection(("127.0.0.1", port)) as leaving:
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            leaving.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    (copy / "run" / "config.toml").write_text("[")
    (copy / "run" / "metrics.jsonl").touch()
    with pytest.raises(urllib.error.HTTPError, match="503"):
        state()
    page.close()
    with pytest.raises(urllib.error.URLError, match="refused"):
        state()
    assert "Traceback" not in capfd.readouterr().err


def test_each_curve_is_a_picture(copy, tmp_path, capsys, recwarn):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "pictures"
    (copy / "run").rename(copy / "名字 $x$\ue000")
    assert main(["report", str(copy / "名字 $x$\ue000"), "--png", str(folder)]) == 0
    assert not [one for one in recwarn if "Glyph" in str(one.message)]
    written = sorted(folder.iterdir())
    assert {"loss.png", "bits_per_byte.png"} <= {path.name for path in written}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert sorted(capsys.readouterr().err.split()) == [str(path) for path in written]
    with pytest.raises(UsageError, match=r"cannot write .*loss\.png"):
        main(["report", str(copy / "名字 $x$\ue000"), "--png", str(written[0])])


def test_chinese_names_are_drawn_with_the_font_that_has_them(tmp_path):
    """Boxes in the place of characters would make the two pictures the same."""
    manager = pytest.importorskip("matplotlib.font_manager")
    from llm.pages.report_png import FONTS, write_pictures

    if not set(FONTS[:-1]) & set(manager.fontManager.get_font_names()):
        pytest.skip("no font for Chinese")
    curve = {"step": [1, 2], "loss": [2.0, None]}
    pictures = set()
    for name in ("名", "字"):
        one = {"name": name, "train": curve, "smoothed": curve, "evaluations": []}
        (path,) = write_pictures({"runs": [one]}, tmp_path / name)
        pictures.add(Path(path).read_bytes())
    assert len(pictures) == 2


def test_a_page_that_cannot_be_written_is_one_warning(tmp_path, capsys):
    from llm.pages.report_writer import Page
    from llm.run.directory import RunDirectory
    from llm.run.display import Display

    (tmp_path / "config.toml").write_text("[model]\nn_layer = 'many'\n")
    page = Page(RunDirectory(tmp_path), Display(), writes=True)
    page.ask()
    page.close()
    assert capsys.readouterr().err.count("report.html is not written") == 1
