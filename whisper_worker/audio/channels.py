"""The channels of a recording one by one, where each holds a speaker of its own."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

from whisper_worker.audio.decode import DecodedAudio, decode
from whisper_worker.settings import Settings
from whisper_worker.types import SAMPLE_RATE, CancelToken

MAX_CHANNELS = 8
_ALIKE = 0.5
"""Correlation from which two channels are one scene heard twice. Crosstalk on a telephone line stays far below."""
_BLOCK = 60 * SAMPLE_RATE


def decode_channels(path: Path, settings: Settings, directory: Path, cancel: CancelToken) -> tuple[DecodedAudio, ...]:
    """Every channel of the file, or the mix alone, with a warning, where channels do not tell speakers apart.

    Raises as :func:`~whisper_worker.audio.decode.decode` does.
    """
    mix = decode(path, settings, directory=directory, cancel=cancel)
    if mix.n_channels == 1:
        return (_warned(mix, "the recording has one channel"),)
    if mix.n_channels > MAX_CHANNELS:
        return (_warned(mix, f"the recording has more than {MAX_CHANNELS}"),)
    channels = [
        # Of the mix's track: in a silent channel's place another track would be taken.
        decode(path, settings, directory=directory, cancel=cancel, channel=index, stream=mix.stream)
        for index in range(mix.n_channels)
    ]
    if any(alike(one.waveform, other.waveform) for one, other in combinations(channels, 2)):
        return (_warned(mix, "the channels hold the same sound"),)
    return tuple(channels)


def alike(one: npt.NDArray[np.int16], other: npt.NDArray[np.int16]) -> bool:
    """Whether two int16 waveforms of shape (n,) and (m,) are correlated, in phase or against it."""
    n = min(len(one), len(other))
    product = energy = other_energy = 0.0
    for start in range(0, n, _BLOCK):
        # int16 squares overflow; a minute of float32 does not matter where hours would.
        a, b = (waveform[start : min(start + _BLOCK, n)].astype(np.float32) for waveform in (one, other))
        product += float(a @ b)
        energy += float(a @ a)
        other_energy += float(b @ b)
    return abs(product) > _ALIKE * math.sqrt(energy * other_energy)


def _warned(mix: DecodedAudio, reason: str) -> DecodedAudio:
    warning = f"Speakers are told apart by channel, and {reason}: all of it is given to one speaker."
    return replace(mix, warnings=(*mix.warnings, warning))
