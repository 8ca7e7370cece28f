/**
 * Any rate to 16 kHz, in pieces as they come: a windowed sinc, one set of taps for each phase.
 *
 * What lies above half of the lower rate is taken out first; left in, it would fold down into the speech.
 */
const ZERO_CROSSINGS = 24;
const KAISER_BETA = 8;
/** The pass band's edge, as a share of half the lower rate; the rest is the filter's slope. */
const PASS = 0.9;

export class Resampler {
  /** @param {number} from rate of the sound that comes; @param {number} to rate of what is given back. */
  constructor(from, to) {
    const common = divisor(from, to);
    this.phases = to / common;
    this.step = from / common;
    const cutoff = (Math.min(from, to) * PASS) / from;
    this.half = Math.ceil(ZERO_CROSSINGS / cutoff);
    this.taps = Array.from({ length: this.phases }, (_, phase) => kernel(this.half, cutoff, phase / this.phases));
    // Silence stands before the first sample, so that output begins at the recording's beginning.
    this.kept = new Float32Array(this.half - 1);
    this.index = this.half - 1;
    this.phase = 0;
  }

  /** @param {Float32Array} sound @returns {Float32Array} what can be known by now */
  push(sound) {
    const input = new Float32Array(this.kept.length + sound.length);
    input.set(this.kept);
    input.set(sound, this.kept.length);
    const output = [];
    while (this.index + this.half < input.length) {
      const taps = this.taps[this.phase];
      const first = this.index - this.half + 1;
      let sum = 0;
      for (let tap = 0; tap < taps.length; tap++) sum += taps[tap] * input[first + tap];
      output.push(sum);
      this.phase += this.step;
      this.index += Math.floor(this.phase / this.phases);
      this.phase %= this.phases;
    }
    const used = Math.min(Math.max(0, this.index - this.half + 1), input.length);
    this.kept = input.slice(used);
    this.index -= used;
    return Float32Array.from(output);
  }
}

function divisor(a, b) {
  return b ? divisor(b, a % b) : a;
}

/** Taps for a point that lies `shift` of a sample behind the one in the middle; they sum to 1. */
function kernel(half, cutoff, shift) {
  const taps = Float64Array.from({ length: 2 * half }, (_, place) => {
    const distance = place - (half - 1) - shift;
    const x = Math.PI * cutoff * distance;
    const edge = Math.min(1, Math.abs(distance) / half);
    return (x === 0 ? 1 : Math.sin(x) / x) * bessel(KAISER_BETA * Math.sqrt(1 - edge * edge));
  });
  const sum = taps.reduce((total, tap) => total + tap);
  return taps.map((tap) => tap / sum);
}

/** Modified Bessel function of the first kind, order 0. */
function bessel(x) {
  let sum = 1;
  for (let n = 1, term = 1; term > 1e-12 * sum; n++) sum += term *= (x / (2 * n)) ** 2;
  return sum;
}
