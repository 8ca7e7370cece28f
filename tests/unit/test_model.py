"""The forward pass against transformers' float32 modules, over random weights of several shapes."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from whisper_worker.engine import weights
from whisper_worker.errors import ModelError

SHAPES = {
    "english": {"vocab_size": 517, "num_mel_bins": 80, "encoder_layers": 2, "decoder_layers": 2, "d_model": 64},
    "distil": {"vocab_size": 523, "num_mel_bins": 80, "encoder_layers": 3, "decoder_layers": 1, "d_model": 128},
    "v3": {"vocab_size": 531, "num_mel_bins": 128, "encoder_layers": 2, "decoder_layers": 3, "d_model": 64},
}


def _reference(shape: str) -> Any:
    """transformers' model with weights large enough that mistakes show."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = SHAPES[shape]
    config = WhisperConfig(
        **sizes,
        encoder_attention_heads=sizes["d_model"] // 32,
        decoder_attention_heads=sizes["d_model"] // 32,
        encoder_ffn_dim=2 * sizes["d_model"],
        decoder_ffn_dim=2 * sizes["d_model"],
        max_target_positions=150,
        attn_implementation="eager",
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=1,
        decoder_start_token_id=2,
    )
    torch.manual_seed(sum(map(ord, shape)))
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
            elif "layer_norm" not in name:
                parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest) -> Any:
    return _reference(request.param)


@pytest.fixture(scope="module")
def checkpoint(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    reference.save_pretrained(directory)
    return directory


all_shapes = pytest.mark.parametrize("reference", SHAPES, indirect=True)
one_shape = pytest.mark.parametrize("reference", ["v3"], indirect=True)


def _mel(reference: Any, n_frames: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(reference.config.num_mel_bins, n_frames, generator=generator).clamp(-1, 1)


def _silence_to_30s(mel: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(mel, (0, 3000 - mel.shape[1]), value=float(mel.min()))


@all_shapes
@torch.no_grad()
def test_float32_equals_transformers_step_by_step(reference: Any, checkpoint: Path) -> None:
    """Encoder and logits, prompt first and then token by token, over full 30 s windows."""
    model = weights.load(checkpoint, "float32", "cpu")
    mels = [_mel(reference, 2900, seed) for seed in range(2)]
    expected_states = reference.model.encoder(torch.stack([_silence_to_30s(mel) for mel in mels])).last_hidden_state
    states = model.encode(mels)
    assert all(torch.allclose(ours, theirs, atol=2e-4) for ours, theirs in zip(states, expected_states, strict=True))
    tokens = torch.randint(0, model.dims.n_vocab, (2, 9))
    expected = reference(encoder_outputs=(expected_states,), decoder_input_ids=tokens).logits
    state = model.new_state(states, 1, 9)
    got = [state.begin(tokens[:, :4].tolist(), [(1, 3)] * 2)]
    got += [state.step(tokens[:, place : place + 1])[:, None] for place in range(4, 9)]
    assert state.length == 9
    assert torch.allclose(torch.cat(got, dim=1), expected[:, [1, 3, 4, 5, 6, 7, 8]], atol=2e-4)


@one_shape
@torch.no_grad()
def test_windows_of_different_lengths_do_not_touch_each_other(reference: Any, checkpoint: Path) -> None:
    model = weights.load(checkpoint, "float32", "cpu")
    states = model.encode([_mel(reference, 310, 1), _mel(reference, 1200, 2)])
    assert [len(s) for s in states] == [350, 750]
    tokens = torch.randint(0, model.dims.n_vocab, (2, 5))
    together = model.new_state(states, 1, 5).step(tokens)
    for row in range(2):
        alone = model.new_state([states[row]], 1, 5).step(tokens[row : row + 1])
        assert torch.allclose(together[row], alone[0], atol=1e-4)


@one_shape
@pytest.mark.parametrize("group", [1, 3])
@torch.no_grad()
def test_prompts_of_different_lengths_do_not_touch_each_other(reference: Any, checkpoint: Path, group: int) -> None:
    """Three prompts begin together, go on, swap beams; the longest leaves. Each as though it were alone."""
    model = weights.load(checkpoint, "float32", "cpu")
    states = model.encode([_mel(reference, 400, 3), _mel(reference, 700, 4), _mel(reference, 150, 5)])
    prompts = [torch.randint(0, model.dims.n_vocab, (n,)) for n in (2, 40, 7)]
    state = model.new_state(states, group, 130)
    got = state.begin([prompt.tolist() for prompt in prompts], [(1, 1), (5, 39), (0, 6)])
    for row, (places, prompt) in enumerate(zip([(1, 1), (5, 39), (0, 6)], prompts, strict=True)):
        expected = model.new_state([states[row]], 1, 40).begin([prompt.tolist()], [places])
        assert torch.allclose(got[row], expected[0], atol=1e-4)
    rows = [prompt for prompt in prompts for _ in range(group)]
    windows = [0, 1, 2]
    for step in range(80):
        order = torch.arange(len(rows)).view(-1, group).roll(step % 2, dims=1).flatten()
        state.reorder_rows(order)
        added = torch.randint(0, model.dims.n_vocab, (len(rows), 1))
        rows = [torch.cat([rows[source], token]) for source, token in zip(order.tolist(), added, strict=True)]
        logits = state.step(added)
        if step == 50:
            state.keep_windows(torch.tensor([0, 2]))
            windows, rows = [0, 2], [*rows[:group], *rows[2 * group :]]
    for place, row in enumerate(rows):
        alone = model.new_state([states[windows[place // group]]], 1, 130)
        assert torch.allclose(logits[place], alone.step(row[None])[0], atol=1e-4)


@one_shape
@torch.no_grad()
def test_rows_of_a_window_share_it_and_can_be_reordered_and_dropped(reference: Any, checkpoint: Path) -> None:
    """Beam search: rows swap inside their window; then the first window leaves."""
    model = weights.load(checkpoint, "float32", "cpu")
    states = model.encode([_mel(reference, 400, 3), _mel(reference, 700, 4), _mel(reference, 150, 5)])
    tokens = torch.randint(0, model.dims.n_vocab, (6, 4))
    state = model.new_state(states, 2, 5)
    state.step(tokens)
    order = torch.tensor([1, 1, 2, 3, 5, 4])
    state.reorder_rows(order)
    state.keep_windows(torch.tensor([1, 2]))
    assert (state.n_windows, state.rows_per_window) == (2, 2)
    last = torch.randint(0, model.dims.n_vocab, (4, 1))
    got = state.step(last)
    for row, (window, source) in enumerate([(1, 2), (1, 3), (2, 5), (2, 4)]):
        alone = model.new_state([states[window]], 1, 5)
        expected = alone.step(torch.cat([tokens[source], last[row]])[None])
        assert torch.allclose(got[row], expected[0], atol=1e-4)


@one_shape
@torch.no_grad()
def test_long_texts_outgrow_the_first_cache(reference: Any, checkpoint: Path) -> None:
    """Prompt and tokens beyond 64, with beams that swap on the way, equal one pass over each row's own past."""
    model = weights.load(checkpoint, "float32", "cpu")
    states = model.encode([_mel(reference, 200, 10)])
    rows = torch.randint(0, model.dims.n_vocab, (2, 60))
    state = model.new_state(states, 2, 140)
    state.step(rows)
    for _ in range(75):
        state.reorder_rows(torch.tensor([1, 0]))
        added = torch.randint(0, model.dims.n_vocab, (2, 1))
        rows = torch.cat([rows.flip(0), added], dim=1)
        got = state.step(added)
    for row in range(2):
        expected = model.new_state(states, 1, 135).step(rows[row : row + 1])
        assert torch.allclose(got[row], expected[0], atol=1e-4)


@one_shape
@torch.no_grad()
def test_a_cache_that_grows_is_never_there_twice(
    reference: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = weights.load(checkpoint, "float32", "cpu")
    state = model.new_state(model.encode([_mel(reference, 200, 10)]), 1, 140)
    state.step(torch.zeros(1, 64, dtype=torch.long))
    layers = [weakref.ref(entries) for entries in state._cache]
    left: list[int] = []
    empty = torch.empty

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        left.append(sum(layer() is not None for layer in layers))
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", counted)
    state.step(torch.zeros(1, 1, dtype=torch.long))
    assert left == list(range(len(layers), 0, -1))
    assert not any(layer() is not None for layer in layers)


@one_shape
@torch.no_grad()
def test_what_nobody_continues_any_more_is_dropped_and_not_missed(reference: Any, checkpoint: Path) -> None:
    """Three beams of two windows that die out in different places, against one pass over each row's own past."""
    model = weights.load(checkpoint, "float32", "cpu")
    states = model.encode([_mel(reference, 200, 10), _mel(reference, 300, 11)])
    rows = torch.randint(0, model.dims.n_vocab, (6, 7))
    state = model.new_state(states, 3, 80)
    state.step(rows)
    for step in range(60):
        # The first window's beams all come from one; the second's keep two apart for a while.
        order = torch.tensor([step % 3] * 3 + ([3, 4, 4] if step % 20 else [5, 5, 5]))
        state.reorder_rows(order)
        added = torch.randint(0, model.dims.n_vocab, (6, 1))
        rows = torch.cat([rows[order], added], dim=1)
        got = state.step(added)
    for row in range(6):
        expected = model.new_state([states[row // 3]], 1, 80).step(rows[row : row + 1])
        assert torch.allclose(got[row], expected[0], atol=1e-4)
    # 3 x 67 would be all of them.
    assert max(own.shape[1] for own in state._continues) < 130


@all_shapes
@torch.no_grad()
def test_cross_attention_equals_transformers(reference: Any, checkpoint: Path) -> None:
    model = weights.load(checkpoint, "float32", "cpu")
    mels = [_mel(reference, 2800, 6), _mel(reference, 600, 7)]
    states = model.encode(mels)
    tokens = torch.randint(0, model.dims.n_vocab, (2, 7))
    heads = [(model.dims.n_text_layer - 1, 1), (0, 0)]
    for row, encoded in enumerate(states):
        attention, hidden = model.cross_attention(encoded, tokens[row], heads)
        expected = reference(
            encoder_outputs=(encoded[None],), decoder_input_ids=tokens[row : row + 1], output_attentions=True
        )
        assert torch.allclose(model.logits(hidden), expected.logits[0], atol=2e-4)
        for place, (layer, head) in enumerate(heads):
            weights_of_head = expected.cross_attentions[layer][0, head]
            assert torch.allclose(attention[place], weights_of_head, atol=1e-5)


@all_shapes
@pytest.mark.parametrize("compute_type", ["bfloat16", "float16", "int8", "int8_float16", "auto"])
@torch.no_grad()
def test_other_compute_types_stay_near_float32(reference: Any, checkpoint: Path, compute_type: str) -> None:
    mels = [_mel(reference, 500, 8), _mel(reference, 900, 9)]
    tokens = torch.randint(0, reference.config.vocab_size, (2, 6))
    logits = []
    for kind in ("float32", compute_type):
        model = weights.load(checkpoint, kind, "cpu")
        state = model.new_state(model.encode(mels), 1, 6)
        parts = (tokens[:, :3], *(tokens[:, place : place + 1] for place in (3, 4, 5)))
        logits.append(torch.stack([state.step(part) for part in parts], 1))
    exact, near = logits
    assert near.dtype == torch.float32
    assert (near - exact).norm() / exact.norm() < 0.05


@one_shape
@pytest.mark.parametrize("group", [1, 3])
@torch.no_grad()
def test_nothing_is_made_on_another_device_than_the_model(reference: Any, checkpoint: Path, group: int) -> None:
    """On torch's device without data, which is as strict about mixing devices as a card."""
    model = weights.load(checkpoint, "float32", "meta")
    encoded = model.encode([_mel(reference, n_frames) for n_frames in (300, 300, 500)])
    state = model.new_state(encoded, group, 40)
    logits = [state.begin([[5, 6], [5, 6], [5, 6, 7]], [[0, 1], [0, 1], [0, 2]])]
    for _ in range(2):
        logits.append(state.step(torch.zeros(3 * group, 1, dtype=torch.long, device="meta")))
        state.reorder_rows(torch.zeros(3 * group, dtype=torch.long, device="meta"))
    attention, hidden = model.cross_attention(encoded[0], torch.zeros(4, dtype=torch.long, device="meta"), [(0, 1)])
    for tensor in (*encoded, *logits, attention, hidden):
        assert tensor.device.type == "meta"


@one_shape
def test_sharded_checkpoints_load(reference: Any, checkpoint: Path, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    mel = _mel(reference, 200)
    whole, sharded = (weights.load(path, "float32", "cpu").encode([mel])[0] for path in (checkpoint, tmp_path))
    assert torch.equal(whole, sharded)


@one_shape
@pytest.mark.parametrize("damage", ["no config", "other model", "cut file", "no file", "no tensor"])
def test_damaged_checkpoints_are_told_without_paths(
    reference: Any, checkpoint: Path, tmp_path: Path, damage: str
) -> None:
    from safetensors.torch import load_file, save_file

    config = json.loads((checkpoint / "config.json").read_text())
    if damage == "other model":
        config["model_type"] = "bert"
    if damage != "no config":
        (tmp_path / "config.json").write_text(json.dumps(config))
    if damage == "cut file":
        (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:5000])
    elif damage == "no tensor":
        tensors = load_file(checkpoint / "model.safetensors")
        del tensors["model.decoder.layers.2.fc1.weight"]
        save_file(tensors, tmp_path / "model.safetensors")
    elif damage != "no file":
        (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    with pytest.raises(ModelError) as error:
        weights.load(tmp_path, "float32", "cpu")
    assert str(tmp_path) not in error.value.message


def test_a_missing_cuda_device_is_told(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError):
        weights.load(tmp_path, "float32", "cuda")
