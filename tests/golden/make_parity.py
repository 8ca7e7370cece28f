"""Write golden/parity/*.json: what openai-whisper itself makes of our test clips.

Run where openai-whisper is installed (``make peers``):
    .venv-peers/bin/python tests/golden/make_parity.py NAME MODEL_DIR CLIP...
MODEL_DIR is a Hugging Face checkpoint; its weights are loaded into openai-whisper's model by
name, so that both sides decode with the very same numbers.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
import whisper
from safetensors.torch import load_file

RENAMES = (
    (r"^model\.", ""),
    (r"\.layers\.", ".blocks."),
    (r"self_attn_layer_norm", "attn_ln"),
    (r"encoder_attn_layer_norm", "cross_attn_ln"),
    (r"encoder_attn", "cross_attn"),
    (r"self_attn", "attn"),
    (r"q_proj", "query"),
    (r"k_proj", "key"),
    (r"v_proj", "value"),
    (r"out_proj", "out"),
    (r"final_layer_norm", "mlp_ln"),
    (r"fc1", "mlp.0"),
    (r"fc2", "mlp.2"),
    (r"encoder\.layer_norm", "encoder.ln_post"),
    (r"decoder\.layer_norm", "decoder.ln"),
    (r"decoder\.embed_tokens", "decoder.token_embedding"),
    (r"encoder\.embed_positions\.weight", "encoder.positional_embedding"),
    (r"decoder\.embed_positions\.weight", "decoder.positional_embedding"),
)


def load(directory: Path) -> whisper.Whisper:
    config = json.loads((directory / "config.json").read_text())
    model = whisper.Whisper(
        whisper.ModelDimensions(
            n_mels=config["num_mel_bins"],
            n_audio_ctx=config["max_source_positions"],
            n_audio_state=config["d_model"],
            n_audio_head=config["encoder_attention_heads"],
            n_audio_layer=config["encoder_layers"],
            n_vocab=config["vocab_size"],
            n_text_ctx=config["max_target_positions"],
            n_text_state=config["d_model"],
            n_text_head=config["decoder_attention_heads"],
            n_text_layer=config["decoder_layers"],
        )
    )
    state = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor.float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all("alignment" in name or "mask" in name for name in missing), missing
    return model.eval()


def main(name: str, directory: str, *clips: str) -> None:
    model = load(Path(directory))
    results = []
    for clip in clips:
        audio = torch.from_numpy(whisper.load_audio(clip))
        # 30 s of features as transcribe() makes them: the clip, then silence.
        mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(audio), model.dims.n_mels)
        for beam_size in (None, 5):
            options = whisper.DecodingOptions(language="en", fp16=False, beam_size=beam_size)
            result = whisper.decode(model, mel, options)
            results.append(
                {
                    "clip": Path(clip).name,
                    "beam_size": beam_size,
                    "tokens": result.tokens,
                    "text": result.text,
                    "avg_logprob": result.avg_logprob,
                    "no_speech_prob": result.no_speech_prob,
                }
            )
    output = Path(__file__).parent / "parity" / f"{name}.json"
    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
