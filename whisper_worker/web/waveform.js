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
  #layers = null;

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
    this.#draw();
  }

  /** Also to be called when the colours have changed. */
  redraw() {
    this.#layers = null;
    this.#draw();
  }

  #draw() {
    if (this.#due) return;
    this.#due = true;
    requestAnimationFrame(() => {
      this.#due = false;
      const [width, height] = [this.#canvas.clientWidth, this.#canvas.clientHeight];
      if (!width || !this.#duration) return;
      this.#layers ??= this.#paint(width, height);
      const { scale, colours, ahead, played } = this.#layers;
      const context = this.#canvas.getContext("2d");
      const at = Math.round((this.#position / this.#duration) * width * scale);
      context.drawImage(ahead, 0, 0);
      if (at > 0) context.drawImage(played, 0, 0, at, played.height, 0, 0, at, played.height);
      context.fillStyle = colours.text;
      context.fillRect(Math.min(ahead.width - 2 * scale, at), 0, 2 * scale, ahead.height);
    });
  }

  /** Everything that stays while the player goes on, once with the bars ahead of it and once with those behind. */
  #paint(width, height) {
    const scale = globalThis.devicePixelRatio;
    [this.#canvas.width, this.#canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
    const style = getComputedStyle(this.#canvas);
    const names = ["back", "band", "unsure", "doubted", "wave", "accent", "text"];
    const colours = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`)]));
    const layer = (barColour) => {
      const canvas = new OffscreenCanvas(this.#canvas.width, this.#canvas.height);
      const context = canvas.getContext("2d");
      context.scale(scale, scale);
      context.fillStyle = colours.back;
      context.fillRect(0, 0, width, height);
      this.#paintSpans(context, width, height, [colours.band, colours.unsure, colours.doubted]);
      context.fillStyle = barColour;
      if (this.#peaks) this.#paintPeaks(context, width, height);
      return canvas;
    };
    return { scale, colours, ahead: layer(colours.wave), played: layer(colours.accent) };
  }

  #paintSpans(context, width, height, colours) {
    for (const { start, end, level } of this.#spans) {
      const left = (start / this.#duration) * width;
      context.fillStyle = colours[level];
      // A hair's breadth between two lines that touch.
      context.fillRect(left, 0, Math.max(1, ((end - start) / this.#duration) * width - 1), height);
    }
  }

  #paintPeaks(context, width, height) {
    const largest = (values) => values.reduce((a, b) => Math.max(a, b), 0);
    // Quiet recordings are shown as large as loud ones; silence is not blown up.
    const loudest = Math.max(0.05, largest(this.#peaks));
    for (let left = 0; left < width; left += 3) {
      const from = Math.floor((left / width) * N_PEAKS);
      const to = Math.max(from + 1, Math.floor(((left + 3) / width) * N_PEAKS));
      const size = Math.max(1, (largest(this.#peaks.subarray(from, to)) / loudest) * (height - 8));
      context.fillRect(left, (height - size) / 2, 2, size);
    }
  }
}
