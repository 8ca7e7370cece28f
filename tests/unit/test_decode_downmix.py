"""Channels to one: nobody is silenced, the level stays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from whisper_worker.audio.downmix import BLOCK, Downmix

Int16 = npt.NDArray[np.int16]
RNG = np.random.default_rng(7)


def noise(n_blocks: int, level: float, seed: int = 1) -> Int16:
    """Speech-like in level only: independent for different seeds."""
    samples = np.random.default_rng(seed).normal(0, level, n_blocks * BLOCK)
    return samples.clip(-32768, 32767).astype(np.int16)


def mixed(*channels: Int16, mask: int = 0) -> Int16:
    downmix = Downmix(len(channels), mask)
    frames = np.stack(channels, axis=1)
    parts = [downmix.add(frames[start : start + BLOCK]) for start in range(0, len(frames), BLOCK)]
    return np.rint(np.concatenate(parts) * downmix.gain).clip(-32768, 32767).astype(np.int16)


def level(samples: Int16) -> float:
    return float(np.sqrt(np.mean(samples.astype(np.float64) ** 2)))


def test_equal_channels_are_that_channel() -> None:
    voice = noise(4, 3000)
    assert np.array_equal(mixed(voice, voice), voice)


@pytest.mark.parametrize("balance", [1.0, 0.8, 1.2])
def test_opposed_channels_do_not_cancel(balance: float) -> None:
    voice = noise(4, 3000)
    opposed = (-balance * voice.astype(np.float64)).astype(np.int16)
    assert level(mixed(voice, opposed)) == pytest.approx(level(voice) * (1 + balance) / 2, rel=0.02)


def test_opposed_channels_with_noise_of_a_codec_do_not_cancel() -> None:
    voice = noise(4, 3000)
    left, right = voice + noise(4, 200, 2), -voice + noise(4, 200, 3)
    assert level(mixed(left, right)) == pytest.approx(level(voice), rel=0.05)


def test_a_recording_may_be_opposed_only_for_a_while() -> None:
    voice = noise(12, 3000)
    right = voice.copy()
    right[4 * BLOCK : 8 * BLOCK] *= -1
    result = mixed(voice, right)
    for start in range(0, 12 * BLOCK, BLOCK):
        assert level(result[start : start + BLOCK]) == pytest.approx(level(voice[start : start + BLOCK]), rel=0.02)
    assert np.array_equal(result[: 4 * BLOCK], voice[: 4 * BLOCK])


@pytest.mark.parametrize("live", [0, 1])
def test_one_live_channel_keeps_its_level(live: int) -> None:
    voice = noise(4, 3000)
    channels = [np.zeros_like(voice), np.zeros_like(voice)]
    channels[live] = voice
    assert np.abs(mixed(*channels).astype(int) - voice).max() <= 1


def test_a_channel_of_hum_takes_no_share_of_the_level() -> None:
    voice, hum = noise(4, 3000), noise(4, 30, 5)
    assert level(mixed(voice, hum)) == pytest.approx(level(voice), rel=0.02)


def test_speakers_in_turns_are_both_kept() -> None:
    first, second = noise(8, 3000, 1), noise(8, 3000, 2)
    first[4 * BLOCK :] = 0
    second[: 4 * BLOCK] = 0
    result = mixed(first, second)
    assert level(result[: 4 * BLOCK]) == pytest.approx(level(first[: 4 * BLOCK]) / 2, rel=0.02)
    assert level(result[4 * BLOCK :]) == pytest.approx(level(second[4 * BLOCK :]) / 2, rel=0.02)


def test_a_rare_speaker_is_not_dropped() -> None:
    """The other side of a long call says one word: it counts for little of the energy, and all of its meaning."""
    talker, rare = noise(400, 8000, 1), np.zeros(400 * BLOCK, np.int16)
    talker[200 * BLOCK : 201 * BLOCK] = 0
    rare[200 * BLOCK : 201 * BLOCK] = noise(1, 3000, 2)
    result = mixed(talker, rare)
    assert level(result[200 * BLOCK : 201 * BLOCK]) >= 0.49 * 3000


FRONT_LEFT, FRONT_RIGHT, CENTRE, LOW, BACK_LEFT, BACK_RIGHT = 1, 2, 4, 8, 16, 32
SURROUND = FRONT_LEFT | FRONT_RIGHT | CENTRE | LOW | BACK_LEFT | BACK_RIGHT


def test_dialogue_in_the_centre_keeps_its_level() -> None:
    voice, nothing = noise(4, 3000), np.zeros(4 * BLOCK, np.int16)
    result = mixed(nothing, nothing, voice, nothing, nothing, nothing, mask=SURROUND)
    assert np.abs(result.astype(int) - voice).max() <= 3


def test_rumble_of_the_low_frequency_channel_is_left_out() -> None:
    voice, rumble, nothing = noise(4, 1000), noise(4, 8000, 2), np.zeros(4 * BLOCK, np.int16)
    result = mixed(nothing, nothing, voice, rumble, nothing, nothing, mask=SURROUND)
    assert np.corrcoef(result, voice)[0, 1] > 0.99


def test_the_centre_outweighs_what_surrounds_it() -> None:
    voice = noise(4, 3000)
    around = [noise(4, 3000, seed) for seed in (2, 3, 4, 5)]
    result = mixed(around[0], around[1], voice, np.zeros_like(voice), around[2], around[3], mask=SURROUND)
    heard = [float(np.corrcoef(result, channel)[0, 1]) for channel in (voice, *around)]
    assert heard[0] > 1.3 * max(heard[1:])


def test_silence_stays_silence() -> None:
    assert not mixed(np.zeros(2 * BLOCK, np.int16), np.zeros(2 * BLOCK, np.int16)).any()


def test_loud_channels_do_not_wrap_around() -> None:
    loud = np.full(BLOCK, 32767, np.int16)
    assert mixed(loud, loud).min() == 32767
    assert mixed(loud, np.zeros_like(loud)).min() >= 32766


def test_the_last_piece_may_be_short() -> None:
    downmix = Downmix(2)
    assert downmix.add(np.ones((3, 2), np.int16)).tolist() == [1, 1, 1]
    assert downmix.add(-np.ones((1, 2), np.int16)).tolist() == [-1]
    assert downmix.add(np.empty((0, 2), np.int16)).shape == (0,)
