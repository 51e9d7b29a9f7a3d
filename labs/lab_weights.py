"""1.5: What is in a checkpoint: every tensor of the embedded model, in its file and in memory.

Predicts the bytes of each kind of tensor from its shape and from the size of a group of quantized numbers.
Measures them as the distances between the tensors in the file. Then builds the model and compares the bytes
of its parts in memory: a part that is built twice is counted twice.

\b
pdm run lab weights
pdm run lab weights --json
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import prod
from typing import NamedTuple

from tiny_llm.loader import load_model
from tiny_llm.model import Model

from result import Column, Line, Pair, Picture, Point, Progress, Result, Table, percent
from tiny_llm_checkpoints.checkpoint import Checkpoint
from tiny_llm_checkpoints.embedded import embedded_model_path
from tiny_llm_checkpoints.gguf_format import GGUFFile, read_gguf_header
from tiny_llm_checkpoints.model_config import ModelConfig
from tiny_llm_checkpoints.readers import read_checkpoint
from tiny_llm_cli.facts import bytes_of

ROLES = {
    "embed_tokens": "ids to vectors; vectors to logits",
    "input_layernorm": "norm before attention",
    "self_attn.q_proj": "to 9 queries of 64",
    "self_attn.k_proj": "to 3 keys of 64",
    "self_attn.v_proj": "to 3 values of 64",
    "self_attn.o_proj": "from 9 heads to a vector",
    "post_attention_layernorm": "norm before the MLP",
    "mlp.gate_proj": "to 1,536 gates",
    "mlp.up_proj": "to 1,536 values",
    "mlp.down_proj": "back to a vector",
    "norm": "norm before the logits",
}
GROUPS = {"Q4_1": (32, 20), "Q8_0": (32, 34), "F32": (1, 4)}  # numbers, and their bytes in a file
IN_MEMORY = {**GROUPS, "Q8_0": (32, 36)}  # MLX's layout has a scale and a bias for every group


class Tensor(NamedTuple):
    """A tensor of the file. kind: its name without the layer and `.weight`; stored: its type in GGUF."""

    name: str
    kind: str
    shape: tuple[int, ...]
    stored: str
    nbytes: int

    @property
    def size(self) -> int:
        """The number of parameters."""
        return prod(self.shape)

    def predicted(self, groups: Mapping[str, tuple[int, int]]) -> int:
        """Bytes by the shape and the size of a group."""
        numbers, nbytes = groups[self.stored]
        return self.size // numbers * nbytes


class Part(NamedTuple):
    """A part of the model: parameters, and its bytes in memory."""

    name: str
    parameters: int
    nbytes: Pair


def measure(progress: Progress) -> Result:
    """Read the file's header, then build the model."""
    path = embedded_model_path()
    header, checkpoint = read_gguf_header(path), read_checkpoint(path)
    progress("weights: building the model", 0, 1)
    model = load_model(path).model
    progress("weights", 1, 1)
    tensors = list(_tensors(header, checkpoint))
    parts = list(_parts(tensors, model, checkpoint.config))
    in_file, in_memory = sum(one.nbytes for one in tensors), sum(part.nbytes.measured for part in parts)
    return Result(
        title="The embedded model, tensor by tensor",
        question="What is in a checkpoint, and what does each part of it cost?",
        tables=[_table_of_tensors(tensors), _table_of_file(header, tensors), _table_of_parts(parts)],
        conclusion=(
            f"{len(tensors)} tensors with {checkpoint.config.num_parameters:,} parameters take {in_file:,} "
            f"bytes in the file and {in_memory:,.0f} in memory: "
            f"{8 * in_memory / checkpoint.config.num_parameters:.2f} bits for each parameter."
        ),
        picture=_picture(tensors, checkpoint.config),
    )


def _tensors(header: GGUFFile, checkpoint: Checkpoint) -> Iterator[Tensor]:
    """The tensors in the order of `parameter_shapes`; a tensor ends where the next one in the file starts."""
    end = header.path.stat().st_size
    starts = sorted(tensor.offset for tensor in header.tensors.values())
    lengths = {start: stop - start for start, stop in pairwise([*starts, end])}
    for name in checkpoint.config.parameter_shapes:
        stored = header.tensors[checkpoint.tensors[name].name]
        yield Tensor(name, _kind(name), stored.shape, stored.type.name, lengths[stored.offset])


def _kind(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `mlp.up_proj`."""
    short = name.removeprefix("model.").removesuffix(".weight")
    return short.split(".", 2)[2] if short.startswith("layers.") else short


def _parts(tensors: list[Tensor], model: Model, config: ModelConfig) -> Iterator[Part]:
    """The parts of the model in memory; the rotary frequencies are computed, not read."""
    layers = model.layers
    found = {
        "embedding, also the output": (("embed_tokens",), [model.embed_tokens, model.lm_head]),
        "matrices of attention": (
            tuple(kind for kind in ROLES if kind.startswith("self_attn")),
            [matrix for block in layers for matrix in (block.self_attn.qkv_proj, block.self_attn.o_proj)],
        ),
        "matrices of the MLPs": (
            tuple(kind for kind in ROLES if kind.startswith("mlp")),
            [block.mlp for block in layers],
        ),
        "norms": (
            ("input_layernorm", "post_attention_layernorm", "norm"),
            [
                model.norm,
                *(
                    norm
                    for block in layers
                    for norm in (block.input_layernorm, block.post_attention_layernorm)
                ),
            ],
        ),
    }
    for name, (kinds, nodes) in found.items():
        own = [tensor for tensor in tensors if tensor.kind in kinds]
        predicted = sum(tensor.predicted(IN_MEMORY) for tensor in own)
        yield Part(name, sum(tensor.size for tensor in own), Pair(predicted, bytes_of(*nodes)))
    frequencies = [block.self_attn.inv_freq for block in layers]
    yield Part("rotary frequencies", 0, Pair(config.head_dim // 2 * 4, bytes_of(*frequencies)))


def _table_of_tensors(tensors: list[Tensor]) -> Table:
    rows = []
    for kind, role in ROLES.items():
        same = [tensor for tensor in tensors if tensor.kind == kind]
        predicted = sum(tensor.predicted(GROUPS) for tensor in same)
        shape = " x ".join(f"{size:,}" for size in same[0].shape)
        nbytes = Pair(predicted, sum(tensor.nbytes for tensor in same))
        rows.append((kind, role, len(same), shape, same[0].stored, nbytes))
    return Table(
        "The tensors of the file; of each kind, all layers together",
        [
            Column("kind", "tensor"),
            Column("role", "role"),
            Column("count", "tensors"),
            Column("shape", "shape of each"),
            Column("stored", "stored as"),
            Column("bytes", "bytes", "{:,.0f}".format),
        ],
        rows,
    )


def _table_of_file(header: GGUFFile, tensors: list[Tensor]) -> Table:
    texts = [header.metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges")]
    tokenizer = sum(8 + len(text.encode()) for part in texts for text in part) + 4 * len(texts[0])
    measured = sum(tensor.nbytes for tensor in tensors)
    return Table(
        "The file",
        [Column("what", "what"), Column("bytes", "bytes", "{:,.0f}".format)],
        [
            ("header; predicted: only the tokenizer", Pair(tokenizer, header.path.stat().st_size - measured)),
            ("tensors", Pair(sum(tensor.predicted(GROUPS) for tensor in tensors), measured)),
        ],
    )


def _table_of_parts(parts: list[Part]) -> Table:
    parameters = sum(part.parameters for part in parts)
    predicted, measured = (sum(part.nbytes[place] for part in parts) for place in (0, 1))
    total = Part("all", parameters, Pair(predicted, measured))
    return Table(
        "The model in memory",
        [
            Column("part", "part"),
            Column("parameters", "parameters"),
            Column("share", "of all", percent),
            Column("bytes", "bytes", "{:,.0f}".format),
            Column("share_bytes", "of all bytes", percent),
        ],
        [
            (
                part.name,
                part.parameters,
                part.parameters / parameters,
                part.nbytes,
                part.nbytes.measured / measured,
            )
            for part in (*parts, total)
        ],
    )


def _picture(tensors: list[Tensor], config: ModelConfig) -> Picture:
    """The bytes of the file up to each layer."""

    def line(name: str, is_predicted: bool) -> Line:
        points = []
        for num_layers in range(config.num_hidden_layers + 1):
            first = [one for one in tensors if _layer(one) < num_layers]
            total = sum(one.predicted(GROUPS) if is_predicted else one.nbytes for one in first)
            points.append(Point(num_layers, total / 2**20))
        return Line(name, points, is_predicted)

    return Picture(
        title="The embedding and the first layers of the embedded model",
        x="layers",
        y="size in the file (MiB)",
        lines=[line("embedding and layers", True), line("embedding and layers", False)],
    )


def _layer(tensor: Tensor) -> int:
    """The layer of a tensor; -1 for the embedding, and more than any layer for the last norm."""
    if tensor.kind == "embed_tokens":
        return -1
    return int(tensor.name.split(".")[2]) if ".layers." in tensor.name else 1 << 30
