/** The page: a recording is chosen, handed in, followed, shown, and taken away as files. Read first. */

import { CODES, languageName } from "./languages.js";
import { MEDIA_TYPES, shortTime, write } from "./formats.js";
import { Transcript } from "./transcript.js";
import { Waveform, peaks } from "./waveform.js";
import { obstacle, record } from "./recorder.js";
import { follow, handIn, state, useKey, withdraw } from "./service.js";
import { percent } from "./confidence.js";

const $ = (id) => document.getElementById(id);
const audio = $("audio");
const SKIP_SECONDS = 5;
const ASK_AGAIN_MS = 2000;
const TITLE = document.title;

let file = null;
let recording = null;
/** The job under way: `{controller, id}`. */
let job = null;
/** What the service said about the transcript beside its segments. */
let answer = null;
let unsaved = false;
let multilingual = true;

const waveform = new Waveform($("waveform"), play);
const transcript = new Transcript($("lines"), { onSeek: play, onChange: showTranscript });

// -- the service -------------------------------------------------------------------------------

async function meet() {
  try {
    const { model } = await state();
    multilingual = model?.multilingual ?? true;
    $("model").textContent = model
      ? `Model: ${model.name}${multilingual ? "" : ", which knows English only"}`
      : "The service is loading its model; what you send waits for it.";
    $("language").disabled = $("task").disabled = !multilingual;
    if (!multilingual) [$("language").value, $("task").value] = ["", "transcribe"];
    $("key-form").hidden = true;
    if (!model) setTimeout(meet, ASK_AGAIN_MS);
  } catch (error) {
    if (error.status !== 401) $("model").textContent = "";
    complain(error);
  }
}

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  complain(null);
  await meet();
  if ($("key-form").hidden) (file ? $("start") : $("file")).focus();
});

/** Show an error, or none; a missing key is asked for. */
function complain(error) {
  const needsKey = error?.status === 401;
  // The service's words on keys are for programs. Whoever has shown none yet did nothing wrong.
  const message = needsKey ? ($("key").value && "The service does not take this key.") : error?.message;
  $("error").hidden = !message;
  $("error").textContent = message ?? "";
  if (!needsKey) return;
  $("model").textContent = "";
  $("key-form").hidden = false;
  $("key").focus();
}

// -- choosing ----------------------------------------------------------------------------------

$("file").addEventListener("change", () => {
  if ($("file").files.length) choose($("file").files[0]);
  // The same file chosen again is a choice too.
  $("file").value = "";
});

function choose(chosen) {
  if (job || recording || !mayDiscard()) return;
  file = chosen;
  answer = null;
  unsaved = false;
  complain(null);
  transcript.clear();
  $("chosen").textContent = `${file.name}, ${size(file.size)}`;
  $("start").disabled = false;
  $("start").focus();
  showPlayer();
}

function mayDiscard() {
  return !unsaved || confirm("The edits of this transcript are not downloaded. Drop them?");
}

for (const name of ["dragenter", "dragover"]) {
  addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
addEventListener("dragleave", (event) => event.relatedTarget || $("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  $("drop").classList.remove("over");
  if (!event.dataTransfer?.files.length) return;
  event.preventDefault();
  choose(event.dataTransfer.files[0]);
});

addEventListener("beforeunload", (event) => {
  if (unsaved || job || recording) event.preventDefault();
});

$("record").addEventListener("click", async () => {
  if (recording) return void recording.stop();
  if (!mayDiscard()) return;
  complain(null);
  $("record").disabled = true;
  try {
    recording = await record((level) => ($("level").value = level));
  } catch (error) {
    return complain(error);
  } finally {
    $("record").disabled = false;
  }
  audio.pause();
  const begun = performance.now();
  const tell = () => ($("chosen").textContent = `Recording, ${shortTime((performance.now() - begun) / 1000)}`);
  const timer = setInterval(tell, 1000);
  tell();
  // A status that ticks would be read out every second.
  $("chosen").removeAttribute("role");
  $("level").hidden = false;
  $("record").textContent = "Stop recording";
  $("file").disabled = $("start").disabled = true;
  const recorded = await recording.file;
  clearInterval(timer);
  recording = null;
  unsaved = false;
  $("level").hidden = true;
  $("chosen").setAttribute("role", "status");
  $("record").textContent = "Record";
  $("file").disabled = false;
  choose(recorded);
});

// -- a job -------------------------------------------------------------------------------------

$("order").addEventListener("submit", (event) => {
  event.preventDefault();
  if (file && !job && mayDiscard()) transcribe();
});
$("cancel").addEventListener("click", () => job.controller.abort());

async function transcribe() {
  const { signal } = (job = { controller: new AbortController(), id: null }).controller;
  remember();
  working(true);
  complain(null);
  transcript.clear();
  answer = null;
  unsaved = false;
  try {
    phase("Uploading", 0);
    const sent = (done, total) => phase(`Uploading, ${size(done)} of ${size(total)}`, done / total);
    job.id = await handIn(file, fields(), sent, signal);
    signal.throwIfAborted();
    phase("Waiting for the service");
    for await (const event of follow(job.id, signal)) heard(event);
    announce(summary());
  } catch (error) {
    if (signal.aborted) await stop(job.id);
    else complain(error);
  } finally {
    job = null;
    working(false);
    showTranscript();
  }
}

function fields() {
  const chosen = { task: $("task").value, word_timestamps: $("words").checked };
  if ($("language").value) chosen.language = $("language").value;
  return chosen;
}

function heard({ name, data }) {
  if (name === "status" && data.status === "running") {
    // A job that a restart cut off begins anew.
    transcript.clear();
    phase("Reading the recording");
  } else if (name === "status" && data.status === "queued") {
    phase("Waiting for the service");
  } else if (name === "progress" && data.total_seconds) {
    const share = data.done_seconds / data.total_seconds;
    phase(`Transcribing, ${percent(share)} of ${shortTime(data.total_seconds)} of speech`, share);
  } else if (name === "segment") {
    transcript.add(data);
  } else if (name === "lost") {
    phase("The connection is lost; trying again");
  } else if (name === "done") {
    if (!data) throw new Error("The result is gone: it was kept for its time. Send the recording again.");
    answer = data;
    transcript.settle(data.segments, data.language);
  } else if (name === "error") {
    throw new Error(data.message);
  }
}

async function stop(id) {
  announce("Cancelled.");
  if (id === null) return;
  try {
    await withdraw(id);
  } catch (error) {
    // A job that is gone already is as good as cancelled.
    if (error.status !== 404) complain(error);
  }
}

function working(active) {
  const hadFocus = document.activeElement === (active ? $("start") : $("cancel"));
  $("choices").disabled = active;
  $("start").hidden = active;
  $("cancel").hidden = !active;
  $("progress").hidden = !active;
  if (hadFocus) (active ? $("cancel") : $("start")).focus();
  if (!active) document.title = TITLE;
}

let announced = "";

/** What is going on, and how much of it is done, 0 to 1; undefined where nobody knows. */
function phase(text, share) {
  $("phase").textContent = text;
  if (share === undefined) $("bar").removeAttribute("value");
  else $("bar").value = share;
  document.title = share === undefined ? TITLE : `${percent(share)} – ${TITLE}`;
  // Read out at every quarter, not at every event.
  const coarse = text.split(",")[0] + (share === undefined ? "" : `, ${Math.floor(share * 4) * 25} %`);
  if (coarse !== announced) announce((announced = coarse));
}

function announce(text) {
  $("announcer").textContent = text;
}

// -- the transcript ----------------------------------------------------------------------------

function showTranscript() {
  const { segments, levels } = transcript;
  unsaved ||= transcript.isEdited;
  waveform.spans = segments.map(({ start, end }, index) => ({ start, end, level: levels[index] }));
  $("tools").hidden = !segments.length;
  $("next-doubt").disabled = !levels.some(Boolean);
  $("summary").textContent = summary();
  const said = answer ? [...answer.warnings, ...gaps(answer)] : [];
  $("notes").replaceChildren(
    ...said.map((text) => Object.assign(document.createElement("li"), { textContent: text })),
  );
  $("notes").hidden = !said.length;
  if (answer) waveform.duration = answer.duration;
}

function summary() {
  const { segments, levels } = transcript;
  const doubted = levels.filter(Boolean).length;
  const lines = `${count(segments.length, "line")}, ${doubted || "none"} of them doubted or unsure.`;
  if (!answer) return segments.length ? `${lines} ${job ? "More to come." : "Not all of the recording."}` : "It appears here while the recording is worked on.";
  if (!segments.length) return "Done. There is no speech in this recording.";
  const { language, language_probability: sure, duration, receipt } = answer;
  const took = receipt ? `, in ${receipt.stages.total.toFixed(1)} s` : "";
  const spoken = language ? ` ${languageName(language)}${sure < 1 ? ` (${percent(sure)})` : ""}.` : "";
  return `Done: ${lines}${spoken} ${shortTime(duration)} of sound${took}.`;
}

function gaps({ receipt }) {
  return (receipt?.gaps ?? []).map(
    ([start, end]) => `Speech was heard from ${shortTime(start)} to ${shortTime(end)} that no line covers.`,
  );
}

$("search").addEventListener("input", () => found(transcript.search($("search").value.trim()), 0));
$("search").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  go(event.shiftKey ? -1 : 1);
});
$("next").addEventListener("click", () => go(1));
$("previous").addEventListener("click", () => go(-1));

let hits = 0;

function found(number) {
  hits = number;
  $("matches").textContent = $("search").value.trim() ? `${count(number, "place")}` : "";
}

function go(by) {
  const at = transcript.step(by);
  if (at) $("matches").textContent = `${at} of ${count(hits, "place")}`;
}

$("next-doubt").addEventListener("click", () => transcript.nextDoubt());

for (const button of document.querySelectorAll("[data-format]")) {
  button.addEventListener("click", () => download(button.dataset.format));
}

function download(format) {
  const { segments } = transcript;
  const text = segments.map((segment) => segment.text).join("").trim();
  const { receipt, ...said } = answer ?? { language: null, duration: audio.duration, warnings: [] };
  const whole = { ...said, text, segments };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([write(whole, format)], { type: MEDIA_TYPES[format] }));
  link.download = `${file.name.replace(/\.[^.]*$/, "") || "transcript"}.${format}`;
  link.click();
  // Some browsers begin to read it after the click has been handled.
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  unsaved = false;
}

// -- the player --------------------------------------------------------------------------------

async function showPlayer() {
  const shown = file;
  URL.revokeObjectURL(audio.src);
  audio.src = URL.createObjectURL(file);
  $("player").hidden = false;
  $("waveform").hidden = false;
  waveform.peaks = null;
  waveform.duration = waveform.position = 0;
  note("");
  try {
    await once(audio, "loadedmetadata", "error");
    if (audio.error) throw new Error("This browser cannot play this recording; it is transcribed all the same.");
    await settleDuration();
    if (file !== shown) return;
    waveform.duration = audio.duration;
    const values = await peaks(file, audio.duration);
    if (file === shown) waveform.peaks = values;
  } catch (error) {
    if (file === shown) note(error.message);
  }
}

/** What a recorder writes has no length in front: a player learns it by going to the end. */
async function settleDuration() {
  if (Number.isFinite(audio.duration)) return;
  audio.currentTime = Number.MAX_SAFE_INTEGER;
  while (!Number.isFinite(audio.duration)) await once(audio, "durationchange", "emptied");
  audio.currentTime = 0;
}

function once(target, ...names) {
  return new Promise((resolve) => {
    const controller = new AbortController();
    const end = () => (controller.abort(), resolve());
    for (const name of names) target.addEventListener(name, end, { signal: controller.signal });
  });
}

function note(text) {
  $("waveform-note").textContent = text;
  $("waveform-note").hidden = !text;
}

function play(seconds) {
  if (audio.readyState) audio.currentTime = seconds;
  resume();
}

function resume() {
  // A recording that cannot be played was said so when it was chosen, and a pause may overtake the start.
  if (audio.src) audio.play().catch(() => {});
}

function toggle() {
  if (audio.paused) resume();
  else audio.pause();
}

function track() {
  waveform.position = audio.currentTime;
  const line = transcript.mark(audio.currentTime);
  const editing = document.activeElement?.matches("textarea");
  if (line && $("follow").checked && !audio.paused && !editing) line.scrollIntoView({ block: "nearest" });
  if (!audio.paused) requestAnimationFrame(track);
}

audio.addEventListener("play", track);
audio.addEventListener("seeked", track);
audio.addEventListener("pause", track);

// -- keys --------------------------------------------------------------------------------------

const KEYS = {
  " ": toggle,
  ",": () => (audio.currentTime -= SKIP_SECONDS),
  ".": () => (audio.currentTime += SKIP_SECONDS),
  "/": () => $("tools").hidden || $("search").focus(),
  n: () => transcript.nextDoubt(),
  o: () => $("file").click(),
  "?": () => {
    $("help").open = true;
    $("help").querySelector("summary").focus();
  },
};

addEventListener("keydown", (event) => {
  const action = KEYS[event.key];
  if (!action || !$("single-keys").checked || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.closest("input:not([type=checkbox], [type=file]), textarea, select")) return;
  // What has a meaning of its own for Space keeps it.
  if (event.key === " " && event.target.closest("button, input, summary, audio, a")) return;
  event.preventDefault();
  action();
});

// -- choices that are kept ---------------------------------------------------------------------

function remember() {
  const kept = { language: $("language").value, task: $("task").value, words: $("words").checked };
  localStorage.setItem("choices", JSON.stringify(kept));
}

function recall() {
  const kept = JSON.parse(localStorage.getItem("choices") ?? "{}");
  if (CODES.includes(kept.language)) $("language").value = kept.language;
  if (kept.task === "translate") $("task").value = kept.task;
  $("words").checked = kept.words ?? true;
  $("theme").value = localStorage.getItem("theme") ?? "";
  $("single-keys").checked = localStorage.getItem("single-keys") !== "off";
}

$("theme").addEventListener("change", () => {
  const chosen = $("theme").value;
  localStorage.setItem("theme", chosen);
  document.documentElement.dataset.theme = chosen;
  waveform.redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => waveform.redraw());
$("single-keys").addEventListener("change", () => {
  localStorage.setItem("single-keys", $("single-keys").checked ? "on" : "off");
});

// -- small words -------------------------------------------------------------------------------

function size(bytes) {
  return bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

const languages = CODES.map((code) => [languageName(code), code]).sort(([a], [b]) => a.localeCompare(b, "en"));
$("language").append(...languages.map(([name, code]) => new Option(name, code)));
recall();
if (obstacle()) {
  $("record").disabled = true;
  $("record-hint").textContent = obstacle();
  $("record-hint").hidden = false;
}
$("choices").disabled = false; // a click before this line would be lost
meet();
