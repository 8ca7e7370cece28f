"""A stream of sound brought to 16 kHz, piece by piece, with no seam between the pieces.

A low-pass (windowed sinc) goes first: what lies above 8 kHz would otherwise be folded down
into the speech. Only the samples that are kept are computed.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from whisper_worker.types import SAMPLE_RATE

_HALF_WIDTH_SECONDS = 0.003
"""The filter's reach on either side, and so the delay."""
_CUTOFF_HZ = 7400.0
"""Middle of the slope: speech up to 7 kHz passes whole, at 8 kHz 60 dB and more are taken away."""
_KAISER_BETA = 7.0


class Resampler:
    """int16 mono at ``rate`` in, int16 mono at 16 kHz out. One for each stream."""

    def __init__(self, rate: int) -> None:
        """``rate``: 16,000 or more, in Hz."""
        common = math.gcd(rate, SAMPLE_RATE)
        self._up, self._down = SAMPLE_RATE // common, rate // common
        fine_rate = rate * self._up
        reach = round(_HALF_WIDTH_SECONDS * fine_rate)
        time = np.arange(-reach, reach + 1) / fine_rate
        kernel = np.sinc(2 * _CUTOFF_HZ * time) * np.kaiser(len(time), _KAISER_BETA)
        kernel /= kernel.sum()
        # One short filter for each place that an output may have between two inputs.
        taps = -(-len(kernel) // self._up)
        padded = np.zeros(taps * self._up)
        padded[: len(kernel)] = kernel * self._up
        self._phases = padded.reshape(taps, self._up).T[:, ::-1].astype(np.float32).copy()
        self._taps = taps
        self._past = np.zeros(taps - 1, dtype=np.float32)
        self._n_in = 0
        self._n_out = 0

    def feed(self, samples: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
        """The outputs that these inputs complete."""
        if self._up == self._down:
            return samples
        sound = np.concatenate([self._past, samples.astype(np.float32)])
        first_in = self._n_in - len(self._past)
        self._n_in += len(samples)
        # Output k lies at fine position k * down, whose newest input is number (k * down) // up.
        n_out = (self._n_in * self._up - 1) // self._down + 1 if self._n_in else 0
        position = np.arange(self._n_out, n_out) * self._down
        self._n_out = n_out
        self._past = sound[len(sound) - (self._taps - 1) :]
        if not len(position):
            return np.empty(0, dtype=np.int16)
        newest = position // self._up - first_in
        windows = np.lib.stride_tricks.sliding_window_view(sound, self._taps)[newest - (self._taps - 1)]
        result = np.einsum("ij,ij->i", windows, self._phases[position % self._up])
        clipped: npt.NDArray[np.int16] = np.clip(np.round(result), -32768, 32767).astype(np.int16)
        return clipped
