"""Log-mel features, equal to openai/whisper's, of any stretch of a file and in flat memory.

Frame ``k`` is centred on sample ``160 k``. Before its start a file is mirrored, after its end
there is silence (openai/whisper appends 30 s of it), so a stretch's features do not depend on
how the file is cut.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from whisper_worker.types import SAMPLE_RATE

Waveform = NDArray[np.int16] | NDArray[np.float32] | Tensor

N_FFT = 400
HOP = 160
LEAST_FRAMES = 1200
"""What is said in a window shorter than this is heard better with silence behind it: the model was trained on 30 s."""

_CHUNK_FRAMES = 1000
_SMALLEST = 1e-10


def log_mel(
    waveform: Waveform,
    n_mels: int,
    start: int = 0,
    stop: int | None = None,
    peak: float | None = None,
) -> Tensor:
    """Features of the samples ``[start, stop)`` of a file as float32 ``(n_mels, n_frames)``.

    ``waveform`` is the whole file, int16 or float32 in -1..1; ``start`` is a multiple of 160, and a last
    frame that is only begun counts. ``peak`` is :func:`log_mel_peak` of the file; left out, the maximum of
    the stretch itself is taken. Values lie in ``[(peak - 4) / 4, (peak + 4) / 4]``.
    """
    samples = np.asarray(waveform)
    first = start // HOP
    last = first + math.ceil(((len(samples) if stop is None else stop) - start) / HOP)
    mel = torch.empty(n_mels, last - first)
    for at in range(first, last, _CHUNK_FRAMES):
        part = mel[:, at - first : at - first + _CHUNK_FRAMES]
        torch.mm(_filters(n_mels), _power(_frames(samples, at, at + part.shape[1])).T, out=part)
    mel.clamp_(min=_SMALLEST).log10_()
    if peak is None and mel.numel():
        peak = float(mel.max())
    return mel if peak is None else mel.clamp_(min=peak - 8.0).add_(4.0).div_(4.0)


def with_silence(mel: Tensor, n_frames: int) -> Tensor:
    """``mel`` ``(n_mels, n)`` with silence (its own floor) behind it, so that it has ``n_frames`` at least."""
    return F.pad(mel, (0, max(0, n_frames - mel.shape[1])), value=float(mel.min()))


def log_mel_peak(waveform: Waveform, n_mels: int) -> float:
    """The largest log10 mel power of a file, its memory flat however long the file is.

    A mel power is at most the frame's energy times the filters' largest weight (Parseval), so frames whose
    energy cannot reach the largest power so far, nearly all of them, are not transformed.
    """
    samples = np.asarray(waveform)
    filters = _filters(n_mels)
    # Half of the N_FFT sums of Parseval's theorem: a real signal's spectrum holds everything twice.
    largest_share = N_FFT / 2 * float(filters.max()) * 1.001
    n_frames = math.ceil(len(samples) / HOP)
    peak = _SMALLEST
    for at in range(0, n_frames, _CHUNK_FRAMES):
        frames = _frames(samples, at, min(at + _CHUNK_FRAMES, n_frames))
        candidates = frames[torch.linalg.vector_norm(frames, dim=1) ** 2 * largest_share > peak]
        if len(candidates):
            peak = max(peak, float((filters @ _power(candidates).T).max()))
    return math.log10(peak)


def _frames(samples: NDArray[np.int16] | NDArray[np.float32], first: int, last: int) -> Tensor:
    """The frames ``[first, last)`` under the window, float32 ``(last - first, 400)``."""
    begin, end = first * HOP - N_FFT // 2, (last - 1) * HOP + N_FFT // 2
    part = samples[max(0, begin) : min(len(samples), end)]
    scaled = torch.from_numpy(part.astype(np.float32))
    if part.dtype == np.int16:
        scaled /= 32768
    if begin < 0:
        # Mirrored about sample 0; what the file is too short for stays silent.
        mirrored = scaled[1 : 1 - begin].flip(0)
        scaled = torch.cat([scaled.new_zeros(-begin - len(mirrored)), mirrored, scaled])
    scaled = F.pad(scaled, (0, end - begin - len(scaled)))
    return scaled.unfold(0, N_FFT, HOP) * _window()


def _power(frames: Tensor) -> Tensor:
    """Power spectrum ``(n, 201)``."""
    spectrum: Tensor = torch.fft.rfft(frames)
    return spectrum.real.square() + spectrum.imag.square()


@lru_cache(maxsize=1)
def _window() -> Tensor:
    return torch.hann_window(N_FFT)


@lru_cache(maxsize=2)
def _filters(n_mels: int) -> Tensor:
    """Slaney's mel filter bank ``(n_mels, 201)``.

    Triangles of equal area, on a scale that is linear up to 1 kHz and logarithmic above.
    """
    linear_hz, break_hz, log_step = 200.0 / 3, 1000.0, math.log(6.4) / 27
    break_mel = break_hz / linear_hz
    top = break_mel + math.log(SAMPLE_RATE / 2 / break_hz) / log_step
    mels = torch.linspace(0, top, n_mels + 2, dtype=torch.float64)
    edges = torch.where(mels < break_mel, mels * linear_hz, break_hz * torch.exp(log_step * (mels - break_mel)))
    bins = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (high - low)).float()
