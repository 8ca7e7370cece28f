/** The page: what is clicked goes to the microphone and the dictation, what comes back is shown. */
import { nameOf, LANGUAGES } from "./languages.js";
import { Dictation } from "./live.js";
import { openMicrophone } from "./microphone.js";
import { toSrt, toText } from "./subtitles.js";

const $ = (id) => document.getElementById(id);
const SOCKET = new URL("ws", location.href).href.replace(/^http/, "ws");

const STATES = {
  connecting: "Connecting …",
  live: "Recording",
  waiting: "Waiting for a seat; what you say is kept",
  reconnecting: "Connection lost, trying again; what you say is kept",
  done: "Stopped",
  failed: "Stopped by the service",
};
const MICROPHONE_PROBLEMS = {
  NotAllowedError: "The browser may not use the microphone. Allow it beside the address, then start again.",
  NotFoundError: "No microphone was found. Plug one in, then start again.",
  NotReadableError: "The microphone is in use by another program, or the system blocks it.",
  OverconstrainedError: "The chosen microphone is gone. Choose another, then start again.",
};

/** @type {import("./live.js").Line[]} all finished lines, of all recordings since the last "Clear" */
let lines = [];
/** Seconds recorded before the running recording. */
let before = 0;
let dictation = null;
let microphone = null;
/** idle; recording; stopping, while the microphone gives its last sound; finishing: no more sound will come. */
let stage = "idle";
/** Grows with whatever makes a microphone that is still being opened unwanted. */
let turn = 0;
let closing = Promise.resolve();

// -- the recording -------------------------------------------------------------------------

async function start() {
  $("start").disabled = true;
  problem("");
  $("notes").replaceChildren();
  $("notes").hidden = true;
  $("latency").textContent = $("heard").textContent = "–";
  const language = $("language").value || null;
  const key = $("key").value.trim();
  const config = { language, task: "transcribe", model: "", use_vad: true, word_timestamps: true, send_last_n_segments: 3 };
  const offset = before;
  const running = new Dictation(SOCKET, config, key ? ["whisper-live", `bearer.${key}`] : ["whisper-live"], {
    onLine: (line) => addLine({ ...line, start: line.start + offset, end: line.end + offset }),
    onOpen: showOpen,
    onState: (state, detail) => showState(running, state, detail),
    onLatency: (seconds) => ($("latency").textContent = `${Math.max(0, seconds).toFixed(1)} s`),
    onLanguage: (code) => ($("heard").textContent = nameOf(code)),
    onNote: note,
  });
  dictation = running;
  if (!(await listen())) {
    dictation = null;
    $("start").disabled = false;
    return;
  }
  stage = "recording";
  running.start();
  $("heard").textContent = language ? nameOf(language) : "–";
  $("stop").disabled = false;
  $("language").disabled = $("key").disabled = true;
  $("stop").focus();
}

/** Whether a microphone is open now; one that is not wanted any more is closed again. */
async function listen() {
  const mine = ++turn;
  try {
    const opened = await openMicrophone($("device").value, hear, () => {
      problem("The microphone went away. Choose another to go on; what was said is kept.");
    });
    if (mine !== turn) {
      await opened.stop();
      return false;
    }
    microphone = opened;
  } catch (error) {
    if (mine === turn) problem(MICROPHONE_PROBLEMS[error.name] ?? `The microphone cannot be used (${error.name}).`);
    return false;
  }
  listDevices();
  return true;
}

function hear(frame) {
  dictation?.feed(frame);
  const power = frame.reduce((sum, sample) => sum + sample * sample, 0) / frame.length;
  $("level").value = power > 0 ? Math.max(-60, 10 * Math.log10(power)) : -60;
  if (dictation) $("recorded").textContent = clock(before + dictation.seconds);
}

/** Close the microphone, with its last sound heard. */
function letGo() {
  turn++;
  if (microphone) closing = microphone.stop().catch(() => {});
  microphone = null;
  return closing;
}

async function stop(event) {
  if (stage === "finishing") {
    // Another click: whoever cannot wait for a service that is away. A double click's second half is none.
    if (event.detail < 2) dictation?.abandon();
    return;
  }
  if (stage !== "recording") return;
  stage = "stopping";
  const stopped = dictation;
  await letGo();
  if (dictation !== stopped) return;
  stage = "finishing";
  $("level").value = -60;
  $("stop").textContent = "Give up the rest";
  $("state").textContent = "Finishing the last words …";
  stopped.finish();
}

async function changeDevice() {
  if (stage !== "recording") return;
  problem("");
  const closed = letGo();
  const mine = turn;
  await closed;
  if (mine === turn) await listen();
}

function showState(of, state, detail) {
  $("state").dataset.state = state;
  $("state").textContent = state === "live" && stage !== "recording" ? "Finishing the last words …" : STATES[state];
  const over = state === "done" || state === "failed";
  if (state === "reconnecting" || state === "failed" || state === "live") askService();
  if (detail) problem(detail);
  else if (state === "live" && microphone) problem("");
  if (!over || dictation !== of) return;
  before += of.seconds;
  dictation = null;
  stage = "idle";
  letGo();
  $("level").value = -60;
  $("stop").textContent = "Stop";
  $("stop").disabled = true;
  $("start").disabled = $("language").disabled = $("key").disabled = false;
}

// -- the transcript ------------------------------------------------------------------------

function addLine(line) {
  const atEnd = innerHeight + scrollY >= document.body.scrollHeight - 80;
  lines.push(line);
  const item = document.createElement("li");
  const time = document.createElement("time");
  const text = document.createElement("span");
  time.textContent = clock(line.start);
  text.textContent = line.text.trim();
  item.append(time, text);
  $("lines").append(item);
  for (const id of ["txt", "srt", "clear"]) $(id).disabled = false;
  $("empty").hidden = true;
  if (atEnd) scrollTo({ top: document.body.scrollHeight });
}

function showOpen(settled, rest) {
  $("settled").textContent = settled.trimStart();
  $("rest").textContent = settled ? rest : rest.trimStart();
  $("open").hidden = !settled && !rest;
  if (!$("open").hidden) $("empty").hidden = true;
}

function clear() {
  lines = [];
  $("lines").replaceChildren();
  for (const id of ["txt", "srt", "clear"]) $(id).disabled = true;
  if (!dictation) {
    before = 0;
    $("recorded").textContent = clock(0);
    $("empty").hidden = false;
  }
}

function download(extension, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
  link.download = `transcript.${extension}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// -- the rest of the page ------------------------------------------------------------------

async function listDevices() {
  const devices = (await navigator.mediaDevices.enumerateDevices()).filter(
    // Without leave to listen the browser gives neither names nor ids.
    (one) => one.kind === "audioinput" && one.deviceId && one.deviceId !== "default",
  );
  const chosen = $("device").value;
  const options = devices.map((one) => new Option(one.label || "Microphone", one.deviceId));
  $("device").replaceChildren(new Option("The system's choice", ""), ...options);
  $("device").value = devices.some((one) => one.deviceId === chosen) ? chosen : "";
}

/** Which hop is broken: the edge answers for itself, and 502 or 504 where the GPU box does not. */
async function askService() {
  let text;
  try {
    const { status } = await fetch("ready", { cache: "no-store" });
    // One refusal may be that of a service which has just come back.
    if (status === 200 && dictation?.refused > 1) text = "The service is ready, but refuses this page: is the key right?";
    else if (status === 200) text = "The service is ready.";
    else if (status === 503) text = "The service is not ready: its model is loading, or it fails.";
    else text = "The edge is there; the GPU box behind it does not answer.";
  } catch {
    text = "The edge does not answer.";
  }
  $("service").textContent = text;
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function note(text) {
  const item = document.createElement("li");
  item.textContent = text;
  $("notes").append(item);
  $("notes").hidden = false;
}

function clock(seconds) {
  const whole = Math.floor(seconds);
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor(whole / 60) % 60;
  const rest = String(whole % 60).padStart(2, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

const named = LANGUAGES.map((code) => [nameOf(code), code]).sort(([a], [b]) => a.localeCompare(b));
$("language").append(...named.map(([name, code]) => new Option(name, code)));
$("language").value = localStorage.getItem("language") ?? "";
$("language").addEventListener("change", () => localStorage.setItem("language", $("language").value));
$("device").addEventListener("change", changeDevice);
$("start").addEventListener("click", start);
$("stop").addEventListener("click", stop);
$("options").addEventListener("submit", (event) => event.preventDefault());
$("clear").addEventListener("click", clear);
$("txt").addEventListener("click", () => download("txt", toText(lines)));
$("srt").addEventListener("click", () => download("srt", toSrt(lines)));
addEventListener("online", () => dictation?.retryNow());
addEventListener("beforeunload", (event) => dictation && event.preventDefault());
if (navigator.mediaDevices) {
  navigator.mediaDevices.addEventListener("devicechange", listDevices);
  listDevices();
  $("start").disabled = false; // a click before this line would be lost
} else {
  problem("Browsers give a page the microphone only over https. Open this one with https:// in front.");
}
askService();
