"""How much memory a model of Hugging Face takes on its way in, beside its own float32 parameters.

    python benchmarks/imports.py [--millions 165]

A made-up Llama is written as a folder, once in bfloat16 and once in float32. Each row is a process
of its own: `import-hf` of the folder, and the same weights read onto a mesh of 8 simulated devices,
as `training.init_from` reads them. Each process does the same with a model of one layer before, so
that its libraries are loaded. What is counted is the most memory that it ever had (VmHWM), less
what it had then, in bytes a parameter. The float32 result itself takes 4 of them.
"""

import argparse
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--millions", type=int, default=165, help="parameters of the model")
    millions = parser.parse_args().millions
    print(
        "| folder | what | parameters | bytes a parameter | beside the result |\n"
        + "|---" * 5
        + "|"
    )
    with tempfile.TemporaryDirectory() as made:
        for dtype in ("bfloat16", "float32"):
            folder, small = Path(made, dtype), Path(made, f"{dtype}-small")
            in_process(write, small, dtype, 0)
            parameters = in_process(write, folder, dtype, millions)
            for what in (imported, read_onto_a_mesh):
                taken = in_process(what, folder, small) / parameters
                name = what.__name__.replace("_", " ")
                print(
                    f"| {dtype} | {name} | {parameters:,} | {taken:.2f} | {taken - 4:.2f} |",
                    flush=True,
                )


def in_process(function: Callable[..., int], *arguments: object) -> int:
    """What a function returns in a process of its own, whose memory is nobody else's."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def write(folder: Path, dtype: str, millions: int) -> int:
    """A folder with a Llama of random weights in `dtype`; how many parameters it has."""
    from llm.interop.tensors import save

    width, vocabulary = (768, 32_000) if millions else (192, 8_000)
    hidden = 4 * width
    layer = {
        "input_layernorm": (width,), "post_attention_layernorm": (width,),
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (width, width),
        "self_attn.v_proj": (width, width), "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }  # fmt: skip
    of_layer = sum(map(np.prod, layer.values()))
    count = max(1, round((millions * 10**6 - 2 * vocabulary * width) / of_layer))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        **{
            f"model.layers.{n}.{name}.weight": shape
            for n in range(count)
            for name, shape in layer.items()
        },
        "model.norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }
    random = np.random.default_rng(0)

    def arrays() -> Iterator[np.ndarray]:
        for shape in shapes.values():
            yield 0.02 * random.standard_normal(shape, np.float32)

    folder.mkdir()
    save(shapes, arrays(), folder, dtype)
    described = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": hidden,
        "num_hidden_layers": count, "num_attention_heads": 12, "num_key_value_heads": 12,
        "vocab_size": vocabulary, "max_position_embeddings": 256, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described))
    return int(sum(map(np.prod, shapes.values())))


def imported(folder: Path, small: Path) -> int:
    """Bytes that `import-hf` takes at most."""
    from llm.commands import import_hf

    for each in (small, folder):
        # 256 bytes; the other ids have no token.
        (each / "tokenizer.json").write_text(json.dumps(byte_level_tokenizer()))
        before = memory("VmRSS")
        assert import_hf.main([str(each), f"{each}-run"]) == 0
    return memory("VmHWM") - before


def read_onto_a_mesh(folder: Path, small: Path) -> int:
    """Bytes that the parameters take at most while they are read onto 8 devices (fsdp)."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    import jax

    from llm.config import MeshConfig
    from llm.interop.hf import open_hf
    from llm.model.sharding import make_mesh
    from llm.run.open import reading_shardings
    from llm.runtime import prepare_process

    prepare_process()
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    for each in (small, folder):
        before = memory("VmRSS")
        model = open_hf(each)
        params = model.read(reading_shardings(mesh, model.spec))
    largest = max(
        sum(part.data.nbytes for array in params.values() for part in array.addressable_shards
            if part.device == device)
        for device in jax.devices()
    )  # fmt: skip
    total = sum(array.nbytes for array in params.values())
    assert largest < total / 7, "a device holds more than its share"
    return memory("VmHWM") - before


def byte_level_tokenizer() -> dict:
    """A tokenizer.json of the 256 bytes."""
    from llm.text.tokenizer import byte_of_symbol

    model = {"type": "BPE", "vocab": byte_of_symbol(), "merges": []}
    flags = dict.fromkeys(("add_prefix_space", "use_regex", "trim_offsets"), False)
    byte_level = {"type": "ByteLevel", **flags}
    return {"version": "1.0", "model": model, "pre_tokenizer": byte_level, "decoder": byte_level}


def memory(name: str) -> int:
    """Bytes, of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{name}:\s+(\d+) kB", status)
    assert found, f"{name} is not in /proc/self/status; this needs Linux"
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
