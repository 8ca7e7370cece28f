"""Self-hosted Whisper transcription: one engine, several doors."""

__version__ = "0.1.0"
