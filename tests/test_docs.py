"""What README.md and docs/ say is true of the code: names, files, settings, tables, the example."""

import ast
import functools
import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import llm.errors
from llm.__main__ import COMMANDS
from llm.commands.flags import flags_of, parse
from llm.config import Config, flatten, load_config
from llm.errors import LLMError
from llm.inference.records import (
    EndRecord,
    RunRecord,
    TokenRecord,
    fields,
    table,
)

ROOT = Path(__file__).resolve().parent.parent
README, CONFIGS, DESIGN, RECORDS, RUNS, TRANSFORMER = (
    ROOT / name
    for name in (
        "README.md",
        "configs/README.md",
        "docs/design.md",
        "docs/records.md",
        "docs/runs.md",
        "docs/transformer.md",
    )
)
DOCS = [README, CONFIGS, *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCS]
SETTINGS = set(flatten(Config()))
SECTIONS = {name.split(".")[0] for name in SETTINGS}

every_document = pytest.mark.parametrize("document", DOCS, ids=NAMES)


def backticked(text: str) -> list[str]:
    """Code spans outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def table_after(text: str, header: str) -> list[list[str]]:
    """The cells of the table whose header row begins so."""
    lines = iter(text.split("\n"))
    assert any(line.startswith(header) for line in lines), f"no table {header!r}"
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@functools.cache
def defined_in(path: Path) -> set[str]:
    """Names defined at the top of a file, and Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@every_document
def test_every_file_and_definition_that_is_named_exists(document):
    spans = backticked(document.read_text())
    named = [span for span in spans if re.match(r"(llm|tests|configs|docs)/[\w./]+", span)]
    for span in named:
        path, _, definition = span.partition(":")
        if "MODULE" in path:
            continue
        assert (ROOT / path).exists(), f"{span}: there is no {path}"
        if definition:
            assert definition in defined_in(ROOT / path), f"{span}: {path} defines no {definition}"


@pytest.mark.parametrize("document", [TRANSFORMER, DESIGN], ids=["transformer", "design"])
def test_the_documents_name_many_definitions(document):
    """Else the test above could pass on nothing."""
    spans = backticked(document.read_text())
    assert len([span for span in spans if re.match(r"llm/[\w/]+\.py:\w", span)]) >= 20


@every_document
def test_every_relative_link_and_image_resolves(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|#", target):
            path = target.split("#")[0]
            assert (document.parent / path).exists(), f"{document.name} links to {target}"


@every_document
def test_every_setting_that_is_named_exists(document):
    text = document.read_text()
    spans = [span.split(" = ")[0].removeprefix("--").split(" ")[0] for span in backticked(text)]
    flags = re.findall(r"--([a-z]+\.[a-z-]+)", text)
    for name in [*spans, *flags]:
        section, _, key = name.replace("-", "_").partition(".")
        looks_like_one = section in SECTIONS and re.fullmatch(r"[a-z]\w*", key)
        if looks_like_one and not _is_file(name) and name not in fault_points():
            assert f"{section}.{key}" in SETTINGS, f"{document.name}: {name}"


def _is_file(name: str) -> bool:
    return name.rsplit(".")[-1] in ("py", "json", "jsonl", "toml", "md", "lock", "html", "npz")


def commands(text: str) -> list[list[str]]:
    """Words of every `python ...` line of shell blocks, transcripts and indented blocks."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = re.findall(r"^(?:    |\$ )?(python (?!-c)[^`\n]*)$", joined, re.M)
    spans = [span for span in backticked(text) if span.startswith("python ")]
    return [shlex.split(line, comments=True)[1:] for line in [*lines, *spans]]


@every_document
def test_every_command_line_is_understood(document):
    import llm.commands.plan
    import llm.commands.sample
    import llm.commands.score
    import llm.commands.train

    for program, *words in commands(document.read_text()):
        if {"--help", "COMMAND", "CONFIG"} & set(words) or not words:
            continue
        if program == "-m" and words[0] == "llm":
            command = words[1]
            assert command in COMMANDS, f"there is no command {command}"
            if command == "score":
                parse(llm.commands.score.Options, words[2:])
            if command == "plan":
                parse(llm.commands.plan.Options, [str(ROOT / words[2]), *words[3:]])
        elif program == "train.py":
            llm.commands.train.configure([str(ROOT / words[0]), *words[1:]])
        elif program == "sample.py":
            parse(llm.commands.sample.Options, words)


@every_document
def test_every_flag_that_is_named_exists(document):
    """Of the commands; names of settings have a dot."""
    modules = [
        importlib.import_module(f"llm.commands.{name.replace('-', '_')}") for name in COMMANDS
    ]
    flags = {flag.spelling for module in modules for flag in flags_of(module.Options).values()}
    for span in backticked(document.read_text()):
        if re.fullmatch(r"--[a-z-]+", span):
            assert span in flags, span


def tree(text: str) -> dict[str, str]:
    """path -> what it says of it, of the tree after `<!-- tree -->`."""
    block = re.search(r"<!-- tree -->\s+```text\n(.*?)^```$", text, re.M | re.S)
    assert block is not None
    folders: list[str] = []
    listed = {}
    for line in block[1].splitlines():
        indent, name, meaning = re.fullmatch(r"( *)(\S+)(?:\s+(.*))?", line).groups()
        folders = folders[: len(indent) // 2]
        listed["/".join([*folders, name.rstrip("/")])] = meaning or ""
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
    return listed


@functools.cache
def files() -> list[str]:
    """Files of the repository. What a person keeps beside them, a cache or a sample, is theirs."""
    listing = ["git", "ls-files", "--cached"]
    result = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip("not a git checkout")
    return [name for name in result.stdout.splitlines() if (ROOT / name).exists()]


def test_the_file_tree_is_the_files():
    """A folder whose files are listed has them all; one with no list stands for what is in it."""
    listed = tree(DESIGN.read_text())
    for path, meaning in listed.items():
        assert (ROOT / path).exists(), f"the tree lists {path}"
        has_list = any(other.startswith(path + "/") for other in listed)
        assert meaning or has_list, f"the tree says nothing of {path}"
    open_folders = {path.rsplit("/", 1)[0] for path in listed if "/" in path}
    for file in files():
        folder = file.rpartition("/")[0]
        if Path(file).name in ("__init__.py", "py.typed") or file.startswith("docs/images/"):
            continue
        if folder in open_folders or (not folder and file.endswith(".py")):
            assert file in listed, f"the tree lacks {file}"
        elif folder and not file.startswith("."):
            parts = folder.split("/")
            parents = ["/".join(parts[: n + 1]) for n in range(len(parts))]
            assert any(parent in listed for parent in parents), f"the tree lacks {folder}/"


def test_each_configuration_is_in_the_table_with_its_size():
    from llm.model.flops import parameter_count
    from llm.model.gpt import ModelSpec

    vocabulary = {"bytes": 257, "gpt2": 50257, "characters": 65, "cl100k_base": 100277}
    rows = {row[0]: row for row in table_after(CONFIGS.read_text(), "| file | model |")}
    paths = sorted((ROOT / "configs").glob("*.toml"))
    assert set(rows) == {f"[{path.stem}]({path.name})" for path in paths}
    for path in paths:
        config = load_config(path)
        row = rows[f"[{path.stem}]({path.name})"]
        spec = ModelSpec(config.model, vocabulary[config.tokenizer.kind])
        tokens = config.training.batch_size * config.model.context_length
        expected = [parameter_count(spec), tokens, config.training.steps]
        assert [int(cell.replace(",", "")) for cell in row[2:5]] == expected, path.name


def test_exit_codes_are_those_of_the_errors():
    kinds = [
        kind
        for kind in vars(llm.errors).values()
        if isinstance(kind, type) and issubclass(kind, LLMError) and kind is not LLMError
    ]
    rows = table_after(RUNS.read_text(), "| exit code |")
    assert {int(row[0]) for row in rows} == {0, 1} | {kind.exit_code for kind in kinds}
    named = {row[1].strip("`"): int(row[0]) for row in rows if row[1]}
    assert named == {kind.__name__: kind.exit_code for kind in kinds}


def section(text: str, heading: str) -> str:
    start = text.index(heading)
    level = heading.split(" ")[0]
    end = re.search(rf"^{level} ", text[start + len(heading) :], re.M)
    return text[start:][: len(heading) + end.start()] if end else text[start:]


def field_tables(text: str) -> list[tuple[str, ...]]:
    """The first column of each table of fields."""
    tables = re.findall(r"\| field \| meaning \|\n\|---\|---\|\n((?:\|.*\n)+)", text)
    return [tuple(re.findall(r"^\| `(\w+)` \|", table, re.M)) for table in tables]


def test_the_fields_of_records_are_those_of_the_code():
    described = field_tables(section(RECORDS.read_text(), "## Token-probability records"))
    assert described == list(map(fields, (RunRecord, TokenRecord, EndRecord)))
    for record in (RunRecord, TokenRecord, EndRecord):
        assert table(record) in RECORDS.read_text(), f"docs/records.md lacks\n{table(record)}"


def test_the_record_in_the_readme_has_the_fields_of_the_code():
    (record,) = map(json.loads, code_blocks(README.read_text(), "json"))
    assert tuple(record) == fields(TokenRecord)
    from llm.inference.records import Spellings
    from llm.text.tokenizer import ByteTokenizer

    assert Spellings(ByteTokenizer())[record["id"]] == (record["token"], tuple(record["bytes"]))


def test_the_fields_of_metrics_are_those_of_the_code():
    from llm.training.step import ROUTER_METRICS

    described = field_tables(section(RUNS.read_text(), "### metrics.jsonl"))
    assert described == [dictionary_keys("_row"), ROUTER_METRICS, dictionary_keys("_write")]


def dictionary_keys(function: str) -> tuple[str, ...]:
    """Keys of the first dictionary that a method of the loop spells out."""
    tree_ = ast.parse((ROOT / "llm/training/loop.py").read_text())
    (node,) = [n for n in ast.walk(tree_) if isinstance(n, ast.FunctionDef) and n.name == function]
    first = next(n for n in ast.walk(node) if isinstance(n, ast.Dict))
    return tuple(key.value for key in first.keys)


@functools.cache
def fault_points() -> set[str]:
    code = "".join(path.read_text() for path in (ROOT / "llm").rglob("*.py"))
    return set(re.findall(r'fault_point\("([\w.]+)"', code))


def test_fault_points_are_those_of_the_code():
    rows = table_after(DESIGN.read_text(), "| place | where |")
    assert {name for row in rows for name in re.findall(r"`([\w.]+)`", row[0])} == fault_points()


def test_resume_rules_are_those_of_the_code():
    from llm.run.start import ALLOWED_SECTIONS, FREE_SECTIONS, FREE_SETTINGS, NEVER

    rows = table_after(RUNS.read_text(), "| setting | on resume |")
    names = [tuple(re.findall(r"`([\w.]+)`", row[0])) for row in rows]
    assert names == [FREE_SECTIONS, FREE_SETTINGS, ALLOWED_SECTIONS, NEVER]


def test_commands_are_those_of_the_program():
    listed = section(DESIGN.read_text(), "## Commands")
    named = set(re.findall(r"`([\w-]+)`", listed.split("for", 1)[1]))
    assert named == set(COMMANDS)


def test_layers_are_those_that_the_linter_holds():
    import tomllib

    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(c["layers"] for c in rules["contracts"] if c["type"] == "layers")
    held = [set(re.findall(r"\w+", layer)) - {"__main__"} for layer in layers]
    (line,) = re.findall(r"^    (commands > .*)$", DESIGN.read_text(), re.M)
    assert [set(re.findall(r"\w+", part)) for part in line.split(">")] == [h for h in held if h]


@pytest.fixture(scope="module")
def worked_example() -> dict[str, list[float]]:
    """quantity -> values, as docs/transformer.md states them."""
    text = TRANSFORMER.read_text()
    part = text[text.index("<!-- worked example -->") : text.index("<!-- end of worked example")]
    rows = table_after(part, "| quantity |")
    return {quantity: [float(value) for value in values.split(",")] for quantity, values in rows}


def test_the_worked_example_is_what_the_code_computes(worked_example):
    import jax
    import numpy as np

    computed = {}
    with jax.default_matmul_precision("highest"):
        for quantity, values in compute_worked_example().items():
            computed[quantity] = [float(value) for value in np.ravel(values)]
    assert set(computed) == set(worked_example)
    for quantity, values in worked_example.items():
        # Half of the last place that is shown, and float32's rounding.
        np.testing.assert_allclose(
            computed[quantity], values, rtol=0, atol=5e-5 + 1e-5, err_msg=quantity
        )


def compute_worked_example() -> dict[str, object]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from llm.inference.distribution import describe, log_probabilities
    from llm.inference.filters import Candidates, RowSettings, apply_filters
    from llm.inference.records import Sampling, bits_per_byte, perplexity
    from llm.model.gpt import ModelSpec, bind
    from llm.model.loss import LossOptions, head_loss
    from llm.model_config import ModelConfig
    from llm.pages.attention import attention_weights

    config = ModelConfig(
        n_layer=1, n_head=1, d_model=2, d_ff=1, context_length=2, positions="none",
        norm="rmsnorm", bias=False, activation="relu_squared", vocab_multiple=1,
    )  # fmt: skip
    spec = ModelSpec(config, vocab_size=3)
    attention = {
        f"blocks.0.attention.{name}.weight": jnp.eye(2) for name in ("query", "key", "value", "out")
    }
    norms = ("blocks.0.attention_norm", "blocks.0.mlp_norm", "final_norm")
    params = {
        "embed.weight": jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]]),
        **attention,
        "blocks.0.mlp.up.weight": jnp.array([[1.0], [0.0]]),
        "blocks.0.mlp.down.weight": jnp.array([[0.0, 1.0]]),
        **{f"{norm}.scale": jnp.ones(2) for norm in norms},
    }

    def compute(params):
        model = bind(spec, params)
        inputs, targets = jnp.array([[0, 1]]), jnp.array([[1, 2]])
        hidden = model.hidden(inputs)
        logprobs = log_probabilities(model, hidden)[0]
        candidates = Candidates.of(logprobs)
        watch = jnp.zeros((2, 0), jnp.int32)
        said = describe(logprobs, targets[0], watch, 3, candidates)
        loss = head_loss(
            hidden, model.head_weight(), targets, jnp.full((1, 2), 0.5), LossOptions(3), 2
        )
        settings = RowSettings.stack([Sampling(temperature=0.5, top_k=2)], [0])
        last = logprobs[1:]
        drawn = apply_filters(last, Candidates.of(last), settings)
        q = [jnp.exp(drawn.logprob(jnp.array([v]))) for v in (0, 1)]
        weights = attention_weights(model, inputs)[0, 0, 0, 1]
        return hidden[0], model(inputs)[0], logprobs, said, loss.nll, q, drawn.kept_mass_R, weights

    hidden, logits, logprobs, said, nll, q, kept_mass, weights = jax.jit(compute)(params)
    total = float(-said.logprob.sum())
    return {
        "attention weights of position 1": weights,
        "final norm at position 0": hidden[0],
        "final norm at position 1": hidden[1],
        "logits of a, b, c at position 0": logits[0],
        "logits of a, b, c at position 1": logits[1],
        "P(a), P(b), P(c) after a": np.exp(logprobs[0]),
        "P(a), P(b), P(c) after a b": np.exp(logprobs[1]),
        "logprob of b after a, of c after a b": said.logprob,
        "rank of b after a, of c after a b": said.rank,
        "entropy after a, after a b": said.entropy,
        "-log P(b, c given a), loss, perplexity, bits per byte": [
            total, float(nll), perplexity(total, 2), bits_per_byte(total, 2)
        ],
        "q(a), q(b) after a b, temperature 0.5, top-k 2": q,
        "kept mass of these": kept_mass,
    }  # fmt: skip
