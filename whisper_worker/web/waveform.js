/** The recording as a picture: loudness, the lines over it, where the player is. */

const N_PEAKS = 2000;
const SAMPLE_RATE = 8000;
/** Seconds and bytes above which a browser might run out of memory while decoding all at once. */
const LONGEST = 45 * 60;
const LARGEST = 200e6;

/** Loudest sample of each of N_PEAKS parts, 0 to 1. Throws an Error that says why there are none. */
export async function peaks(file, seconds) {
  if (seconds > LONGEST || file.size > LARGEST) throw new Error("The recording is too long for a waveform.");
  let audio;
  try {
    audio = await new OfflineAudioContext(1, 1, SAMPLE_RATE).decodeAudioData(await file.arrayBuffer());
  } catch {
    throw new Error("This browser cannot draw the waveform of this recording.");
  }
  const found = new Float32Array(N_PEAKS);
  for (let channel = 0; channel < audio.numberOfChannels; channel++) {
    const samples = audio.getChannelData(channel);
    for (let i = 0; i < samples.length; i++) {
      const part = Math.floor((i * N_PEAKS) / samples.length);
      const size = Math.abs(samples[i]);
      if (size > found[part]) found[part] = size;
    }
  }
  return found;
}

export class Waveform {
  #canvas;
  #peaks = null;
  #spans = [];
  #duration = 0;
  #position = 0;
  #due = false;

  /** `onSeek` hears the seconds of a place that was clicked. */
  constructor(canvas, onSeek) {
    this.#canvas = canvas;
    canvas.addEventListener("click", (event) => {
      if (this.#duration) onSeek((event.offsetX / canvas.clientWidth) * this.#duration);
    });
    new ResizeObserver(() => this.redraw()).observe(canvas);
  }

  set peaks(values) {
    this.#peaks = values;
    this.redraw();
  }

  /** `{start, end, level}` of each line. */
  set spans(values) {
    this.#spans = values;
    this.redraw();
  }

  /** Seconds. */
  set duration(value) {
    this.#duration = value;
    this.redraw();
  }

  set position(value) {
    this.#position = value;
    this.redraw();
  }

  /** Also to be called when the colours have changed. */
  redraw() {
    if (this.#due) return;
    this.#due = true;
    requestAnimationFrame(() => {
      this.#due = false;
      this.#draw();
    });
  }

  #draw() {
    const [width, height] = [this.#canvas.clientWidth, this.#canvas.clientHeight];
    if (!width || !this.#duration) return;
    const scale = globalThis.devicePixelRatio;
    if (this.#canvas.width !== Math.round(width * scale)) this.#canvas.width = Math.round(width * scale);
    if (this.#canvas.height !== Math.round(height * scale)) this.#canvas.height = Math.round(height * scale);
    const context = this.#canvas.getContext("2d");
    const style = getComputedStyle(this.#canvas);
    const colour = (name) => style.getPropertyValue(name);
    const x = (seconds) => (seconds / this.#duration) * width;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    const bands = [colour("--band"), colour("--unsure"), colour("--doubted")];
    for (const { start, end, level } of this.#spans) {
      context.fillStyle = bands[level];
      // A hair's breadth between two lines that touch.
      context.fillRect(x(start), 0, Math.max(1, x(end) - x(start) - 1), height);
    }
    const played = x(this.#position);
    if (this.#peaks) {
      // Quiet recordings are shown as large as loud ones; silence is not blown up.
      const loudest = Math.max(0.05, this.#peaks.reduce((a, b) => Math.max(a, b), 0));
      for (let left = 0; left < width; left += 3) {
        const from = Math.floor((left / width) * N_PEAKS);
        const to = Math.max(from + 1, Math.floor(((left + 3) / width) * N_PEAKS));
        const peak = this.#peaks.subarray(from, to).reduce((a, b) => Math.max(a, b), 0);
        const size = Math.max(1, (peak / loudest) * (height - 8));
        context.fillStyle = colour(left < played ? "--accent" : "--wave");
        context.fillRect(left, (height - size) / 2, 2, size);
      }
    }
    context.fillStyle = colour("--text");
    context.fillRect(Math.min(width - 2, played), 0, 2, height);
  }
}
