"""One speech engine in a process of its own, spoken to in JSON lines.

Run by common.py, for the worker itself with the project's Python and for other
implementations with theirs; it therefore imports nothing of the project at its top. A
process of its own keeps memory, CPU time and import costs of engines apart.

The first argument is a JSON object: ``engine`` and what that engine needs (directories of
the model, ``threads``, ``beam_size``, ``batch_size``; ``cold`` to transcribe without loading
first). Standard output gives one object when the engine is loaded, then one for each request
that comes in on standard input: ``{"audio", "language", "word_timestamps"}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

Answer = dict[str, Any]
Transcribe = Callable[[str, "str | None", bool], Answer]
"""Audio file, language or None to detect it, word times wanted; gives text, language, segments."""


def ours(spec: dict[str, Any]) -> Transcribe:
    """The worker through its service layer; the environment holds its settings."""
    from whisper_worker.errors import WhisperWorkerError
    from whisper_worker.schema import transcript_to_dict
    from whisper_worker.service import Service
    from whisper_worker.settings import Settings
    from whisper_worker.types import AudioSource, JobInput, TranscribeOptions

    service = Service(Settings.from_env())
    if not spec.get("cold"):
        service.load()

    def transcribe(audio: str, language: str | None, word_timestamps: bool) -> Answer:
        options = TranscribeOptions(
            language=language, word_timestamps=word_timestamps, beam_size=spec.get("beam_size") or None
        )
        try:
            transcript = service.transcribe(JobInput(source=AudioSource(path=Path(audio)), options=options))
        except WhisperWorkerError as error:
            return {"error": error.to_dict()}
        return transcript_to_dict(transcript)

    return transcribe


def faster_whisper(spec: dict[str, Any]) -> Transcribe:
    """faster-whisper, one window after another or, with ``batch_size``, in batches; int8 but for a ``compute_type``."""
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    compute_type = spec.get("compute_type", "int8")
    model = WhisperModel(spec["ct2_dir"], device="cpu", compute_type=compute_type, cpu_threads=spec["threads"])
    engine: Any = model
    more: dict[str, int] = {}
    if spec["batch_size"]:
        engine, more = BatchedInferencePipeline(model), {"batch_size": spec["batch_size"]}

    def transcribe(audio: str, language: str | None, word_timestamps: bool) -> Answer:
        segments, info = engine.transcribe(
            audio, language=language, beam_size=spec["beam_size"], word_timestamps=word_timestamps, **more
        )
        listed = [
            {
                "start": segment.start,
                "end": segment.end,
                "text": segment.text,
                "words": [{"word": w.word, "start": w.start, "end": w.end} for w in segment.words or ()],
            }
            for segment in segments
        ]
        return {"text": "".join(s["text"] for s in listed), "language": info.language, "segments": listed}

    return transcribe


def openai_whisper(spec: dict[str, Any]) -> Transcribe:
    """openai-whisper in float32, given the checkpoint's weights under its own names for them."""
    import torch
    import whisper
    from safetensors.torch import load_file

    torch.set_num_threads(spec["threads"])
    model_dir = Path(spec["model_dir"])
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    dims = whisper.ModelDimensions(
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
    renames = (
        ("model.", ""),
        ("layers.", "blocks."),
        ("encoder_attn_layer_norm", "cross_attn_ln"),
        ("self_attn_layer_norm", "attn_ln"),
        ("final_layer_norm", "mlp_ln"),
        ("encoder_attn.", "cross_attn."),
        ("self_attn.", "attn."),
        ("q_proj", "query"),
        ("k_proj", "key"),
        ("v_proj", "value"),
        ("out_proj", "out"),
        ("fc1", "mlp.0"),
        ("fc2", "mlp.2"),
        ("encoder.embed_positions.weight", "encoder.positional_embedding"),
        ("decoder.embed_positions.weight", "decoder.positional_embedding"),
        ("decoder.embed_tokens", "decoder.token_embedding"),
        ("encoder.layer_norm", "encoder.ln_post"),
        ("decoder.layer_norm", "decoder.ln"),
    )
    weights = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if name == "proj_out.weight":
                continue  # the token embedding once more
            for hugging_face, openai in renames:
                name = name.replace(hugging_face, openai)
            weights[name] = tensor.float()
    model = whisper.model.Whisper(dims)
    model.load_state_dict(weights)
    generation = json.loads((model_dir / "generation_config.json").read_text(encoding="utf-8"))
    if generation.get("alignment_heads"):
        heads = torch.zeros(dims.n_text_layer, dims.n_text_head, dtype=torch.bool)
        for layer, head in generation["alignment_heads"]:
            heads[layer, head] = True
        model.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
    model.eval()

    def transcribe(audio: str, language: str | None, word_timestamps: bool) -> Answer:
        result = model.transcribe(
            audio,
            language=language if model.is_multilingual else "en",
            word_timestamps=word_timestamps,
            beam_size=spec["beam_size"] if spec["beam_size"] > 1 else None,
            fp16=False,
        )
        return {"text": result["text"], "language": result["language"], "segments": result["segments"]}

    return transcribe


def transformers_pipeline(spec: dict[str, Any]) -> Transcribe:
    """The stock pipeline in float32, 30 s chunks in batches, without the beam search it defaults to."""
    import torch
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

    torch.set_num_threads(spec["threads"])
    model = AutoModelForSpeechSeq2Seq.from_pretrained(spec["model_dir"], dtype=torch.float32)
    auto_processor: Any = AutoProcessor
    processor = auto_processor.from_pretrained(spec["processor_dir"])
    engine: Any = pipeline(
        "automatic-speech-recognition",
        model=model,
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
        chunk_length_s=30,
        batch_size=spec["batch_size"],
    )

    def transcribe(audio: str, language: str | None, word_timestamps: bool) -> Answer:
        decoding: dict[str, Any] = {"num_beams": spec["beam_size"]}
        if model.generation_config.is_multilingual:
            decoding |= {"task": "transcribe", "language": language}
        result = engine(audio, return_timestamps="word" if word_timestamps else True, generate_kwargs=decoding)
        pieces = []
        for chunk in result["chunks"]:
            start, end = chunk["timestamp"]
            piece = {"start": start, "end": start if end is None else end, "text": chunk["text"]}
            if word_timestamps:
                piece["words"] = [{"word": piece["text"], "start": piece["start"], "end": piece["end"]}]
            pieces.append(piece)
        return {"text": result["text"], "language": language, "segments": pieces}

    return transcribe


def convert_to_ct2(spec: dict[str, Any]) -> None:
    """Write a checkpoint as CTranslate2 float16 with the files that faster-whisper looks for."""
    import shutil
    import tempfile

    from ctranslate2.converters import TransformersConverter

    with tempfile.TemporaryDirectory() as folder:
        for source in (spec["model_dir"], spec["processor_dir"]):
            for path in Path(source).iterdir():
                link = Path(folder) / path.name
                if path.is_file() and not link.exists():
                    link.symlink_to(path.resolve())
        TransformersConverter(folder, load_as_float16=True).convert(spec["ct2_dir"], quantization="float16")
    for name in ("tokenizer.json", "preprocessor_config.json"):
        for source in (spec["processor_dir"], spec["model_dir"]):
            if (Path(source) / name).is_file():
                shutil.copy(Path(source) / name, spec["ct2_dir"])
                break


ENGINES: dict[str, Callable[[dict[str, Any]], Transcribe]] = {
    "ours": ours,
    "faster-whisper": faster_whisper,
    "openai-whisper": openai_whisper,
    "transformers": transformers_pipeline,
}


def peak_mb() -> float:
    """Largest resident memory of this process alone, in MB of 2**20 bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("the kernel tells no peak memory")


def cpu_seconds() -> float:
    """CPU time of this process and of the children that have ended (ffmpeg)."""
    return sum(os.times()[:4])


def own_stdout() -> TextIO:
    """Standard output for us alone: what libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return replies


def main() -> None:
    spec = json.loads(sys.argv[1])
    replies = own_stdout()
    # This file's directory: libraries try whether there is a package of a name that a tool here bears.
    sys.path.pop(0)
    if spec["engine"] == "convert":
        convert_to_ct2(spec)
        return
    began = time.perf_counter()
    transcribe = ENGINES[spec["engine"]](spec)
    print(json.dumps({"load_s": time.perf_counter() - began}), file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        wall, cpu = time.perf_counter(), cpu_seconds()
        try:
            answer = transcribe(request["audio"], request["language"], request["word_timestamps"])
        except Exception as error:
            answer = {"crash": f"{type(error).__name__}: {error}"}
        answer |= {"wall_s": time.perf_counter() - wall, "cpu_s": cpu_seconds() - cpu, "peak_mb": peak_mb()}
        print(json.dumps(answer), file=replies)


if __name__ == "__main__":
    main()
