"""CTranslate2 conversions come back as the checkpoints they were made of.

The conversions are written here, byte by byte, from random checkpoints: fused, aliased and
quantised as the format has it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from whisper_worker.cache import ct2
from whisper_worker.cache.tokenizer_files import Vocabulary
from whisper_worker.errors import ModelError

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH, HIDDEN, HEADS, MELS, ENCODER_LAYERS, DECODER_LAYERS = 8, 16, 2, 128, 2, 3
TYPE_NUMBERS = {"float32": 0, "int8": 1, "int16": 2, "float16": 4, "bfloat16": 5}
LANGUAGES = ("<|en|>", "<|zh|>", "<|de|>")


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins of the 256 bytes, in the order of their ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]


def vocabulary(*, multilingual: bool) -> list[str]:
    """A small vocabulary of Whisper's build; padded to the real size, by which the kinds are told apart."""
    merged = ["Ġt", "he", "Ġa", "in", "Ġthe", "re", "er", "Ġthere", "Ġin"]
    size = 51865 if multilingual else 51864
    special = ["<|endoftext|>", "<|startoftranscript|>", *LANGUAGES, "<|translate|>", "<|transcribe|>"]
    special += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    times = [f"<|{0.02 * number:.2f}|>" for number in range(1501)]
    fill = [f"Ġq{number}z" for number in range(size - 256 - len(merged) - len(special) - len(times))]
    return [*byte_symbols(), *merged, *fill, *special, *times]


def checkpoint(size: int, seed: int = 0) -> dict[str, Array]:
    """Random weights under Hugging Face's names, exactly representable in bfloat16."""
    random = np.random.default_rng(seed)
    weights: dict[str, Array] = {}

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape).astype(np.float32)
        weights[name] = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)

    def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> None:
        add(f"{name}.weight", rows, columns)
        if bias:
            add(f"{name}.bias", rows)

    def norm(name: str) -> None:
        add(f"{name}.weight", WIDTH)
        add(f"{name}.bias", WIDTH)

    for side, layers in (("encoder", ENCODER_LAYERS), ("decoder", DECODER_LAYERS)):
        for layer in range(layers):
            prefix = f"model.{side}.layers.{layer}"
            for attention in ("self_attn", "encoder_attn")[: 1 if side == "encoder" else 2]:
                norm(f"{prefix}.{attention}_layer_norm")
                for part in "qkv":
                    linear(f"{prefix}.{attention}.{part}_proj", WIDTH, WIDTH, bias=part != "k")
                linear(f"{prefix}.{attention}.out_proj", WIDTH, WIDTH)
            norm(f"{prefix}.final_layer_norm")
            linear(f"{prefix}.fc1", HIDDEN, WIDTH)
            linear(f"{prefix}.fc2", WIDTH, HIDDEN)
        norm(f"model.{side}.layer_norm")
        add(f"model.{side}.embed_positions.weight", 12 if side == "encoder" else 10, WIDTH)
    add("model.encoder.conv1.weight", WIDTH, MELS, 3)
    add("model.encoder.conv1.bias", WIDTH)
    add("model.encoder.conv2.weight", WIDTH, WIDTH, 3)
    add("model.encoder.conv2.bias", WIDTH)
    add("model.decoder.embed_tokens.weight", size, WIDTH)
    return weights


def converted(weights: Mapping[str, Array]) -> dict[str, Array]:
    """The same weights as CTranslate2 names and fuses them, in float32."""
    out: dict[str, Array] = {}

    def linear(target: str, *sources: str) -> None:
        out[f"{target}/weight"] = np.concatenate([weights[f"{source}.weight"] for source in sources])
        biases = [weights.get(f"{source}.bias", np.zeros(WIDTH, np.float32)) for source in sources]
        out[f"{target}/bias"] = np.concatenate(biases)

    def norm(target: str, source: str) -> None:
        out[f"{target}/gamma"], out[f"{target}/beta"] = weights[f"{source}.weight"], weights[f"{source}.bias"]

    for side, layers in (("encoder", ENCODER_LAYERS), ("decoder", DECODER_LAYERS)):
        for layer in range(layers):
            source, target = f"model.{side}.layers.{layer}", f"{side}/layer_{layer}"
            norm(f"{target}/self_attention/layer_norm", f"{source}.self_attn_layer_norm")
            linear(f"{target}/self_attention/linear_0", *(f"{source}.self_attn.{part}_proj" for part in "qkv"))
            linear(f"{target}/self_attention/linear_1", f"{source}.self_attn.out_proj")
            if side == "decoder":
                norm(f"{target}/attention/layer_norm", f"{source}.encoder_attn_layer_norm")
                linear(f"{target}/attention/linear_0", f"{source}.encoder_attn.q_proj")
                linear(f"{target}/attention/linear_1", *(f"{source}.encoder_attn.{part}_proj" for part in "kv"))
                linear(f"{target}/attention/linear_2", f"{source}.encoder_attn.out_proj")
            norm(f"{target}/ffn/layer_norm", f"{source}.final_layer_norm")
            linear(f"{target}/ffn/linear_0", f"{source}.fc1")
            linear(f"{target}/ffn/linear_1", f"{source}.fc2")
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        out[f"{side}/position_encodings/encodings"] = weights[f"model.{side}.embed_positions.weight"]
    for name in ("conv1", "conv2"):
        out[f"encoder/{name}/weight"] = weights[f"model.encoder.{name}.weight"]
        out[f"encoder/{name}/bias"] = weights[f"model.encoder.{name}.bias"]
    out["decoder/embeddings/weight"] = weights["model.decoder.embed_tokens.weight"]
    return out


Typed = tuple[str, Array]


def quantised(tensors: Mapping[str, Array], kind: str) -> dict[str, Typed]:
    """As the converter stores them: matrices as integers with their scales, the rest as floats."""
    floats = kind.partition("_")[2] or ("float32" if kind.startswith("int") else kind)
    out: dict[str, Typed] = {}
    for name, tensor in tensors.items():
        if kind.startswith("int") and name.endswith("/weight"):
            if kind == "int16":
                scale = np.array(2**10 / np.abs(tensor).max(), np.float32)
                out[name] = ("int16", np.rint(tensor * scale).astype(np.int16))
            else:
                rows = tensor.reshape(tensor.shape[0], -1)
                scale = (127 / np.abs(rows).max(axis=1)).astype(np.float32)
                out[name] = ("int8", np.rint(rows * scale[:, None]).astype(np.int8).reshape(tensor.shape))
            out[f"{name}_scale"] = ("float32", scale)
        elif floats == "bfloat16":
            out[name] = ("bfloat16", (tensor.view(np.uint32) >> np.uint32(16)).astype(np.uint16))
        else:
            out[name] = (floats, tensor.astype(floats))
    return out


def scalars() -> dict[str, Typed]:
    return {
        "encoder/num_heads": ("int16", np.array(HEADS, np.int16)),
        "decoder/num_heads": ("int16", np.array(HEADS, np.int16)),
        "encoder/pre_norm": ("int8", np.array(1, np.int8)),
        "decoder/activation": ("int8", np.array(3, np.int8)),
    }


def model_bin(tensors: Mapping[str, Typed], *, kind: str = "WhisperSpec", version: int = 6) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    out = [struct.pack("<I", version), text(kind), struct.pack("<II", 3, len(tensors))]
    for name, (dtype, data) in tensors.items():
        out += [text(name), struct.pack("<B", data.ndim), *(struct.pack("<I", n) for n in data.shape)]
        out += [struct.pack("<BI", TYPE_NUMBERS[dtype], data.nbytes), data.tobytes()]
    out += [struct.pack("<I", 1), text("decoder/projection/weight"), text("decoder/embeddings/weight")]
    return b"".join(out)


def write_conversion(directory: Path, weights: Mapping[str, Array], kind: str, tokens: list[str]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.bin").write_bytes(model_bin({**scalars(), **quantised(converted(weights), kind)}))
    (directory / "vocabulary.json").write_text(json.dumps(tokens))
    config = {"alignment_heads": [[1, 0], [2, 1]], "suppress_ids": [1, 2, 7], "suppress_ids_begin": [220]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def convert(source: Path, target: Path, dtype: Any = None) -> tuple[str, dict[str, Array]]:
    for name in ("model", "processor"):
        (target / name).mkdir(parents=True)
    written = ct2.convert(source, target / "model", target / "processor", dtype)
    return written, load_file(target / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def multilingual() -> list[str]:
    return vocabulary(multilingual=True)


@pytest.fixture(scope="module")
def weights(multilingual: list[str]) -> dict[str, Array]:
    return checkpoint(len(multilingual))


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "int8", "int8_float16", "int8_bfloat16", "int16"])
def test_weights_come_back(tmp_path: Path, weights: dict[str, Array], multilingual: list[str], kind: str) -> None:
    source = write_conversion(tmp_path / "ct2", weights, kind, multilingual)
    written, back = convert(source, tmp_path / "kept")
    assert written == ("float16" if kind == "float16" else "float32")
    assert back.keys() == weights.keys()
    for name, original in weights.items():
        assert back[name].shape == original.shape
        assert back[name].dtype == written
        if "int" not in kind:
            assert np.array_equal(back[name], original.astype(written)), name
        else:
            # Half a step of the coarsest row, and what float16 loses on biases and norms.
            step = np.abs(original).max() / (2**10 if kind == "int16" else 127) if name.endswith("weight") else 0
            assert np.abs(back[name] - original).max() <= 0.51 * step + 2e-3, name


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_type_asked_for_is_written(
    tmp_path: Path, weights: dict[str, Array], multilingual: list[str], dtype: str
) -> None:
    written, back = convert(write_conversion(tmp_path / "ct2", weights, "int8", multilingual), tmp_path / "out", dtype)
    assert written == dtype
    assert {str(value.dtype) for value in back.values()} == {dtype}
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["torch_dtype"] == dtype


def test_weights_may_be_read_by_everyone(tmp_path: Path, weights: dict[str, Array], multilingual: list[str]) -> None:
    """An image is built as root, and its worker may run as somebody else."""
    convert(write_conversion(tmp_path / "ct2", weights, "float16", multilingual), tmp_path / "out")
    assert (tmp_path / "out" / "model" / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_configurations_of_a_multilingual_model(
    tmp_path: Path, weights: dict[str, Array], multilingual: list[str]
) -> None:
    convert(write_conversion(tmp_path / "ct2", weights, "float16", multilingual), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["model_type"] == "whisper"
    assert (config["d_model"], config["num_mel_bins"], config["vocab_size"]) == (WIDTH, MELS, 51865)
    assert (config["encoder_layers"], config["decoder_layers"]) == (ENCODER_LAYERS, DECODER_LAYERS)
    assert (config["encoder_attention_heads"], config["encoder_ffn_dim"]) == (HEADS, HIDDEN)
    assert (config["max_source_positions"], config["max_target_positions"]) == (12, 10)
    generation = json.loads((tmp_path / "out" / "model" / "generation_config.json").read_text())
    assert generation["is_multilingual"] is True
    assert generation["alignment_heads"] == [[1, 0], [2, 1]]
    assert (generation["suppress_tokens"], generation["begin_suppress_tokens"]) == ([1, 2, 7], [220])
    assert list(generation["lang_to_id"]) == list(LANGUAGES)
    for token, number in (
        *generation["lang_to_id"].items(),
        ("<|translate|>", generation["task_to_id"]["translate"]),
        ("<|notimestamps|>", generation["no_timestamps_token_id"]),
        ("<|startofprev|>", generation["prev_sot_token_id"]),
    ):
        assert multilingual[number] == token
    extractor = json.loads((tmp_path / "out" / "processor" / "preprocessor_config.json").read_text())
    assert extractor["feature_size"] == MELS


def test_configurations_of_an_english_model(tmp_path: Path) -> None:
    tokens = vocabulary(multilingual=False)
    source = write_conversion(tmp_path / "ct2", checkpoint(len(tokens)), "float16", tokens)
    (source / "config.json").write_text("{}")
    convert(source, tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "model" / "generation_config.json").read_text())
    assert generation["is_multilingual"] is False
    assert "lang_to_id" not in generation
    # Nothing is said of alignment: the upper half of the decoder's heads.
    assert generation["alignment_heads"] == [[1, 0], [1, 1], [2, 0], [2, 1]]


def test_a_tokenizer_is_built_where_there_is_none(
    tmp_path: Path, weights: dict[str, Array], multilingual: list[str]
) -> None:
    convert(write_conversion(tmp_path / "ct2", weights, "float16", multilingual), tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "processor" / "tokenizer.json"))
    ids = tokenizer.encode(" there in the<|0.50|>", add_special_tokens=False).ids
    assert [multilingual[number] for number in ids] == ["Ġthere", "Ġin", "Ġthe", "<|0.50|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == " there in the<|0.50|>"
    framed = tokenizer.encode(" the").ids
    assert [multilingual[number] for number in framed] == [
        "<|startoftranscript|>",
        "<|notimestamps|>",
        "Ġthe",
        "<|endoftext|>",
    ]


def test_the_sources_tokenizer_is_kept_and_given_its_timestamps(
    tmp_path: Path, weights: dict[str, Array], multilingual: list[str]
) -> None:
    source = write_conversion(tmp_path / "ct2", weights, "float16", multilingual)
    tokenizer: Any = Vocabulary.of_tokens(tuple(multilingual)).tokenizer()
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["special"]]
    tokenizer["model"]["merges"] = [" ".join(merge) for merge in tokenizer["model"]["merges"]]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    convert(source, tmp_path / "out")
    processor = tmp_path / "out" / "processor"
    written = json.loads((processor / "tokenizer.json").read_text())
    assert written["model"] == tokenizer["model"]
    assert [token["id"] for token in written["added_tokens"]][-1] == len(multilingual) - 1
    assert (processor / "merges.txt").read_text().splitlines()[1] == "Ġ t"
    special = json.loads((processor / "special_tokens_map.json").read_text())
    assert "<|en|>" in special["additional_special_tokens"]
    assert "<|0.00|>" not in special["additional_special_tokens"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"decoder/layer_1/ffn/linear_0/weight": None}, "lacks decoder/layer_1/ffn/linear_0/weight"),
        ({"encoder/num_heads": None}, "lacks encoder/num_heads"),
        ({"encoder/pre_norm": ("int8", np.array(0, np.int8))}, "no Whisper model of the known kind"),
        ({"decoder/activation": ("int8", np.array(0, np.int8))}, "no Whisper model of the known kind"),
        (
            {"encoder/layer_0/self_attention/linear_0/bias": ("float32", np.ones(3 * WIDTH, np.float32))},
            "attention keys have a bias",
        ),
        ({"encoder/conv1/weight_scale": None}, "in a way that is not handled"),
        ({"encoder/conv1/weight_zero": ("float32", np.ones(1, np.float32))}, "in a way that is not handled"),
        ({"encoder/layer_norm/beta": ("float32", np.full(WIDTH, np.nan, np.float32))}, "not numbers"),
        ({"encoder/layer_norm/beta": ("float32", np.full(WIDTH, 1e6, np.float32))}, "too large for float16"),
        ({"encoder/layer_norm/beta": ("int8", np.ones(WIDTH, np.int8))}, "in a way that is not handled"),
        ({"encoder/layer_7/ffn/linear_0/weight": ("float32", np.ones(1, np.float32))}, "layers of the encoder"),
    ],
)
def test_foreign_weights_are_refused(
    tmp_path: Path,
    weights: dict[str, Array],
    multilingual: list[str],
    change: dict[str, Typed | None],
    reason: str,
) -> None:
    source = write_conversion(tmp_path / "ct2", weights, "int8", multilingual)
    changed: dict[str, Typed | None] = {**scalars(), **quantised(converted(weights), "int8"), **change}
    (source / "model.bin").write_bytes(model_bin({name: value for name, value in changed.items() if value is not None}))
    with pytest.raises(ModelError, match=reason):
        convert(source, tmp_path / "out", "float16")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"GGUF" * 100, "binary version"),
        (model_bin({}, kind="TransformerSpec"), "'TransformerSpec' model"),
        (model_bin({}, version=99), "binary version 99"),
        (model_bin({})[:-3], "damaged"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(ModelError, match=reason):
        convert(tmp_path, tmp_path / "out")


@pytest.fixture(scope="module")
def small_bin(weights: dict[str, Array]) -> bytes:
    """A conversion with few tokens, small enough to be damaged hundreds of times."""
    return model_bin({**scalars(), **quantised(converted({**weights, **checkpoint(20)}), "int8_float16")})


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_gives_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, small_bin: bytes, data: st.DataObject
) -> None:
    """Cut anywhere, or with any byte of the structure changed: never anything but ModelError."""
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.mkdir(exist_ok=True)
    (path / "vocabulary.json").write_text("[]")
    damaged = bytearray(small_bin)
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    else:
        damaged[data.draw(st.integers(0, 400))] ^= data.draw(st.integers(1, 255))
    (path / "model.bin").write_bytes(bytes(damaged))
    with pytest.raises(ModelError):
        ct2.convert(path, path, path, "float16")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("vocabulary.json", None, "lacks its vocabulary"),
        ("vocabulary.json", "{}", "not a list of tokens"),
        ("vocabulary.json", '["a", "b"]', "2 tokens and its weights 51865"),
        ("config.json", None, r"config\.json is missing"),
        ("config.json", "{", "not JSON"),
        ("tokenizer.json", "[]", "byte-pair"),
        (
            "tokenizer.json",
            '{"added_tokens": [{"content": "<|endoftext|>", "id": 5}], "model": {"vocab": {}, "merges": []}}',
            "disagree on",
        ),
    ],
)
def test_damaged_companions_are_refused(
    tmp_path: Path,
    weights: dict[str, Array],
    multilingual: list[str],
    name: str,
    content: str | None,
    reason: str,
) -> None:
    source = write_conversion(tmp_path / "ct2", weights, "float16", multilingual)
    if content is None:
        (source / name).unlink()
    else:
        (source / name).write_text(content)
    with pytest.raises(ModelError, match=reason):
        convert(source, tmp_path / "out")


def test_a_vocabulary_as_text_will_do(tmp_path: Path, weights: dict[str, Array], multilingual: list[str]) -> None:
    source = write_conversion(tmp_path / "ct2", weights, "float16", multilingual)
    (source / "vocabulary.json").unlink()
    (source / "vocabulary.txt").write_text("".join(f"{token}\n" for token in multilingual))
    convert(source, tmp_path / "out")
    vocab = json.loads((tmp_path / "out" / "processor" / "vocab.json").read_text())
    assert vocab["Ġthere"] == multilingual.index("Ġthere")
