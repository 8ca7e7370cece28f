"""Many channels to one, without losing anybody's voice.

A plain average turns a recording whose channels are in opposite phase into silence, and one
with a single live channel into a quieter one. Here a channel that is nearly the negative of
another is turned over before it is added, and the sum is divided by the weights of the
channels that carry sound, not of all that exist.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

BLOCK = 8_000
"""Samples over which phase is judged: half a second, many periods of the lowest voice."""

_FADE = 160
_LOW_FREQUENCY = 0x8
_CENTRE = 0x4
_FRONT = 0x3
# A pair of this correlation would lose 5 dB in a plain sum. It is turned back once it is no
# longer opposed at all, so that pauses and noise do not toggle it.
_OPPOSED = -0.7
# Channels this far (30 dB) below the loudest carry crosstalk or noise and take no share of the level.
_QUIET = 1e-3


class Downmix:
    """Adds the channels of one recording up, block by block; at the end :attr:`gain` sets the level.

    ``mask`` is the speaker mask of a WAV header, 0 where it has none: dialogue in the centre of a
    surround mix weighs more than what surrounds it, the low-frequency channel nothing.
    """

    def __init__(self, n_channels: int, mask: int = 0) -> None:
        self._weights = _speaker_weights(n_channels, mask)
        self._signs = np.ones(n_channels, np.float32)
        self._energy = np.zeros(n_channels)
        self._fade_in = np.linspace(0, 1, _FADE, dtype=np.float32)

    def add(self, block: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
        """One block, shape (n, channels) with n at most ``BLOCK``, mixed to shape (n,)."""
        samples = block.astype(np.float32)
        products = (samples.T @ samples).astype(np.float64)
        self._energy += np.diagonal(products)
        before = self._shares()
        self._align(products)
        after = self._shares()
        mixed = samples @ after
        if not np.array_equal(before, after):
            head = samples[:_FADE]
            fade = self._fade_in[: len(head)]
            mixed[: len(head)] = (head @ before) * (1 - fade) + mixed[: len(head)] * fade
        rounded: npt.NDArray[np.int16] = np.rint(mixed).astype(np.int16)
        return rounded

    @property
    def gain(self) -> float:
        """Factor that brings the mix to the level of the channels that carry sound. At least 1."""
        live = self._energy >= _QUIET * self._energy.max()
        share = float(self._weights[live].sum())
        return float(self._weights.sum()) / share if share else 1.0

    def _shares(self) -> npt.NDArray[np.float32]:
        shares: npt.NDArray[np.float32] = self._weights * self._signs / self._weights.sum()
        return shares

    def _align(self, products: npt.NDArray[np.float64]) -> None:
        """Turn over the channels opposed to the first one that is about as loud as the loudest."""
        energy = np.diagonal(products) * (self._weights > 0)
        if not energy.any():
            return
        first = int(np.argmax(energy >= 0.1 * energy.max()))
        for channel in np.flatnonzero(energy):
            correlation = products[first, channel] / math.sqrt(products[first, first] * energy[channel])
            if correlation < _OPPOSED:
                self._signs[channel] = -self._signs[first]
            elif correlation > 0:
                self._signs[channel] = self._signs[first]


def _speaker_weights(n_channels: int, mask: int) -> npt.NDArray[np.float32]:
    """Share of each channel: those of ITU-R BS.775 for surround, equal ones where the places are unknown."""
    places = [1 << bit for bit in range(32) if mask >> bit & 1]
    if len(places) != n_channels or places == [_LOW_FREQUENCY]:
        return np.ones(n_channels, np.float32)
    weights = [
        0.0 if place == _LOW_FREQUENCY else 1.0 if place == _CENTRE else math.sqrt(0.5) if place & _FRONT else 0.5
        for place in places
    ]
    return np.array(weights, np.float32)
