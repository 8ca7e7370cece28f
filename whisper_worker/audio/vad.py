"""Where there is speech: Silero's voice detector, run by our own forward pass.

The network (snakers4/silero-vad, MIT) hears 32 ms at a time: spectrum, four small
convolutions, an LSTM that carries what was heard before. Only the LSTM needs the frames one
after another, so everything before it is computed for many frames at once; the
probabilities equal those of the package's own model, at a fiftieth of its time.

The package brings the weights. It is never imported: its import sets torch to one thread
for the whole process, and its TorchScript loader is slow and deprecated.
"""

from __future__ import annotations

import heapq
import importlib.util
import io
import itertools
import math
import pickle
import threading
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from whisper_worker.errors import ModelError
from whisper_worker.types import SAMPLE_RATE

if TYPE_CHECKING:
    import torch

    _Memory = tuple[torch.Tensor, torch.Tensor]
    """The LSTM's hidden state and cell after the last frame."""

FRAME_SAMPLES = 512
"""Samples for each probability: 32 ms."""

_CONTEXT = 64
"""Samples before a frame that the network sees again with it."""
_FFT = 256
_HOP = 128
_STEPS = 4
"""Spectra in a frame; the last one reaches beyond the frame into its mirror image."""
_BINS = _FFT // 2 + 1
_STATE = 128
_BLOCK = 1024
"""Frames computed at once (33 s): enough for full speed, and some 20 MB whatever the file's length."""
_TURN = 8 * _BLOCK
"""Frames of a file after which others have a turn: a tenth of a second, where ten hours take some sixteen."""

_LOUD_RMS = 10 ** (-22 / 20)
_FLOOR_RMS = 10 ** (-45 / 20)
_MAX_GAIN = 10 ** (40 / 20)
_LEVEL_FRAMES = 16
_LEVEL_REACH = 2
"""Sound whose loud frames within about a second (``_LEVEL_REACH`` stretches of ``_LEVEL_FRAMES``
either way) stay under ``_LOUD_RMS`` is amplified up to it, at most by ``_MAX_GAIN`` and not so far
that its quiet frames pass ``_FLOOR_RMS``. The network's answer falls with the level, and after
loud speech it is deaf to a quiet speaker; noise is no speech to it at any level, but loud noise
before speech makes it late. docs/decisions.md has the figures."""
_STREAM_LEVEL_FRAMES = 4 * _LEVEL_FRAMES
"""Past frames that a stream judges its level by: two seconds, whole stretches of it."""


@dataclass(frozen=True, slots=True)
class SpeechSpan:
    """Samples ``[start, end)`` of a waveform that hold speech."""

    start: int
    end: int


class VoiceDetector:
    """Probability of speech, frame by frame. Cheap to build, safe to share among threads.

    The first use loads the weights and raises :class:`ModelError` where the package that
    brings them is missing or another one than expected.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._network: _Network | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._turns = _Turns()

    def probabilities(self, waveform: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
        """float32 ``(ceil(n / 512),)`` for int16 samples ``(n,)`` at 16 kHz.

        The end is filled up with silence to a whole frame. Quiet parts are amplified for the
        network's ears alone.
        """
        if not len(waveform):
            return np.empty(0, dtype=np.float32)
        gains = _gains(waveform)
        found: list[npt.NDArray[np.float32]] = []
        memory: _Memory | None = None
        for first in range(0, len(gains), _TURN):
            last = first + _TURN
            part, memory = self._run(waveform[: last * FRAME_SAMPLES], gains[:last], first, memory)
            found.append(part)
        return np.concatenate(found)

    def _run(
        self, waveform: npt.NDArray[np.int16], gains: npt.NDArray[np.float32], first_frame: int, memory: _Memory | None
    ) -> tuple[npt.NDArray[np.float32], _Memory]:
        with self._lock:
            if self._network is None:
                self._network = _Network(_load_weights())
            if self._worker is None:
                self._worker = _one_thread_worker()
        with self._turns.take(len(gains)):
            return self._worker.submit(self._network.run, waveform, gains, first_frame, memory).result()


class VoiceStream:
    """The detector on sound that is still coming in: hears each frame once, remembering what came before.

    Levels are judged by the past two seconds alone, so the first frames of a quiet speaker after a
    loud one may count for less than they would in a whole file. Not thread-safe; one for each stream.
    """

    def __init__(self, detector: VoiceDetector) -> None:
        self._detector = detector
        self._heard = np.empty(0, dtype=np.int16)
        """Whole frames already judged: the last of them is the next frame's context, all give its level."""
        self._rest = np.empty(0, dtype=np.int16)
        self._memory: _Memory | None = None

    def feed(self, samples: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
        """Probabilities, float32 ``(n,)``, of the 512-sample frames that int16 ``samples`` complete."""
        self._rest = np.concatenate([self._rest, samples])
        n_new = len(self._rest) // FRAME_SAMPLES
        if not n_new:
            return np.empty(0, dtype=np.float32)
        waveform = np.concatenate([self._heard, self._rest[: n_new * FRAME_SAMPLES]])
        first = len(self._heard) // FRAME_SAMPLES
        found, self._memory = self._detector._run(waveform, _gains(waveform), first, self._memory)
        self._rest = self._rest[n_new * FRAME_SAMPLES :].copy()
        self._heard = waveform[-_STREAM_LEVEL_FRAMES * FRAME_SAMPLES :].copy()
        return found


class _Turns:
    """One caller at a time; of those that wait, the one with the smallest key, so that short files and streams do not
    stand behind long files."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._waiting: list[tuple[int, int]] = []
        self._numbers = itertools.count()
        self._taken = False

    @contextmanager
    def take(self, key: int) -> Iterator[None]:
        ticket = (key, next(self._numbers))
        with self._wake:
            heapq.heappush(self._waiting, ticket)
            self._wake.wait_for(lambda: not self._taken and self._waiting[0] == ticket)
            heapq.heappop(self._waiting)
            self._taken = True
        try:
            yield
        finally:
            with self._wake:
                self._taken = False
                self._wake.notify_all()


def _one_thread_worker() -> ThreadPoolExecutor:
    """A thread in which torch computes alone.

    The recurrence is thousands of tiny steps. Shared by several threads, each step waits for
    all of them, and beside a busy model on the same cores that costs fifty times the work.
    """
    import torch

    threads = torch.get_num_threads()
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vad")
    # A thread's first look at the number overwrites its own with the process's, so it must look before it sets.
    worker.submit(torch.get_num_threads).result()
    worker.submit(torch.set_num_threads, 1).result()
    # The number holds for the thread that sets it, and for threads still to come: set those right again.
    torch.set_num_threads(threads)
    return worker


class _Network:
    """The forward pass. Convolutions over four time steps are written as products of whole frames."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        import torch

        def taps(layer: int, *wanted: int) -> torch.Tensor:
            kernel = weights[f"conv{layer}.weight"]
            return torch.cat([kernel[:, :, tap] for tap in wanted], dim=1).t().contiguous()

        # At the borders of a frame the outer taps meet zero padding and are left out.
        self._conv1 = [
            (0, 2 * _BINS, taps(1, 1, 2)),
            (0, 3 * _BINS, taps(1, 0, 1, 2)),
            (_BINS, 4 * _BINS, taps(1, 0, 1, 2)),
            (2 * _BINS, 4 * _BINS, taps(1, 0, 1)),
        ]
        self._conv2 = [(0, 256, taps(2, 1, 2)), (128, 512, taps(2, 0, 1, 2))]
        self._conv3 = taps(3, 1, 2)
        self._conv4 = taps(4, 1)
        self._bias = [weights[f"conv{layer}.bias"] for layer in (1, 2, 3, 4)]
        self._lstm = [weights[f"lstm.{name}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        self._out = weights["out.weight"].reshape(_STATE, 1)
        self._out_bias = weights["out.bias"]
        self._window = torch.hann_window(_FFT)

    def run(
        self, waveform: npt.NDArray[np.int16], gains: npt.NDArray[np.float32], first_frame: int, memory: _Memory | None
    ) -> tuple[npt.NDArray[np.float32], _Memory]:
        """Probabilities of the frames from ``first_frame`` on, and what to remember for those that follow."""
        import torch

        n_frames = math.ceil(len(waveform) / FRAME_SAMPLES)
        result = np.empty(n_frames - first_frame, dtype=np.float32)
        with torch.inference_mode():
            block = min(_BLOCK, n_frames - first_frame)
            work = _Workspace(block)
            hidden, cell = memory or (torch.zeros(1, 1, _STATE), torch.zeros(1, 1, _STATE))
            for first in range(first_frame, n_frames, _BLOCK):
                count = min(block, n_frames - first)
                work.fill(waveform, first * FRAME_SAMPLES - _CONTEXT)
                work.gains[:count] = torch.from_numpy(gains[first : first + count])
                heard = self._before_lstm(work)[None, :count]
                heard, hidden, cell = torch.lstm(heard, (hidden, cell), self._lstm, True, 1, 0.0, False, False, True)
                logits = torch.addmm(self._out_bias, heard[0].relu_(), self._out)
                place = first - first_frame
                result[place : place + count] = torch.sigmoid(logits)[:, 0].numpy()
        return result, (hidden, cell)

    def _before_lstm(self, work: _Workspace) -> torch.Tensor:
        """``(frames, 128)`` from the samples in ``work``."""
        import torch

        frames = work.samples.unfold(0, _CONTEXT + FRAME_SAMPLES, FRAME_SAMPLES)
        torch.mul(frames.unfold(1, _FFT, _HOP), self._window, out=work.windowed[:, :-1])
        mirrored = _FFT - _CONTEXT
        torch.mul(frames[:, -mirrored:], self._window[:mirrored], out=work.windowed[:, -1, :mirrored])
        torch.mul(frames[:, -1 - _CONTEXT : -1].flip(1), self._window[mirrored:], out=work.windowed[:, -1, mirrored:])
        torch.fft.rfft(work.windowed, out=work.spectrum)
        torch.abs(work.spectrum, out=work.magnitude)
        # To scale the spectrum is to scale the samples.
        magnitude = work.magnitude.view(-1, _STEPS * _BINS).mul_(work.gains[:, None])
        for place, (low, high, weight) in enumerate(self._conv1):
            out = work.first[:, place * 128 : (place + 1) * 128]
            torch.addmm(self._bias[0], magnitude[:, low:high], weight, out=out)
        work.first.relu_()
        for place, (low, high, weight) in enumerate(self._conv2):
            out = work.second[:, place * 64 : (place + 1) * 64]
            torch.addmm(self._bias[1], work.first[:, low:high], weight, out=out)
        third = torch.addmm(self._bias[2], work.second.relu_(), self._conv3).relu_()
        return torch.addmm(self._bias[3], third, self._conv4).relu_()


class _Workspace:
    """Buffers for one block, used again for the next: to allocate them anew costs as much as to fill them."""

    def __init__(self, block: int) -> None:
        import torch

        self.samples = torch.zeros(_CONTEXT + block * FRAME_SAMPLES)
        self._array = self.samples.numpy()
        self.gains = torch.ones(block)
        self.windowed = torch.empty(block, _STEPS, _FFT)
        self.spectrum = torch.empty(block, _STEPS, _BINS, dtype=torch.complex64)
        self.magnitude = torch.empty(block, _STEPS, _BINS)
        self.first = torch.empty(block, 4 * 128)
        self.second = torch.empty(block, 2 * 64)

    def fill(self, waveform: npt.NDArray[np.int16], start: int) -> None:
        """Samples from ``start`` on, in [-1, 1); zeros before and after the waveform."""
        low, high = max(start, 0), min(start + len(self._array), len(waveform))
        self._array[: low - start] = 0
        self._array[high - start :] = 0
        np.multiply(waveform[low:high], np.float32(1 / 32768), out=self._array[low - start : high - start])


def _gains(waveform: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
    """float32 ``(ceil(n / 512),)``: the factor for each frame, 1 where the sound is loud enough."""
    n_frames = math.ceil(len(waveform) / FRAME_SAMPLES)
    n_whole = len(waveform) // FRAME_SAMPLES
    if not n_whole:
        return np.ones(n_frames, dtype=np.float32)
    whole = waveform[: n_whole * FRAME_SAMPLES].reshape(-1, FRAME_SAMPLES)
    power = np.empty(n_whole, dtype=np.float32)
    for first in range(0, n_whole, _BLOCK):
        block = whole[first : first + _BLOCK].astype(np.float32)
        power[first : first + len(block)] = np.einsum("ij,ij->i", block, block)
    stretches = np.pad(power, (0, -n_whole % _LEVEL_FRAMES), mode="edge").reshape(-1, _LEVEL_FRAMES)
    # The second loudest and second quietest frame of each: a click is not a level.
    ranked = np.partition(stretches, (1, -2), axis=1)
    reach = np.pad(ranked, ((_LEVEL_REACH, _LEVEL_REACH), (0, 0)), mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(reach, 2 * _LEVEL_REACH + 1, axis=0)
    # One step of 16 bits stands in for digital silence.
    loud, floor = (
        np.sqrt(np.maximum(level / FRAME_SAMPLES, 1.0)) / 32768
        for level in (around[:, -2].max(axis=1), around[:, 1].min(axis=1))
    )
    decades = np.log10(np.clip(np.minimum(_LOUD_RMS / loud, _FLOOR_RMS / floor), 1.0, _MAX_GAIN))
    smooth = np.convolve(np.pad(decades, 1, mode="edge"), np.full(3, 1 / 3), mode="valid")
    middles = (np.arange(len(smooth)) + 0.5) * _LEVEL_FRAMES
    return np.power(10.0, np.interp(np.arange(n_frames), middles, smooth)).astype(np.float32)


class _Node:
    """Stands for every object of the archive that is not a tensor."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _ArchiveReader(pickle.Unpickler):
    """Reads a TorchScript archive's index into :class:`_Node` and (storage, shape) pairs; runs none of its code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, *rest: (storage, shape)
        if module.startswith("__torch__."):
            return _Node
        return {
            ("collections", "OrderedDict"): dict,
            ("torch", "FloatStorage"): None,
            ("torch.jit._pickle", "build_intlist"): list,
        }[module, name]

    def persistent_load(self, pid: Any) -> Any:
        return pid[2]


def _load_weights() -> dict[str, torch.Tensor]:
    """The 16 kHz network's weights out of the package's TorchScript file."""
    import torch

    spec = importlib.util.find_spec("silero_vad")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("The package silero-vad is missing; install the requirements again.")
    try:
        archive = Path(spec.submodule_search_locations[0]) / "data" / "silero_vad.jit"
        with zipfile.ZipFile(archive) as file:
            root = next(name for name in file.namelist() if name.endswith("/data.pkl")).removesuffix(".pkl")
            model = _ArchiveReader(io.BytesIO(file.read(root + ".pkl"))).load()._model

            def tensor(entry: tuple[str, tuple[int, ...]]) -> torch.Tensor:
                storage, shape = entry
                return torch.frombuffer(bytearray(file.read(f"{root}/{storage}")), dtype=torch.float32).view(shape)

            layers = {f"conv{place + 1}": getattr(model.encoder, str(place)).reparam_conv for place in range(4)}
            layers["out"] = getattr(model.decoder.decoder, "2")
            named = {
                f"{name}.{part}": tensor(getattr(layer, part))
                for name, layer in layers.items()
                for part in ("weight", "bias")
            }
            for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                named["lstm." + part] = tensor(getattr(model.decoder.rnn, part))
    except Exception as error:
        raise ModelError(
            "The voice detector's weights cannot be read; install the silero-vad that the requirements name."
        ) from error
    return named


def speech_spans(
    probabilities: npt.NDArray[np.float32],
    n_samples: int,
    threshold: float = 0.5,
    *,
    neg_threshold: float | None = None,
    min_speech_duration_ms: int = 250,
    min_silence_duration_ms: int = 100,
    speech_pad_ms: int = 30,
) -> tuple[SpeechSpan, ...]:
    """Rising, disjoint spans of speech inside ``[0, n_samples)``.

    Speech begins where a frame reaches ``threshold`` and ends where the probability stays
    under ``neg_threshold`` (default: 0.7 of the threshold) for ``min_silence_duration_ms``. Spans
    shorter than ``min_speech_duration_ms`` are dropped; what is left grows by
    ``speech_pad_ms`` on either side, at most halfway into a pause. The parameters are those
    of the package's ``get_speech_timestamps``.
    """
    if neg_threshold is None:
        # The package subtracts 0.15: the same at 0.5, but at 0.15 no pause would end a span.
        neg_threshold = 0.7 * threshold
    per_ms = SAMPLE_RATE // 1000
    found: list[tuple[int, int]] = []
    start: int | None = None
    quiet_since: int | None = None
    for frame, probability in enumerate(probabilities.tolist()):
        sample = frame * FRAME_SAMPLES
        if probability >= threshold:
            quiet_since = None
            if start is None:
                start = sample
        elif start is not None and probability < neg_threshold:
            if quiet_since is None:
                quiet_since = sample
            if sample - quiet_since >= min_silence_duration_ms * per_ms:
                found.append((start, quiet_since))
                start = quiet_since = None
    if start is not None:
        found.append((start, n_samples))
    found = [(low, high) for low, high in found if high - low > min_speech_duration_ms * per_ms]
    return _padded(found, n_samples, speech_pad_ms * per_ms)


def _padded(found: Sequence[tuple[int, int]], n_samples: int, pad: int) -> tuple[SpeechSpan, ...]:
    spans = []
    for place, (low, high) in enumerate(found):
        before = low - found[place - 1][1] if place else 2 * low
        after = found[place + 1][0] - high if place + 1 < len(found) else 2 * (n_samples - high)
        spans.append(SpeechSpan(low - min(pad, before // 2), high + min(pad, after // 2)))
    return tuple(spans)
