/**
 * One dictation over as many connections as it takes.
 *
 * Sound is kept until a finished line covers it. When a connection breaks, the next one is given all sound
 * from the beginning of the last finished line on; `seam.js` leaves out the words that stand already.
 */
import { fresh } from "./seam.js";

export const SAMPLE_RATE = 16000;

const END_OF_AUDIO = new TextEncoder().encode("END_OF_AUDIO");
/** A server that is stopped ends its last line in the middle of a word. A line counts once it outlived that. */
const HOLD_MS = 1000;
const TICK_MS = 250;
const READY_MS = 15000;
/** Without a byte taken for so long, the connection is dead, whatever the system believes. */
const STUCK_MS = 30000;
const RETRY_MS = [200, 500, 1000, 2000, 4000];
const WAIT_MS = [2000, 15000];
const LEAD_SECONDS = 0.2;
const OVERLAP_SECONDS = 10;
const SEAM_WORDS = 20;
/** Silence gets no line that would let go of it; this much of it is kept nevertheless. */
const QUIET_SECONDS = 60;
/** Ten minutes without a server; 38 MB. */
const KEPT_SECONDS = 600;
/** What is given to the socket ahead of what it has sent. */
const AHEAD_BYTES = 1 << 20;
/** Sound wrong for the server, or the client for its policy: coming again would not help. */
const FINAL_CODES = [1003, 1008];

/**
 * @typedef {{start: number, end: number, text: string, words: import("./seam.js").Word[]}} Line
 * @typedef {object} Events all optional
 * @property {(line: Line) => void} onLine a line that will not change any more, each once
 * @property {(settled: string, rest: string) => void} onOpen what is being said
 * @property {(state: string, detail: string) => void} onState connecting, live, waiting, reconnecting, done, failed
 * @property {(seconds: number) => void} onLatency how far the newest word lies behind the microphone
 * @property {(language: string) => void} onLanguage
 * @property {(text: string) => void} onNote
 */
export class Dictation {
  #lines = [];
  #frames = [];
  #kept = 0;
  #captured = 0;
  #connection = null;
  #attempts = 0;
  #timer = 0;
  #ending = false;
  #over = false;
  #notes = new Set();
  #refused = 0;
  #unsure = null;
  #lost = 0;

  /**
   * @param {string} url
   * @param {object} config what the first message says beside uid
   * @param {string[]} protocols
   * @param {Events} events
   */
  constructor(url, config, protocols, events) {
    this.url = url;
    this.config = config;
    this.protocols = protocols;
    this.events = events;
  }

  /** Connect. Sound may be fed before. */
  start() {
    this.ticking = setInterval(() => this.#tick(), TICK_MS);
    this.#connect();
  }

  /** Seconds of sound taken so far. */
  get seconds() {
    return this.#captured / SAMPLE_RATE;
  }

  /** Seconds of sound that no finished line covers yet. */
  get pending() {
    return Math.max(0, this.seconds - (this.#lines.at(-1)?.end ?? 0));
  }

  /** @param {Float32Array} frame */
  feed(frame) {
    if (this.#over || this.#ending) return;
    this.#frames.push({ at: this.#captured, sound: frame });
    this.#captured += frame.length;
    this.#pump();
  }

  /** No more sound will come; `done` follows when all of it is transcribed. */
  finish() {
    this.#ending = true;
    this.#pump();
  }

  /** Give up what is not finished. */
  abandon() {
    this.#end("done", "");
  }

  /** Connections in a row that were refused before they were open. The browser does not tell why. */
  get refused() {
    return this.#refused;
  }

  /** Do not wait any longer before trying again. */
  retryNow() {
    if (!this.#over && !this.#connection) this.#connect();
  }

  // -- the connection ----------------------------------------------------------------------

  #connect() {
    clearTimeout(this.#timer);
    const from = this.#replayFrom();
    this.#frames = this.#frames.filter(({ at, sound }) => at + sound.length > from);
    const standing = this.#lines.at(-1);
    const socket = new WebSocket(this.url, this.protocols);
    socket.binaryType = "arraybuffer";
    const connection = {
      socket,
      uid: crypto.randomUUID(),
      offset: (this.#frames[0]?.at ?? this.#captured) / SAMPLE_RATE,
      seam: standing ? { at: standing.end, words: this.#lines.flatMap((line) => line.words).slice(-SEAM_WORDS) } : null,
      begun: performance.now(),
      opened: false,
      ready: false,
      next: this.#frames[0]?.at ?? this.#captured,
      ended: false,
      sent: 0,
      taken: 0,
      takenAt: performance.now(),
      heardAt: performance.now(),
      newest: 0,
      seen: new Set(),
      held: null,
      heldAt: 0,
      trouble: "",
      again: false,
      waitMs: 0,
    };
    this.#connection = connection;
    // Whatever an abandoned socket still has to say is not listened to.
    const mine = (handle) => (event) => this.#connection === connection && handle(event);
    socket.onopen = mine(() => {
      connection.opened = true;
      this.#refused = 0;
      socket.send(JSON.stringify({ ...this.config, uid: connection.uid }));
    });
    socket.onmessage = mine(({ data }) => this.#hear(connection, data));
    socket.onclose = mine((event) => this.#closed(connection, event.code));
    if (!this.#attempts) this.#say("connecting");
  }

  #closed(connection, code) {
    if (!connection.opened) this.#refused++;
    if (connection.ended && code === 1000 && !connection.again) {
      this.#commitHeld(connection);
      this.#end("done", "");
    } else if (FINAL_CODES.includes(code)) {
      this.#end("failed", connection.trouble || "The service closed the connection.");
    } else {
      this.#retry(connection);
    }
  }

  #retry(connection) {
    this.#connection = null;
    if (connection.held) this.#unsure = connection;
    connection.socket.close();
    const waits = connection.waitMs > 0;
    const delay = waits ? connection.waitMs : RETRY_MS[Math.min(this.#attempts, RETRY_MS.length - 1)];
    this.#attempts++;
    // Many pages lose one server in the same moment; they need not come back in the same one.
    this.#timer = setTimeout(() => this.#connect(), delay * (0.75 + Math.random() / 2));
    this.#say(waits ? "waiting" : "reconnecting", connection.trouble);
  }

  #end(state, detail) {
    if (this.#over) return;
    this.#over = true;
    // Nothing will be said about it any more: a line that may be cut short is better than none.
    const last = this.#connection?.held ? this.#connection : this.#unsure;
    if (last) this.#commitHeld(last);
    clearInterval(this.ticking);
    clearTimeout(this.#timer);
    this.#connection?.socket.close();
    this.#connection = null;
    this.#frames = [];
    this.events.onOpen?.("", "");
    this.#say(state, detail);
  }

  #say(state, detail = "") {
    this.events.onState?.(state, detail);
  }

  #note(text) {
    // Each new connection is told the same.
    if (!this.#notes.has(text)) this.events.onNote?.(text);
    this.#notes.add(text);
  }

  // -- sound -------------------------------------------------------------------------------

  #pump() {
    const connection = this.#connection;
    if (!connection?.ready || connection.ended) return;
    for (const { at, sound } of this.#frames) {
      if (at < connection.next) continue;
      if (connection.socket.bufferedAmount > AHEAD_BYTES) return;
      connection.socket.send(sound);
      connection.sent += sound.byteLength;
      connection.next = at + sound.length;
    }
    if (this.#ending) {
      connection.socket.send(END_OF_AUDIO);
      connection.sent += END_OF_AUDIO.length;
      connection.ended = true;
    }
  }

  /** Sample that a new connection begins with: the last line is heard once more, as context. */
  #replayFrom() {
    const line = this.#lines.at(-1);
    const from = line ? Math.max(line.start - LEAD_SECONDS, line.end - OVERLAP_SECONDS) * SAMPLE_RATE : 0;
    return Math.max(from, this.#kept);
  }

  #tick() {
    const connection = this.#connection;
    const now = performance.now();
    if (connection) {
      const { socket } = connection;
      if (!connection.ready && now - connection.begun > READY_MS) return this.#retry(connection);
      const taken = connection.sent - socket.bufferedAmount;
      if (taken > connection.taken || !socket.bufferedAmount) {
        connection.taken = taken;
        connection.takenAt = now;
      } else if (now - connection.takenAt > STUCK_MS) {
        return this.#retry(connection);
      }
      if (connection.held && now - connection.heldAt > HOLD_MS) {
        this.#commitHeld(connection);
        this.#show(connection, null);
      }
      const quiet = connection.ready && !socket.bufferedAmount && now - connection.heardAt > QUIET_SECONDS * 1000;
      if (quiet) this.#kept = Math.max(this.#kept, this.#captured - QUIET_SECONDS * SAMPLE_RATE);
      this.#pump();
    }
    this.#letGo();
  }

  /** Forget sound that is not needed any more, and say so where it had been. */
  #letGo() {
    const needed = this.#replayFrom();
    const limit = this.#captured - KEPT_SECONDS * SAMPLE_RATE;
    if (limit > needed) {
      this.#kept = limit;
      this.#lost += (limit - needed) / SAMPLE_RATE;
      this.#note("The service was away for too long; the oldest sound was given up.");
    }
    const from = Math.max(needed, limit);
    while (this.#frames.length && this.#frames[0].at + this.#frames[0].sound.length <= from) this.#frames.shift();
  }

  /** Seconds of sound given up because no service took them. */
  get lost() {
    return this.#lost;
  }

  // -- words -------------------------------------------------------------------------------

  #hear(connection, data) {
    const message = JSON.parse(data);
    connection.heardAt = performance.now();
    if (message.segments) this.#segments(connection, message.segments);
    else if (message.status === "WAIT") {
      const ms = message.message * 60000;
      connection.waitMs = Math.min(Math.max(ms, WAIT_MS[0]), WAIT_MS[1]);
      connection.trouble = `All seats are taken; the next may be free in ${Math.max(1, Math.ceil(message.message))} min.`;
      this.#retry(connection);
    } else if (message.status === "ERROR") connection.trouble = message.message;
    else if (message.status === "WARNING") this.#note(message.message);
    else if (message.message === "SERVER_READY") {
      connection.ready = true;
      this.#attempts = 0;
      this.#say("live");
      this.#pump();
    } else if (message.message === "DISCONNECT") connection.again = true;
    else if (message.language) this.events.onLanguage?.(message.language);
  }

  #segments(connection, segments) {
    let open = null;
    for (const segment of segments) {
      if (!segment.completed) {
        open = segment;
        continue;
      }
      const key = `${segment.start} ${segment.end} ${segment.text}`;
      if (connection.seen.has(key)) continue;
      connection.seen.add(key);
      this.#commitHeld(connection);
      connection.held = this.#placed(connection, segment);
      connection.heldAt = performance.now();
    }
    const being = open && this.#placed(connection, open);
    // It is shown once more as open before it is finished, with the same words.
    const isHeld = being && connection.held && being.start < connection.held.end - 0.001;
    if (being && !isHeld) this.#commitHeld(connection);
    this.#show(connection, isHeld ? null : being, open?.settled ?? "");
    const newest = (being ?? connection.held)?.end ?? 0;
    if (newest > connection.newest) {
      connection.newest = newest;
      this.events.onLatency?.(this.seconds - newest);
    }
  }

  /** A segment with times of the whole recording. */
  #placed(connection, segment) {
    const place = ({ word, start, end }) => ({
      word,
      start: Number(start) + connection.offset,
      end: Number(end) + connection.offset,
    });
    const whole = { word: segment.text, start: segment.start, end: segment.end };
    const words = (segment.words?.length ? segment.words : [whole]).map(place);
    return { start: words[0].start, end: words.at(-1).end, words };
  }

  #commitHeld(connection) {
    const { held } = connection;
    connection.held = null;
    if (!held) return;
    const words = fresh(held.words, connection.seam);
    if (!words.length) return;
    this.#unsure = null;
    const start = Math.max(words[0].start, this.#lines.at(-1)?.end ?? 0);
    const line = { start, end: Math.max(words.at(-1).end, start), text: textOf(words), words };
    this.#lines.push(line);
    this.events.onLine?.(line);
  }

  #show(connection, being, settled = "") {
    const held = connection.held ? fresh(connection.held.words, connection.seam) : [];
    const words = being ? being.words : [];
    let length = 0;
    const n = words.filter((one) => (length += one.word.length) <= settled.length).length;
    // The seam is one in all words, so it is looked for before they are parted.
    const kept = fresh(words, connection.seam);
    const sure = kept.slice(0, Math.max(0, n - (words.length - kept.length)));
    this.events.onOpen?.(textOf(held) + textOf(sure), textOf(kept.slice(sure.length)));
  }
}

function textOf(words) {
  return words.map((one) => one.word).join("");
}
