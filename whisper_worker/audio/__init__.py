"""Audio in: fetch, decode to 16 kHz mono, find speech, cut windows."""
