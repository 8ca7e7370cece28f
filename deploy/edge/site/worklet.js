/** Runs beside the sound card: channels to one, its rate to 16 kHz, 128 samples at a time to frames of 100 ms. */
import { Resampler } from "./resampler.js";

const RATE = 16000;
const FRAME = RATE / 10;

class Capture extends AudioWorkletProcessor {
  resampler = sampleRate === RATE ? null : new Resampler(sampleRate, RATE);
  frame = new Float32Array(FRAME);
  filled = 0;
  stopped = false;

  constructor() {
    super();
    // The words before a click on "Stop" are still in here.
    this.port.onmessage = () => {
      this.port.postMessage(this.frame.slice(0, this.filled));
      this.port.postMessage(null);
      this.stopped = true;
    };
  }

  process([channels]) {
    if (this.stopped) return false;
    if (channels.length) this.take(mono(channels));
    return true;
  }

  take(sound) {
    let rest = this.resampler ? this.resampler.push(sound) : sound;
    while (rest.length) {
      const part = rest.subarray(0, FRAME - this.filled);
      this.frame.set(part, this.filled);
      this.filled += part.length;
      rest = rest.subarray(part.length);
      if (this.filled === FRAME) {
        this.port.postMessage(this.frame, [this.frame.buffer]);
        this.frame = new Float32Array(FRAME);
        this.filled = 0;
      }
    }
  }
}

function mono(channels) {
  if (channels.length === 1) return channels[0];
  return channels[0].map((_, place) => channels.reduce((sum, channel) => sum + channel[place], 0) / channels.length);
}

registerProcessor("capture", Capture);
